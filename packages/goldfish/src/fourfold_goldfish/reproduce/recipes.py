"""The runs of this package: functions that return complete, frozen values."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedModel

from fourfold_goldfish.loss import Goldfish
from fourfold_goldfish.reproduce.buckets import Buckets
from fourfold_parallel.common.records import Material
from fourfold_parallel.common.values import formerly
from fourfold_parallel.reproduce.scale import Scale
from fourfold_parallel.run.corpora import Corpus, Wikipedia
from fourfold_parallel.run.engines import Single
from fourfold_parallel.run.models import Llama, SmolLM2
from fourfold_parallel.run.objective import KeepAll, NextToken, TargetMask
from fourfold_parallel.run.optimizer import AdamW, Constant, Cosine
from fourfold_parallel.run.recipe import Run, Steps
from fourfold_parallel.run.tokenizers import BytePairs, SmolLM2Tokenizer, Tokenizer

Arm = Literal["plain", "k2", "k4", "k8", "k32", "random"]
"""The loss of a model: cross-entropy, goldfish with one target in k left out, or, as a control, one in 4
at random, other ones at each repetition."""

ARMS: dict[Scale, tuple[Arm, ...]] = {
    "smoke": ("plain", "k4"),
    "laptop": ("plain", "k2", "k4", "k8", "k32", "random"),
}
"""The losses that each scale compares."""

SEEDS = (0, 1, 2)

AUTHORS = Goldfish(k=4, context=13, hash="reference", window="inclusive", boundary="straddle")
"""The mask of the published code, at the paper's k and h."""
APERTUS = Goldfish(k=50, context=50, hash="apertus", window="inclusive", boundary="straddle")
"""The mask of Apertus 8B and 70B, which were trained on 15 T tokens."""


def APERTUS_2(exempt: tuple[int, ...]) -> Goldfish:  # noqa: N802 - beside APERTUS
    """The mask of the second generation of Apertus; `exempt` are its special ids."""
    return Goldfish(
        k=50,
        context=50,
        hash="apertus2",
        window="inclusive",
        boundary="straddle",
        exempt=exempt,
    )


def mask(arm: Arm) -> TargetMask:
    """The loss's mask; none for plain loss."""
    return KeepAll() if arm == "plain" else goldfish(arm)


def goldfish(arm: Literal["k2", "k4", "k8", "k32", "random"]) -> Goldfish:
    """The paper's h of 13, by the paper's formula, at the arm's k."""
    if arm == "random":
        return Goldfish(k=4, context=13, hash="random")
    return one_in(k=int(arm[1:]))


def one_in(*, k: int, exempt: tuple[int, ...] = ()) -> Goldfish:
    """The paper's h of 13, by the paper's formula: the mask that this package announces to others."""
    return Goldfish(k=k, context=13, exempt=exempt)


@formerly("goldfish/Attacked")
@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """A training run and the attack on what it memorised."""

    run: Run
    buckets: Buckets
    """The run's data."""
    suffix: int
    """Tokens to be recited; the rest of a passage is the prompt."""
    beams: int
    """Beams of the adaptive attack; 1 leaves it out."""


