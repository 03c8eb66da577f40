"""One catalogue of selectors, each of which ranks keys in its own way under the same budget."""

from fourfold_loki.selectors.base import Candidates, Selector
from fourfold_loki.selectors.double_sparsity import DoubleSparsity
from fourfold_loki.selectors.exact import Exact
from fourfold_loki.selectors.h2o import H2O
from fourfold_loki.selectors.loki import Loki
from fourfold_loki.selectors.pca_attention import PcaAttention
from fourfold_loki.selectors.quest import Quest
from fourfold_loki.selectors.random import Random
from fourfold_loki.selectors.sparq import SparQ
from fourfold_loki.selectors.streaming import Streaming

__all__ = [
    "H2O",
    "Candidates",
    "DoubleSparsity",
    "Exact",
    "Loki",
    "PcaAttention",
    "Quest",
    "Random",
    "Selector",
    "SparQ",
    "Streaming",
]
