"""The study's runs: a small model fine-tuned on instruction data, one arm per axis of the paper.

Every arm begins from the same pretrained weights (or from fresh ones at smoke scale) and takes the same
number of optimizer steps, so that an arm with less data sees it more often.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from fourfold_hpc_coder.instruct.format import CodePairs, InstructionLoss, InstructionRows
from fourfold_hpc_coder.instruct.pipeline import Instructions, templates
from fourfold_hpc_coder.instruct.sources import ParallelSource
from fourfold_hpc_coder.vocabulary import Model
from fourfold_parallel.common.values import formerly
from fourfold_parallel.reproduce.scale import Scale
from fourfold_parallel.run.data import Packed
from fourfold_parallel.run.engines import Single
from fourfold_parallel.run.models import Llama
from fourfold_parallel.run.objective import KeepAll, NextToken
from fourfold_parallel.run.optimizer import AdamW, Cosine
from fourfold_parallel.run.recipe import Run, Steps
from fourfold_parallel.run.trained import TrainedBy

Arm = Literal["full", "quarter", "sixteenth", "masked", "instructed", "spoiled", "mixed", "small"]
"""One change each to `full`: less data; prompts out of the loss; weights that were first tuned on serial
instructions; unverified data of which half is spoiled; half of it generic serial code; a smaller model."""

ARMS: dict[Scale, tuple[Arm, ...]] = {
    "smoke": ("full", "sixteenth"),
    "laptop": get_args(Arm),
}
SEEDS = (0, 1, 2)
TARGET: Model = "omp"
"""The parallel model that is taught and asked for."""


@formerly("hpc_coder/Tuned")
@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneStudy:
    """A fine-tuning run and the questions asked of it afterwards."""

    run: Run
    rows: InstructionRows
    """The run's data."""
    asked: int
    """Held-out tasks that are answered, compiled and run."""
    max_new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The sizes that a scale decides."""

    width: int
    small_width: int
    depth: int
    vocabulary: int
    samples: int
    """In the arm with all data."""
    steps: int
    pretraining_steps: int
    """Of next-token training on real parallel source; 0 begins from fresh weights."""
    batch: int
    sequence: int
    asked: int
    validated: int
    """Held-out tasks whose answers' loss is measured."""


SIZES: dict[Scale, Size] = {
    "smoke": Size(
        width=64,
        small_width=32,
        depth=2,
        vocabulary=448,
        samples=48,
        steps=40,
        pretraining_steps=0,
        batch=8,
        sequence=128,
        asked=4,
        validated=24,
    ),
    "laptop": Size(
        width=96,
        small_width=32,
        depth=2,
        vocabulary=448,
        samples=192,
        steps=90,
        pretraining_steps=150,
        batch=12,
        sequence=128,
        asked=24,
        validated=36,
    ),
}


def _llama(size: Size, width: int) -> Llama:
    return Llama(
        width=width,
        depth=size.depth,
        heads=4,
        kv_heads=4,
        hidden=width * 8 // 3 // 8 * 8,
        vocabulary=size.vocabulary,
        context=2 * size.sequence,
        tied=True,
    )


def pretrained(size: Size, width: int) -> Run:
    """Next-token training on real OpenMP and CUDA sources: the study's base model."""
    return Run(
        name=f"base-{width}",
        model=_llama(size, width),
        data=Packed(
            corpus=ParallelSource(),
            tokenizer=CodePairs(vocabulary=size.vocabulary, samples=400),
            held_out=0.02,
        ),
        objective=NextToken(mask=KeepAll()),
        optimizer=AdamW(learning_rate=3e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, epsilon=1e-8),
        schedule=Cosine(warmup_steps=10, floor=0.1),
        horizon=Steps(count=max(1, size.pretraining_steps)),
        batch=size.batch,
        microbatch=size.batch,
        sequence=size.sequence,
        max_grad_norm=1.0,
        precision="fp32",
        engine=Single(),
        seed=0,
        validate_every=10_000,
        checkpoint_every=10_000,
    )


def tuned(arm: Arm, seed: int, scale: Scale) -> FinetuneStudy:
    """The fine-tuning run of an arm.

    Raises:
        ValueError: for a scale that has none.
    """
    if scale not in SIZES:
        raise ValueError(f"scale={scale!r} has no fine-tuning run here; use {', '.join(SIZES)}")
    size = SIZES[scale]
    width = size.small_width if arm == "small" else size.width
    base = pretrained(size, width)
    fresh = _llama(size, width)
    model = TrainedBy(run=base) if size.pretraining_steps else fresh
    rows = InstructionRows(
        parts=_parts(arm, size.samples),
        tokenizer=CodePairs(vocabulary=size.vocabulary, samples=400),
        held_out_tasks=size.validated,
        model=TARGET,
    )
    run = replace(
        base,
        name=f"{arm}-seed{seed}",
        model=model,
        data=rows,
        objective=InstructionLoss(masked=arm == "masked", also=KeepAll()),
        horizon=Steps(count=size.steps),
        seed=seed,
    )
    if arm == "instructed":
        generic = replace(
            rows, parts=(templates(size.samples, models=("serial",), verified=False, seed=1),)
        )
        first = replace(
            run, name="generic", data=generic, seed=0, horizon=Steps(count=size.steps // 2)
        )
        run = replace(run, model=TrainedBy(run=first))
    return FinetuneStudy(run=run, rows=rows, asked=size.asked, max_new_tokens=64)


def _parts(arm: Arm, samples: int) -> tuple[Instructions, ...]:
    """The data of an arm."""
    match arm:
        case "quarter":
            return (templates(samples // 4),)
        case "sixteenth":
            return (templates(max(3, samples // 16)),)
        case "spoiled":
            return (templates(samples, corrupted=0.5, verified=False),)
        case "mixed":
            half = samples // 2
            return (templates(half), templates(half, models=("serial",), verified=False, seed=1))
        case _:
            return (templates(samples),)
