"""Recurrent-depth language models (Geiping et al. 2025)."""
