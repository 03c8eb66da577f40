"""Loki (Singhania et al. 2024): attend to the few keys that matter, found cheaply."""

from fourfold_loki.attention import Rotation, loki_attention
from fourfold_loki.basis import Basis, fit, read_published
from fourfold_loki.budget import Budget, Count, Mass, Share
from fourfold_loki.cache import LokiCache
from fourfold_loki.calibrate import calibrate
from fourfold_loki.evaluate.perplexity import cost
from fourfold_loki.huggingface.session import Session, attending, loki
from fourfold_loki.attention_mode import Sparse
from fourfold_loki.selectors import Selector
from fourfold_loki.moments import Statistics

__all__ = [
    "Basis",
    "Budget",
    "Count",
    "LokiCache",
    "Mass",
    "Rotation",
    "Selector",
    "Session",
    "Share",
    "Sparse",
    "Statistics",
    "attending",
    "calibrate",
    "cost",
    "fit",
    "loki",
    "loki_attention",
    "read_published",
]
