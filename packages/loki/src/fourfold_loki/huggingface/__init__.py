"""Loki in rotary models of transformers: importing this registers the attention function "loki"."""

from fourfold_loki.huggingface import forward, session

__all__ = ["forward", "session"]
