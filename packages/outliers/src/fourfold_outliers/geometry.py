"""Outlier dimensions (Puccetti et al. 2022): coordinates that carry a transformer."""
