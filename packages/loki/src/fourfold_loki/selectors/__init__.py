"""The selectors, each of which ranks keys in its own way under the same budget.

`CATALOGUE` makes each by name, in its usual settings, from a calibration. A new selector is a subclass of
`Selector` and a line there; tests/test_selectors.py runs everything that is listed through the same laws.
"""

from collections.abc import Callable, Mapping

from fourfold_loki.basis import fit
from fourfold_loki.moments import Statistics
from fourfold_loki.selectors.base import Candidates, Selection, Selector
from fourfold_loki.selectors.double_sparsity import DoubleSparsity
from fourfold_loki.selectors.exact import Exact
from fourfold_loki.selectors.h2o import H2O
from fourfold_loki.selectors.hash_attention import HashAttention
from fourfold_loki.selectors.loki import Loki
from fourfold_loki.selectors.magicpig import MagicPIG
from fourfold_loki.selectors.pca_attention import PcaAttention
from fourfold_loki.selectors.pqcache import PQCache
from fourfold_loki.selectors.quest import Quest
from fourfold_loki.selectors.random import Random
from fourfold_loki.selectors.skip_softmax import SkipSoftmax
from fourfold_loki.selectors.sparq import SparQ
from fourfold_loki.selectors.streaming import Streaming
from fourfold_loki.selectors.vattention import VAttention

__all__ = [
    "CATALOGUE",
    "H2O",
    "Candidates",
    "DoubleSparsity",
    "Exact",
    "HashAttention",
    "Loki",
    "MagicPIG",
    "PQCache",
    "PcaAttention",
    "Quest",
    "Random",
    "Selection",
    "Selector",
    "SkipSoftmax",
    "SparQ",
    "Streaming",
    "VAttention",
]


def _quarter(statistics: Statistics) -> int:
    return statistics.keys.outer.shape[-1] // 4


def _loki(statistics: Statistics) -> Loki:
    return Loki(basis=fit(statistics), widths=(_quarter(statistics),) * statistics.layers)


def _pca_attention(statistics: Statistics) -> PcaAttention:
    basis = fit(statistics, "pca")
    return PcaAttention(basis=basis, widths=(2 * _quarter(statistics),) * basis.layers)


CATALOGUE: Mapping[str, Callable[[Statistics], Selector]] = {
    "loki": _loki,
    "pca-attention": _pca_attention,
    "exact": lambda _: Exact(),
    "sparq": lambda statistics: SparQ(channels=_quarter(statistics)),
    "double-sparsity": lambda statistics: DoubleSparsity.from_statistics(
        statistics, channels=_quarter(statistics)
    ),
    "quest": lambda _: Quest(page=16),
    "h2o": lambda _: H2O(),
    "streaming": lambda _: Streaming(sinks=4),
    "pqcache": lambda _: PQCache(parts=2, bits=6),
    "hash-attention": HashAttention.from_statistics,
    "magicpig": lambda _: MagicPIG(hashes=75, bits=8),
    "vattention": lambda statistics: VAttention(heavy=_loki(statistics), epsilon=0.1, delta=0.1),
    "skip-softmax": lambda _: SkipSoftmax(block=64),
    "random": lambda _: Random(seed=0),
}
"""By name: a selector of a quarter of the coordinates (PCAAttn: half), pages of 16, four sinks.

MagicPIG and skip-softmax are meant for a budget with a `Threshold`; under others they rank. vAttention
reads a sample besides what the budget keeps.
"""
