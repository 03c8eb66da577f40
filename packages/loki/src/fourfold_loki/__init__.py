"""Loki (Singhania et al. 2024): low-rank keys for sparse attention."""
