"""The studies that stand beside the paper's numbers, as values."""

from __future__ import annotations

from dataclasses import dataclass

from fourfold_parallel.axonn import paper
from fourfold_parallel.axonn.paper import Point
from fourfold_parallel.storm.study import Small, Storm


@dataclass(frozen=True, slots=True, kw_only=True)
class WeakScaling:
    """The paper's runs, planned: the fastest grid with every activation recomputed."""

    points: tuple[Point, ...]
    batch: int
    """Sequences."""
    sequence: int
    """Tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """A run of the paper with and without communication under computation."""

    point: Point
    batch: int
    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StrongScaling:
    """One model on ever more devices."""

    machine: str
    model: str
    devices: tuple[int, ...]
    batch: int
    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rankings:
    """The authors' own model on the cases whose rankings their script gives."""

    cases: tuple[RankedCase, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedCase:
    """A model on a machine, for the communication-only ranking and for ours."""

    machine: str
    model: str
    devices: int
    batch: int
    sequence: int
    least_tensor: int
    """The fewest ranks that hold the model, as the authors set it by hand."""


def weak_scaling() -> WeakScaling:
    """The paper's 15 points, sections VII.A and VII.B."""
    return WeakScaling(points=paper.WEAK_SCALING, batch=paper.BATCH, sequence=paper.SEQUENCE)


def overlap() -> Overlap:
    """GPT-80B on 8,192 dies of Frontier, section V.D."""
    point = next(p for p in paper.WEAK_SCALING if (p.machine, p.model) == ("frontier", "80B"))
    return Overlap(point=point, batch=paper.BATCH, sequence=paper.SEQUENCE)


def strong_scaling() -> StrongScaling:
    """GPT-80B on 128 to 8,192 dies of Frontier, section VII.C."""
    return StrongScaling(
        machine="frontier", model="80B", devices=(128, 256, 512, 1024, 2048, 4096, 8192),
        batch=paper.BATCH, sequence=paper.SEQUENCE,
    )  # fmt: skip


def rankings() -> Rankings:
    """The cases on which the authors validated their model, section V.B."""
    return Rankings(
        cases=(
            RankedCase(
                machine="perlmutter", model="20B", devices=32, batch=256, sequence=2048, least_tensor=16
            ),
            RankedCase(
                machine="frontier", model="40B", devices=64, batch=256, sequence=2048, least_tensor=32
            ),
        )
    )  # fmt: skip


def storm() -> Storm:
    """A hundred kills over a little Llama on grids of two ranks."""
    return Storm(runs=Small(), kills=100)


def grid_pairs() -> Storm:
    """No kill: a checkpoint of each grid of eight ranks, loaded on each."""
    return Storm(runs=Small(), kills=0, pairs_of=8)
