"""Loki: Low-rank Keys for Efficient Sparse Attention (Singhania et al.): to come."""