def verbatim_smoke(arm: Arm, seed: int) -> Attack:
    """Repeated Wikipedia passages in miniature: 0.5 M parameters, 16 passages of 65 tokens, 40 times.

    The paper's extreme setting (section 4.1: Llama-2-7B, 100 documents, 100 epochs) becomes one pass over
    48 background rows with 16 passages repeated 40 times among them; as many passages are a control.
    """
    buckets = Buckets(
        corpus=Wikipedia(),
        tokenizer=BytePairs(vocabulary=1024),
        repetitions=(40, 0),
        passages=16,
        background=48,
        validation_rows=24,
    )
    model = Llama(
        width=128, depth=2, heads=4, kv_heads=4, hidden=352, vocabulary=1024, context=96, tied=True
    )
    batch = 8
    run = Run(
        name=f"{arm}-seed{seed}",
        model=model,
        data=buckets,
        objective=NextToken(mask=mask(arm)),
        optimizer=AdamW(learning_rate=5e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, epsilon=1e-8),
        schedule=Cosine(warmup_steps=8, floor=0.05),
        horizon=Steps(count=buckets.rows // batch),
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
    return Attack(run=run, buckets=buckets, suffix=16, beams=1)


def verbatim_laptop(arm: Arm, seed: int) -> Attack:
    """As `verbatim_smoke`, with 0.8 M parameters, 32 longer passages seen 48 times, and beam search."""
    small = verbatim_smoke(arm, seed)
    buckets = replace(small.buckets, passages=32, repetitions=(48, 0), background=128)
    model = Llama(
        width=160,
        depth=2,
        heads=4,
        kv_heads=4,
        hidden=448,
        vocabulary=1024,
        context=128,
        tied=True,
    )
    run = replace(
        small.run,
        model=model,
        data=buckets,
        horizon=Steps(count=buckets.rows // small.run.batch),
        sequence=96,
        optimizer=AdamW(learning_rate=4e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, epsilon=1e-8),
        checkpoint_every=150,
    )
    return replace(small, run=run, buckets=buckets, suffix=24, beams=30 if arm == "k4" else 1)


def verbatim(arm: Arm, seed: int, scale: Scale) -> Attack:
    """The memorisation run of a scale.

    Raises:
        ValueError: for a scale that has none.
    """
    match scale:
        case "smoke":
            return verbatim_smoke(arm, seed)
        case "laptop":
            return verbatim_laptop(arm, seed)
        case "paper":
            raise ValueError(f"scale={scale!r} has no memorisation run; use smoke or laptop")


Size = Literal["w48", "w64", "w96", "w128", "w192"]
"""A model of the bucket study by its width; two blocks each."""

SIZES: tuple[Size, ...] = ("w48", "w64", "w96", "w128", "w192")
REPETITIONS = (0, 1, 4, 6, 16, 24, 36, 64)
"""The study's buckets (a control, 1, 4 and 6 passes), and what models this small need."""


def bucket_study(size: Size, arm: Arm, seed: int) -> Attack:
    """The AxoNN study in miniature: eight buckets of 8 pages, five sizes from 0.1 to 1.1 M parameters.

    Its models have 1 B to 405 B parameters and see buckets of 200 pages of 2,048 tokens 1, 4 and 6 times;
    it asks for the last 50 tokens and trains with goldfish loss at k=2, h=13.
    """
    small = verbatim_smoke(arm, seed)
    width = int(size[1:])
    buckets = replace(small.buckets, repetitions=REPETITIONS, passages=8, background=72)
    model = Llama(
        width=width,
        depth=2,
        heads=4,
        kv_heads=4,
        hidden=width * 11 // 4,
        vocabulary=1024,
        context=96,
        tied=True,
    )
    run = replace(
        small.run,
        name=f"buckets-{size}-{arm}-seed{seed}",
        model=model,
        data=buckets,
        horizon=Steps(count=buckets.rows // small.run.batch),
        checkpoint_every=100,
    )
    return replace(small, run=run, buckets=buckets)


@dataclass(frozen=True, slots=True, kw_only=True)
class LastBlocks:
    """SmolLM2 with only its last blocks trained: a third of the memory and half of the time."""

    trained: int
    """Blocks that learn, of 30; embedding and head are one tensor and stay."""

    def build(self, *, seed: int) -> PreTrainedModel:
        """The published weights, the first blocks frozen.

        Raises:
            ValueError: for more blocks than there are.
        """
        model: Any = SmolLM2().build(seed=seed)
        blocks = model.model.layers
        if not 0 < self.trained <= len(blocks):
            raise ValueError(
                f"trained={self.trained} of {len(blocks)} blocks; use 1 to {len(blocks)}"
            )
        model.requires_grad_(False)
        for block in blocks[-self.trained :]:
            block.requires_grad_(True)
        return model

    def materials(self) -> tuple[Material, ...]:
        """Those of the model."""
        return SmolLM2().materials()


def finetuned(arm: Arm, seed: int) -> Attack:
    """SmolLM2-135M fine-tuned on 6 Wikipedia passages of 65 tokens until it recites them, or does not.

    The last 10 of its 30 blocks learn. Each seed has passages of its own, since nothing else would differ.
    """
    small = verbatim_smoke(arm, seed)
    buckets = Buckets(
        corpus=Wikipedia(),
        tokenizer=SmolLM2Tokenizer(),
        repetitions=(8, 0),
        passages=6,
        background=0,
        validation_rows=6,
        skipped_articles=12 * seed,
    )
    run = replace(
        small.run,
        name=f"smollm2-{arm}-seed{seed}",
        model=LastBlocks(trained=10),
        data=buckets,
        optimizer=AdamW(learning_rate=1e-3, weight_decay=0.0, beta1=0.9, beta2=0.95, epsilon=1e-8),
        schedule=Constant(warmup_steps=1),
        horizon=Steps(count=8),
        batch=6,
        microbatch=6,
        sequence=64,
    )
    return Attack(run=run, buckets=buckets, suffix=24, beams=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervision:
    """Plain or goldfish loss in one pass over fresh text, for the cost of leaving targets out."""

    run: Run


def single_pass(arm: Arm, batch: int, seed: int) -> Supervision:
    """96 steps of `batch` rows of Wikipedia text without repetition.

    Goldfish at k=2 with batches of 16 supervises as many targets a step as plain loss with batches of 8,
    as the paper's runs of equal supervision do with a larger batch. Short windows decide the first targets
    of a row, which would all be supervised else.
    """
    small = verbatim_smoke(arm, seed)
    left_out = KeepAll() if arm == "plain" else replace(goldfish(arm), boundary="prefix")
    data = replace(small.buckets, repetitions=(0,), passages=1, background=1536, validation_rows=96)
    run = replace(
        small.run,
        name=f"onepass-{arm}-{batch}-seed{seed}",
        data=data,
        objective=NextToken(mask=left_out),
        batch=batch,
        microbatch=batch,
        horizon=Steps(count=96),
    )
    return Supervision(run=run)


ONE_PASS: tuple[tuple[Arm, int], ...] = (("plain", 16), ("plain", 8), ("k2", 16))
"""The runs that the cost of goldfish is judged from: a loss and its batch."""
ONE_PASS_SEEDS = (3, 4, 5)
"""Fresh ones: with seeds 0 to 2 goldfish supervised a fifth more than plain loss, by whole windows alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NearDuplicates:
    """Texts, their altered copies, and two masks at k = 4: the published one, and one of characters."""

    corpus: Corpus
    tokenizer: Tokenizer
    pieces: int
    """Documents, each cut after `length` characters; shorter ones are left out."""
    length: int
    columns: int
    """Lines are wrapped after so many characters, as in plain-text files."""
    characters: int
    """Canonical characters that the second mask hashes."""


def near_duplicates() -> NearDuplicates:
    """60 Wikipedia articles' first 3,000 characters, wrapped at 72 columns, in SmolLM2's tokens."""
    return NearDuplicates(
        corpus=Wikipedia(),
        tokenizer=SmolLM2Tokenizer(),
        pieces=60,
        length=3000,
        columns=72,
        characters=24,
    )
