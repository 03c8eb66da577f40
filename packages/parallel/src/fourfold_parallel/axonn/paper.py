"""Numbers of Singh et al. 2024 (arXiv 2502.08145), section VII.

The weak-scaling points of the largest runs are quoted in public text; the others are recalled, and agree
with the printed shares of peak within 0.1 points.
"""

from __future__ import annotations

from dataclasses import dataclass

from fourfold_parallel.plan.transformer import Transformer

SEQUENCE = 2048
BATCH = 8192
"""Sequences: 16.8 M tokens a step."""
VOCABULARY = 51_200
SIZES = {
    "5B": (24, 4096, 32), "10B": (32, 5120, 40), "20B": (32, 7168, 56), "40B": (38, 9216, 72),
    "60B": (56, 9216, 72), "80B": (42, 12288, 96), "160B": (84, 12288, 96), "320B": (96, 16384, 128),
}  # fmt: skip
"""Layers, width, heads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A run of the weak-scaling figure."""

    machine: str
    devices: int
    model: str
    pflops_per_s: float
    """With recomputation counted."""


def _points(machine: str, *rows: tuple[int, str, float]) -> tuple[Point, ...]:
    return tuple(
        Point(machine=machine, devices=devices, model=model, pflops_per_s=rate)
        for devices, model, rate in rows
    )


WEAK_SCALING = (
    *_points(
        "perlmutter", (512, "5B", 80.8), (1024, "10B", 197.8), (2048, "20B", 352.5),
        (4096, "40B", 620.1),
    ),
    *_points(
        "frontier", (512, "5B", 40.4), (1024, "10B", 77.3), (2048, "20B", 145.7), (4096, "40B", 295.9),
        (8192, "80B", 571.4), (16384, "160B", 1019.9), (32768, "320B", 1381.0),
    ),
    *_points(
        "alps", (1024, "10B", 310.0), (2048, "20B", 621.6), (4096, "40B", 1095.8),
        (6144, "60B", 1423.1),
    ),
)  # fmt: skip


def gpt(size: str) -> Transformer:
    """A model of the paper by its size."""
    layers, width, heads = SIZES[size]
    return Transformer.gpt(
        name=f"gpt-{size}", layers=layers, width=width, heads=heads, vocabulary=VOCABULARY
    )


def counted_flops(size: str, *, recomputes: bool) -> float:
    """Of a step, by the paper: `96 B S L H^2 (1 + S/(6H) + V/(16 L H))`; 72 without recomputation."""
    layers, width, _ = SIZES[size]
    factor = 96 if recomputes else 72
    shape = 1 + SEQUENCE / (6 * width) + VOCABULARY / (16 * layers * width)
    return factor * BATCH * SEQUENCE * layers * width**2 * shape
