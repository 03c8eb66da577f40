"""The studies of out-of-core training, as values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Stacks:
    """Drawn stacks of blocks, simulated: the greedy strategy beside the best choice."""

    count: int
    least_blocks: int
    most_blocks: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """A Llama whose microbatches are timed."""

    layers: tuple[int, ...]
    width: int
    tokens: int
    """Of a microbatch, in rows of 128."""
    rounds: int
    """Of all engines in turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hybrid:
    """Ours beside the best swapping alone and the best recomputing alone."""

    models: Models
    busy: tuple[float, ...]
    """Seconds that the store would take for everything, both ways, over those of the computation."""
    budget: float
    """Of the bytes with which everything is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """Predicted and measured microbatches of one model."""

    models: Models
    busy: float
    budgets: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EqualMemory:
    """Data parallelism out of core beside a grid, with as much memory on each of two ranks."""

    widths: tuple[int, ...]
    layers: int
    tokens: int
    """Of a rank's microbatch under data parallelism."""
    busy: float
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HostUpdates:
    """Steps on 2 ranks whose update is on the host: its stages in a pipeline, and one after the other."""

    layers: int
    width: int
    tokens: int
    """Of a rank's microbatch, in rows of 128."""
    busy: float
    """Time in which all gradients leave the device, and that in which all weights come back, each over a
    plain step's."""
    latency_s: float
    """Of each exchange, at least."""
    rounds: int


def stacks() -> Stacks:
    """Two hundred stacks of 5 to 7 blocks; the pilot's are not among them."""
    return Stacks(count=200, least_blocks=5, most_blocks=7, seed=20)


def hybrid() -> Hybrid:
    """Three depths, three speeds of the store, memory for two fifths."""
    models = Models(layers=(4, 8, 12), width=192, tokens=512, rounds=7)
    return Hybrid(models=models, busy=(0.6, 1.2, 2.4), budget=0.4)


def predictions() -> Predictions:
    """Budgets that no other study uses."""
    models = Models(layers=(8,), width=192, tokens=512, rounds=7)
    return Predictions(models=models, busy=1.0, budgets=(0.25, 0.33, 0.47, 0.55, 0.68, 0.85))


def equal_memory() -> EqualMemory:
    """Three widths."""
    return EqualMemory(widths=(128, 192, 256), layers=6, tokens=512, busy=0.6, rounds=5)


def host_updates() -> HostUpdates:
    """Layers that are alike, 20 ms an exchange, and a way that is busy for a third of a step both ways."""
    return HostUpdates(layers=8, width=192, tokens=512, busy=0.3, latency_s=0.02, rounds=7)
