"""Gemstones (McLeish et al. 2025): scaling laws over width, depth, tokens and time."""
