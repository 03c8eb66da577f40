"""The runs of this package: functions that return complete, frozen values."""

from __future__ import annotations

from typing import Literal

from fourfold_gemstones.revisit import Revisit


def revisit(data_sha256: str, scale: Literal["smoke", "laptop"]) -> Revisit:
    """The published measurements revisited; smoke resamples just enough to run every line."""
    match scale:
        case "smoke":
            return Revisit(data_sha256=data_sha256, draws=40, shaped_draws=20, suites=2, seed=0)
        case "laptop":
            return Revisit(data_sha256=data_sha256, draws=300, shaped_draws=100, suites=40, seed=0)
