"""Gemstones: A Model Suite for Multi-Faceted Scaling Laws (McLeish et al.): to come."""
