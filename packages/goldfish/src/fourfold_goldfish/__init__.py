"""Goldfish loss (Hans et al. 2024): train without reciting."""
