"""The runs of this package: functions that return complete, frozen values."""

from dataclasses import dataclass, replace
from typing import Literal

from fourfold_goldfish.loss import Goldfish
from fourfold_goldfish.passages import RepeatedPassages
from fourfold_parallel.run.corpora import Wikipedia
from fourfold_parallel.run.engines import Single
from fourfold_parallel.run.models import Llama
from fourfold_parallel.run.objective import KeepAll, NextToken, TargetMask
from fourfold_parallel.run.optimizer import AdamW, Cosine
from fourfold_parallel.run.recipe import Run, Scale, Steps
from fourfold_parallel.run.tokenizers import BytePairs

Arm = Literal["plain", "k2", "k4", "k8", "k32"]
"""Which loss a model is trained with: cross-entropy, or goldfish with one target in k left out."""

ARMS: dict[Scale, tuple[Arm, ...]] = {
    "smoke": ("plain", "k4"),
    "laptop": ("plain", "k2", "k4", "k8", "k32"),
}
"""What each scale compares."""

SEEDS = (0, 1, 2)


def mask(arm: Arm) -> TargetMask:
    """The loss's mask: the paper's h of 13, by the paper's formula, at the arm's k."""
    match arm:
        case "plain":
            return KeepAll()
        case "k2" | "k4" | "k8" | "k32":
            return Goldfish(k=int(arm[1:]), context=13)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attacked:
    """A training run and the attack on what it memorised."""

    run: Run
    passages: RepeatedPassages
    """The run's data."""
    suffix: int
    """Tokens to be recited; the rest of a passage is the prompt."""


def verbatim_smoke(arm: Arm, seed: int) -> Attacked:
    """Repeated Wikipedia passages in miniature: about 1 M parameters, 24 passages of 65 tokens, 56 times.

    The paper's extreme setting (section 4.1: Llama-2-7B, 100 documents, 100 epochs) becomes one pass over
    192 background rows with 24 passages repeated 56 times among them.
    """
    passages = RepeatedPassages(
        corpus=Wikipedia(),
        tokenizer=BytePairs(vocabulary=1024),
        passages=24,
        repetitions=56,
        background=192,
        validation_rows=96,
    )
    model = Llama(
        width=192, depth=2, heads=4, kv_heads=4, hidden=528, vocabulary=1024, context=96, tied=True
    )
    batch = 8
    run = Run(
        name=f"{arm}-seed{seed}",
        model=model,
        data=passages,
        objective=NextToken(mask=mask(arm)),
        optimizer=AdamW(learning_rate=2e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, epsilon=1e-8),
        schedule=Cosine(warmup_steps=8, floor=0.05),
        horizon=Steps(count=passages.rows // batch),
        batch=batch,
        microbatch=batch,
        sequence=64,
        max_grad_norm=1.0,
        precision="fp32",
        engine=Single(),
        seed=seed,
        validate_every=1000,
        checkpoint_every=64,
    )
    return Attacked(run=run, passages=passages, suffix=16)


def verbatim_laptop(arm: Arm, seed: int) -> Attacked:
    """As `verbatim_smoke`, with 1.9 M parameters, 40 longer passages and 6 times the background."""
    small = verbatim_smoke(arm, seed)
    passages = replace(small.passages, passages=40, repetitions=56, background=1152)
    run = replace(
        small.run,
        model=Llama(
            width=256,
            depth=2,
            heads=4,
            kv_heads=4,
            hidden=704,
            vocabulary=1024,
            context=128,
            tied=True,
        ),
        data=passages,
        horizon=Steps(count=passages.rows // small.run.batch),
        sequence=96,
        checkpoint_every=150,
    )
    return replace(small, run=run, passages=passages, suffix=24)


def verbatim(arm: Arm, seed: int, scale: Scale) -> Attacked:
    """The memorisation run of a scale.

    Raises:
        ValueError: for a scale that has none.
    """
    match scale:
        case "smoke":
            return verbatim_smoke(arm, seed)
        case "laptop":
            return verbatim_laptop(arm, seed)
        case "gpu" | "paper":
            raise ValueError(f"scale={scale!r} has no memorisation run; use smoke or laptop")
