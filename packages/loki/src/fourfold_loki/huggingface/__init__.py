"""Loki in rotary models of transformers."""
