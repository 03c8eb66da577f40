"""The runs of this package: functions that return complete, frozen values."""

from dataclasses import dataclass
from typing import Literal

from fourfold_outliers.reproduce.language import Bigrams, GivenFrequencies, Law
from fourfold_parallel.reproduce.scale import Scale
from fourfold_parallel.run.corpora import Corpus, PythonManual, Wikipedia
from fourfold_parallel.run.engines import Single
from fourfold_parallel.run.models import Llama, Packaged, SmolLM2
from fourfold_parallel.run.objective import KeepAll, NextToken
from fourfold_parallel.run.optimizer import AdamW, Constant
from fourfold_parallel.run.recipe import Run, Steps
from fourfold_parallel.run.tokenizers import SmolLM2Tokenizer, Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Documents of a corpus: the first ones long enough behind `skip`, or a sample of all such."""

    corpus: Corpus
    skip: int
    """Documents at the beginning that nothing is read from."""
    sampled: bool
    """Draw them from the whole corpus, where it is sorted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The text of a study: the first tokens of some documents of each source."""

    sources: tuple[Source, ...]
    tokenizer: Tokenizer
    documents: int
    """Of each source."""
    tokens: int
    """Of each document, from its beginning."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Outliers by each definition, and anisotropy with and without them."""

    name: str
    model: Packaged
    reading: Reading
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Frequencies:
    """The link of the outliers, and of other coordinates, to token frequency."""

    name: str
    model: Packaged
    reading: Reading
    others: int
    """Coordinates, drawn, that the outliers are compared with."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Disabling:
    """Loss, predictions and attention with the outliers disabled, and with others."""

    name: str
    model: Packaged
    reading: Reading
    random: int
    """Sets of random coordinates, as many in each as there are outliers."""
    matched: int
    """Sets of coordinates whose gains are of like size."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ByLayer:
    """Loss with the outliers disabled in the norms of one layer at a time."""

    name: str
    model: Packaged
    reading: Reading
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Turning:
    """The same model in a random basis of its residual stream."""

    name: str
    model: Packaged
    reading: Reading
    seed: int = 0


Arm = Literal["zipf", "flat", "given"]
"""A language's law; or Zipf's for a model that is given the frequencies."""
ARMS: tuple[Arm, ...] = ("zipf", "flat", "given")
SEEDS = (0, 1, 2)
"""The recipe was piloted with another one, 100."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speaking:
    """A small model trained on a bigram language, watched for outliers."""

    arm: Arm
    run: Run


def reading(scale: Scale) -> Reading:
    """Wikipedia articles behind the first ten, and a sample of the CPython manual.

    Laptop: 20 of each, 128 tokens of each. The first articles were read in a pilot.
    """
    is_smoke = scale == "smoke"
    return Reading(
        sources=(
            Source(corpus=Wikipedia(), skip=10, sampled=False),
            Source(corpus=PythonManual(), skip=0, sampled=True),
        ),
        tokenizer=SmolLM2Tokenizer(),
        documents=2 if is_smoke else 20,
        tokens=32 if is_smoke else 128,
    )


def geometry(scale: Scale) -> Geometry:
    """SmolLM2's residual stream."""
    return Geometry(name="geometry", model=SmolLM2(), reading=reading(scale))


def frequencies(scale: Scale) -> Frequencies:
    """The outliers beside 128 other coordinates (16 at smoke scale)."""
    return Frequencies(
        name="frequency",
        model=SmolLM2(),
        reading=reading(scale),
        others=16 if scale == "smoke" else 128,
    )


def disabling(scale: Scale) -> Disabling:
    """20 random sets and 10 of like gains (2 and 1 at smoke scale)."""
    is_smoke = scale == "smoke"
    return Disabling(
        name="disabling",
        model=SmolLM2(),
        reading=reading(scale),
        random=2 if is_smoke else 20,
        matched=1 if is_smoke else 10,
    )


def by_layer(scale: Scale) -> ByLayer:
    """All layers, one at a time."""
    return ByLayer(name="by-layer", model=SmolLM2(), reading=reading(scale))


def turning(scale: Scale) -> Turning:
    """One rotation."""
    return Turning(name="rotation", model=SmolLM2(), reading=reading(scale))


VOCABULARY, ENTROPY_NATS, SEQUENCE, BATCH = 512, 3.0, 64, 16


def speaking(arm: Arm, seed: int, scale: Scale) -> Speaking:
    """A Llama of 0.7 M parameters on 400 steps of 16 rows of 64 tokens, never the same row twice.

    512 ids; a token after its predecessor has 3 nats under either law, Zipf's tokens 4.76 each and flat ones
    6.24. The rate of 0.01 is high for the size: at 0.003 no coordinate became an outlier in 800 steps of a
    pilot under Zipf's law.
    """
    steps = 12 if scale == "smoke" else 400
    law: Law = "flat" if arm == "flat" else "zipf"
    llama = Llama(
        width=128,
        depth=3,
        heads=4,
        kv_heads=4,
        hidden=336,
        vocabulary=VOCABULARY,
        context=SEQUENCE,
        tied=True,
    )
    run = Run(
        name=f"language-{arm}-seed{seed}",
        model=GivenFrequencies(llama=llama, law=law) if arm == "given" else llama,
        data=Bigrams(
            law=law,
            vocabulary=VOCABULARY,
            entropy_nats=ENTROPY_NATS,
            rows=BATCH * steps,
            validation_rows=4 * BATCH,
            seed=seed,
        ),
        objective=NextToken(mask=KeepAll()),
        optimizer=AdamW(learning_rate=1e-2, weight_decay=0.0, beta1=0.9, beta2=0.95, epsilon=1e-8),
        schedule=Constant(warmup_steps=50),
        horizon=Steps(count=steps),
        batch=BATCH,
        microbatch=BATCH,
        sequence=SEQUENCE,
        max_grad_norm=1.0,
        precision="fp32",
        engine=Single(),
        seed=seed,
        validate_every=6 if scale == "smoke" else 20,
        checkpoint_every=steps,
    )
    return Speaking(arm=arm, run=run)
