"""Figures: pure functions from records to figures."""

from collections.abc import Sequence

from fourfold_parallel.reproduce.experiment import Drawing
from fourfold_parallel.reproduce.scale import Scale


def drawings(scale: Scale) -> Sequence[Drawing]:
    """None yet."""
    del scale
    return ()
