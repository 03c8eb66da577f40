"""When a token has thought enough, and the loops that it leaves then."""

from fourfold_recurrent_depth.exits.criteria import (
    KL,
    NAMED,
    ArgmaxStability,
    Cosine,
    Criterion,
    Custom,
    EntropyDiff,
    Fixed,
    Gate,
    LatentDiff,
    MinPKL,
    criterion_named,
)

__all__ = [
    "KL",
    "NAMED",
    "ArgmaxStability",
    "Cosine",
    "Criterion",
    "Custom",
    "EntropyDiff",
    "Fixed",
    "Gate",
    "LatentDiff",
    "MinPKL",
    "criterion_named",
]
