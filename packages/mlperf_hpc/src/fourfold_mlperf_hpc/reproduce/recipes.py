"""The study as values: a small Llama to three targets at six batches, staging at three speeds, one roofline.

Learning rates follow the square root of the batch from 0.01 at 256. Rates, targets and the size were chosen
on seeds 100 and 101, which no run here uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from fourfold_mlperf_hpc.reproduce.paced import Paced, Staged
from fourfold_parallel.grid.engine import Fourfold
from fourfold_parallel.reproduce.scale import Scale
from fourfold_parallel.run.corpora import PythonManual
from fourfold_parallel.run.data import Packed
from fourfold_parallel.run.engines import Single
from fourfold_parallel.run.models import Llama
from fourfold_parallel.run.objective import KeepAll, NextToken
from fourfold_parallel.run.optimizer import AdamW, Constant
from fourfold_parallel.run.recipe import Run, Steps, Until
from fourfold_parallel.run.tokenizers import BytePairs


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A scale of the study."""

    batches: tuple[int, ...]
    """Rows of 32 tokens."""
    seeds: tuple[int, ...]
    targets_nats: tuple[float, ...]
    """Validation losses, from the easiest to the hardest."""
    most_samples: int
    """Of a run: after these it has missed."""
    quantum: int
    """Samples between validations, or one step where a step has more."""
    minimum_characters: int
    """Of a document: the fewer are taken, the sooner they are tokenized."""


SIZES: Mapping[Scale, Size] = MappingProxyType(
    {
        "smoke": Size(
            batches=(8, 64),
            seeds=(0, 1),
            targets_nats=(4.9, 4.6),
            most_samples=4_096,
            quantum=256,
            minimum_characters=4_000,
        ),
        "laptop": Size(
            batches=(8, 16, 32, 64, 128, 256),
            seeds=(0, 1, 2, 3, 4),
            targets_nats=(4.2, 3.95, 3.7),
            most_samples=24_576,
            quantum=512,
            minimum_characters=500,
        ),
    }
)
ON_TWO_RANKS: Mapping[Scale, tuple[int, ...]] = MappingProxyType({"smoke": (), "laptop": (16, 256)})
"""Batches that are trained on two ranks too."""
SPEEDUPS = (1, 2, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeToQuality:
    """Runs that differ in their seeds, each timed to several targets."""

    run: Run
    """The first seed's."""
    seeds: tuple[int, ...]
    targets_nats: tuple[float, ...]
    ranks: int

    def run_of(self, seed: int) -> Run:
        """The run of a seed."""
        return replace(self.run, name=f"{self.run.name}-seed{seed}", seed=seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class StagingShare:
    """One run with its staging, on devices that compute ever faster."""

    run: Run
    """At speedup 1."""
    packed: Packed
    forward_s: float
    """Of a step at speedup 1."""
    speedups: tuple[int, ...]

    def run_of(self, speedup: int) -> Run:
        """The run on a device so much faster."""
        paced = Paced(inner=NextToken(mask=KeepAll()), forward_s=self.forward_s / speedup)
        return replace(self.run, name=f"staging-speedup{speedup}", objective=paced)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRound:
    """The public logs' facts, which come with the package."""

    facts_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rooflines:
    """Steps of runs on several numbers of ranks."""

    runs: tuple[Run, ...]
    ranks: tuple[int, ...]


def learning_rate(batch: int) -> float:
    """0.01 at a batch of 256, with the square root of the batch."""
    return 0.01 * (batch / 256) ** 0.5


def packed(scale: Scale) -> Packed:
    """The Python manual and its docstrings in rows of 32 tokens."""
    return Packed(
        corpus=PythonManual(minimum_characters=SIZES[scale].minimum_characters),
        tokenizer=BytePairs(vocabulary=320),
        held_out=0.01 if scale == "laptop" else 0.05,
    )


def to_quality(batch: int, scale: Scale, *, ranks: int = 1) -> TimeToQuality:
    """A Llama of 32 thousand parameters, until its hardest target.

    Raises:
        ValueError: for a scale that has none.
    """
    if scale not in SIZES:
        raise ValueError(f"scale={scale!r} has no run here; use {', '.join(SIZES)}")
    size = SIZES[scale]
    run = Run(
        name=f"batch{batch}" if ranks == 1 else f"batch{batch}-ranks{ranks}",
        model=Llama(
            width=32, depth=2, heads=4, kv_heads=2, hidden=80, vocabulary=320, context=32, tied=True
        ),
        data=packed(scale),
        objective=NextToken(mask=KeepAll()),
        optimizer=AdamW(
            learning_rate=learning_rate(batch),
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.95,
            epsilon=1e-8,
        ),
        schedule=Constant(warmup_steps=max(1, 512 // batch)),
        horizon=Until(loss_nats=min(size.targets_nats), count=size.most_samples // batch),
        batch=batch,
        microbatch=256,
        sequence=32,
        max_grad_norm=1.0,
        precision="fp32",
        engine=Single() if ranks == 1 else Fourfold(data=ranks),
        seed=size.seeds[0],
        validate_every=max(1, size.quantum // batch),
        checkpoint_every=1_000_000,
    )
    return TimeToQuality(run=run, seeds=size.seeds, targets_nats=size.targets_nats, ranks=ranks)


def staging_share(scale: Scale) -> StagingShare:
    """Twenty steps of 0.4 s, halved and quartered, after a staging of about two seconds.

    Few rows are held out: what the simulated device does not speed up must be little beside its steps.
    """
    rows = replace(packed(scale), held_out=0.001)
    base = to_quality(8, scale).run
    pace, steps = (0.4, 20) if scale == "laptop" else (0.1, 10)
    run = replace(
        base,
        name="staging",
        data=Staged(packed=rows, bytes_per_s=800_000.0 if scale == "laptop" else 400_000.0),
        objective=Paced(inner=NextToken(mask=KeepAll()), forward_s=pace),
        horizon=Steps(count=steps),
        validate_every=1_000_000,
    )
    return StagingShare(run=run, packed=rows, forward_s=pace, speedups=SPEEDUPS)


def rooflines(scale: Scale) -> Rooflines:
    """The study's step at a small and a large batch, and a wider model, on one and two ranks."""
    small, large = (to_quality(batch, scale).run for batch in (16, 256))
    if scale == "smoke":
        return Rooflines(runs=(small,), ranks=(1,))
    wide = replace(
        large,
        name="width256",
        model=Llama(
            width=256, depth=2, heads=4, kv_heads=2, hidden=640, vocabulary=320, context=32, tied=True
        ),
        batch=32,
    )  # fmt: skip
    return Rooflines(runs=(small, large, wide), ranks=(1, 2))
