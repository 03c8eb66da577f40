"""The runs of this package: functions that return complete, frozen values."""

from dataclasses import dataclass, replace
from typing import Literal, assert_never

from fourfold_loki.basis import Kind
from fourfold_loki.budget import Budget, Count, Error, Share
from fourfold_loki.moments import RotaryStage
from fourfold_loki.selectors import H2O, Exact, Quest, Random, SparQ, Streaming
from fourfold_parallel.reproduce.scale import Scale
from fourfold_parallel.run.corpora import Corpus, PythonManual, Wikipedia
from fourfold_parallel.run.models import Gemma3, Packaged, SmolLM2


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A pass over the beginning of a corpus."""

    model: Packaged
    corpus: Corpus
    tokens: int
    context: int
    """Tokens a window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ByBasis:
    """Loki, in a basis fitted to a calibration."""

    kind: Kind
    stage: RotaryStage
    calibration: Calibration
    width: int
    """Coordinates that rank, in every layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ByCodes:
    """Loki with an index that bounds scores: codes of the coordinates that do not rank, and a norm."""

    basis: ByBasis
    bits: int
    """Of a coordinate; at 0 the norm alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ByLabelChannels:
    """Double Sparsity, with channels chosen on a calibration."""

    channels: int
    calibration: Calibration


@dataclass(frozen=True, slots=True, kw_only=True)
class ByApproximateScores:
    """PCAAttn: the leading coordinates of the published basis weigh all values."""

    calibration: Calibration
    width: int


Ranking = (
    ByBasis
    | ByCodes
    | ByApproximateScores
    | ByLabelChannels
    | Exact
    | SparQ
    | Quest
    | H2O
    | Streaming
    | Random
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A selector under a budget, with the name it has in records and figures."""

    name: str
    ranking: Ranking
    budget: Budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Directions that keys need, on each corpus, and how well bases carry over."""

    name: str
    calibrations: tuple[Calibration, ...]
    share: float
    """Of the variance (the paper's rank at 90 %)."""
    widths: tuple[int, ...]
    """At which bases are compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """Arms against full attention on a text that no calibration has seen."""

    name: str
    model: Packaged
    corpus: Corpus
    skip_tokens: int
    """At least as many, in whole documents at the beginning of the corpus, are left to calibration."""
    context: int
    """Tokens a window."""
    prompt: int
    """Dense tokens at the beginning of each window; the others are scored."""
    windows: int
    batch: int
    """Windows that are scored together: one larger matrix for the weights."""
    protocol: Literal["decode", "every query"]
    arms: tuple[Arm, ...]

    @property
    def scored(self) -> int:
        """Tokens that every arm is scored on."""
        return self.windows * (self.context - self.prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnoses:
    """The doctor's look at one window."""

    name: str
    model: Packaged
    corpus: Corpus
    skip_tokens: int
    context: int
    queries: int
    arms: tuple[Arm, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Passkeys:
    """Numbers hidden in a text, at several depths."""

    name: str
    model: Packaged
    corpus: Corpus
    skip_tokens: int
    context: int
    depths: tuple[float, ...]
    keys: tuple[int, ...]
    arms: tuple[Arm, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Windows of one length, and how many of their last queries are looked at."""

    context: int
    windows: int
    queries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificates:
    """The reads that a bound on the error of a layer's output takes."""

    name: str
    model: Packaged
    corpus: Corpus
    skip_tokens: int
    samples: tuple[Sample, ...]
    arms: tuple[Arm, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FairTable:
    """Every method at equal bytes read (evaluate/table.py)."""

    name: str
    calibration: Calibration
    """Of bases, label channels and signatures."""
    lessons: int
    """Steps of HashAttention's networks in each of its windows and layers."""
    probe_tokens: int
    """Tokens before the texts on which settings are chosen."""
    chosen_at: Sample
    """On windows of this length, offers of index sizes are compared."""
    skip_tokens: int
    """Tokens before the windows that are scored."""
    samples: tuple[Sample, ...]
    shares: tuple[float, ...]
    """Of the bytes that dense attention reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """Attention of one decoded token, timed on this CPU in float32."""

    name: str
    heads: int
    kv_heads: int
    head_width: int
    lengths: tuple[int, ...]
    share: float
    """Of the keys."""
    page: int
    divisor: int
    """Head width over the coordinates that rank."""
    seconds: float
    """For each length; contenders take turns until then."""


WIDTH = 16
"""d_f = 1/4 of SmolLM2's heads of 64."""
SKIP = 200_000
"""Tokens at the beginning of a corpus that no window comes from; calibrations take the first 8,192."""
SMOKE_ARMS = (
    "exact",
    "loki-pca",
    "loki-balanced",
    "loki-balanced-shared",
)


def calibration(scale: Scale, corpus: Corpus | None = None) -> Calibration:
    """The beginning of the Wikipedia articles, or of another corpus, at the length of use."""
    corpus = Wikipedia() if corpus is None else corpus
    match scale:
        case "smoke":
            return Calibration(model=SmolLM2(), corpus=corpus, tokens=2048, context=512)
        case "laptop":
            return Calibration(model=SmolLM2(), corpus=corpus, tokens=8192, context=512)
        case "paper":
            raise ValueError(f"scale={scale!r} has no calibration; use smoke or laptop")
        case _:
            assert_never(scale)


def loki_arm(
    name: str,
    kind: Kind,
    fitted: Calibration,
    *,
    keys: int,
    width: int = WIDTH,
    stage: RotaryStage = "after rotary",
    sinks: int = 0,
    window: int = 0,
    page: int = 1,
    is_shared: bool = False,
) -> Arm:
    """Loki with `keys` keys a query; per query head, as in the paper, unless shared."""
    return Arm(
        name=name,
        ranking=ByBasis(kind=kind, stage=stage, calibration=fitted, width=width),
        budget=Budget(
            amount=Count(keys=keys),
            sinks=sinks,
            window=window,
            page=page,
            selection="shared in groups" if is_shared else "per head",
        ),
    )


def other_arm(name: str, ranking: Ranking, *, keys: int, page: int = 1) -> Arm:
    """A baseline with `keys` keys a query, per query head."""
    budget = Budget(amount=Count(keys=keys), page=page, selection="per head")
    return Arm(name=name, ranking=ranking, budget=budget)


def bases(fitted: Calibration, *, keys: int) -> tuple[Arm, ...]:
    """The published recipe, what repairs it, and better bases: all at k_f = d_f = 1/4."""
    return (
        loki_arm("loki-pca", "pca", fitted, keys=keys),
        loki_arm("loki-pca-uncentred", "pca_uncentred", fitted, keys=keys),
        loki_arm("loki-balanced", "balanced", fitted, keys=keys),
        loki_arm("loki-balanced-shared", "balanced", fitted, keys=keys, is_shared=True),
    )


def baselines(fitted: Calibration, *, keys: int) -> tuple[Arm, ...]:
    """Every other selector of the catalogue with the same number of keys and of coordinates."""
    labels = ByLabelChannels(channels=WIDTH, calibration=fitted)
    return (
        other_arm("exact", Exact(), keys=keys),
        other_arm("sparq", SparQ(channels=WIDTH), keys=keys),
        other_arm("double-sparsity", labels, keys=keys),
        other_arm("quest", Quest(page=16), keys=keys, page=16),
        other_arm("h2o", H2O(), keys=keys),
        other_arm("streaming", Streaming(sinks=4), keys=keys),
        other_arm("random", Random(seed=0), keys=keys),
    )


def variants(fitted: Calibration, foreign: Calibration, *, keys: int) -> tuple[Arm, ...]:
    """Repairs of the published basis, fewer coordinates, another corpus."""
    return (
        loki_arm("loki-pca-sinks", "pca", fitted, keys=keys, sinks=4, window=32),
        loki_arm("loki-pca-before", "pca", fitted, keys=keys, stage="before rotary"),
        loki_arm(
            "loki-pca-before-sinks",
            "pca",
            fitted,
            keys=keys,
            stage="before rotary",
            sinks=4,
            window=32,
        ),
        loki_arm("loki-pca-sinks-foreign", "pca", foreign, keys=keys, sinks=4, window=32),
        loki_arm("loki-balanced-foreign", "balanced", foreign, keys=keys),
        loki_arm("loki-balanced-eighth", "balanced", fitted, keys=keys, width=WIDTH // 2),
        loki_arm("loki-balanced-pages", "balanced", fitted, keys=keys, page=16, is_shared=True),
        Arm(
            name="pca-attention-half",
            ranking=ByApproximateScores(calibration=fitted, width=2 * WIDTH),
            budget=Budget(amount=Share(of_visible=1.0), selection="per head"),
        ),
    )


def ranks(scale: Scale) -> Ranks:
    """Rank at 90 % by layer and head, before and after rotary, on two corpora (one at smoke scale)."""
    corpora = (Wikipedia(),) if scale == "smoke" else (Wikipedia(), PythonManual())
    return Ranks(
        name="ranks",
        calibrations=tuple(calibration(scale, corpus) for corpus in corpora),
        share=0.9,
        widths=(8, 16, 32),
    )


def perplexity(scale: Scale) -> Perplexity:
    """Every selector on Wikipedia articles behind the calibration's: dense prompt, sparse rest.

    A query sees 384 to 511 keys and keeps 128 of them, k_f = 1/4 of the window; laptop: 8,192 tokens scored.
    """
    fitted, context = calibration(scale), 512
    keys = context // 4
    arms = (*bases(fitted, keys=keys), *baselines(fitted, keys=keys))
    if scale == "smoke":
        arms = tuple(arm for arm in arms if arm.name in SMOKE_ARMS)
    return Perplexity(
        name="perplexity",
        model=SmolLM2(),
        corpus=Wikipedia(),
        skip_tokens=SKIP,
        context=context,
        prompt=3 * context // 4,
        windows=3 if scale == "smoke" else 64,
        batch=3 if scale == "smoke" else 4,
        protocol="decode",
        arms=arms,
    )


def more_perplexity(scale: Scale) -> Perplexity:
    """Variants of Loki, and PCAAttn, on the first windows of `perplexity`."""
    base = perplexity(scale)
    foreign = calibration(scale, PythonManual())
    arms = variants(calibration(scale), foreign, keys=base.context // 4)
    return replace(base, name="variants", windows=8, arms=arms)


LONG_SKIP = 240_000
"""Tokens before the windows of `long_context`: behind all those of `perplexity`."""


def long_context(scale: Scale) -> Perplexity:
    """Windows four times as long, of text of their own: 1,536 dense tokens and 512 sparse queries each.

    A query keeps 512 of 1,536 to 2,047 keys, k_f = 1/4 of the window; 8,192 tokens are scored.
    """
    context = 2048
    fitted = replace(calibration(scale), context=context)
    keys = context // 4
    others = {"exact", "h2o", "streaming"}
    return replace(
        perplexity(scale),
        name="long-context",
        skip_tokens=LONG_SKIP,
        context=context,
        prompt=3 * context // 4,
        windows=16,
        batch=1,
        arms=(
            *bases(fitted, keys=keys),
            *(arm for arm in baselines(fitted, keys=keys) if arm.name in others),
        ),
    )


def second_family(scale: Scale) -> Perplexity:
    """`perplexity` of Gemma 3, whose queries and keys are normalised by head: the bases, and keys alone.

    A query keeps 128 of 384 to 511 keys and ranks by 64 of 256 coordinates; 2,048 tokens are scored. Its
    sliding layers, 15 of 18, stay dense.
    """
    model = Gemma3()
    fitted, base = replace(calibration(scale), model=model), perplexity(scale)
    keys, width = base.context // 4, 64
    arms = (
        loki_arm("loki-pca", "pca", fitted, keys=keys, width=width),
        loki_arm("loki-pca-uncentred", "pca_uncentred", fitted, keys=keys, width=width),
        loki_arm("loki-balanced", "balanced", fitted, keys=keys, width=width),
        other_arm("exact", Exact(), keys=keys),
        other_arm("streaming", Streaming(sinks=4), keys=keys),
        other_arm("latest", Streaming(sinks=0), keys=keys),
    )
    return replace(base, name="second-family", model=model, windows=16, batch=1, arms=arms)


BUDGETS = (8, 2)
"""Keys of a window over the keys that are kept; a quarter is `perplexity`."""


def budgets(scale: Scale) -> Perplexity:
    """Every selector at an eighth and half of the keys, on the first windows of `perplexity`."""
    base, fitted = perplexity(scale), calibration(scale)
    arms = [
        replace(arm, name=f"{arm.name}:{divisor}")
        for divisor in BUDGETS
        for keys in (base.context // divisor,)
        for arm in (*bases(fitted, keys=keys), *baselines(fitted, keys=keys))
    ]
    return replace(base, name="budgets", windows=4, arms=tuple(arms))


def published_protocol(scale: Scale) -> Perplexity:
    """The published measurement: every query of the window is masked, prompt included."""
    base = perplexity(scale)
    names = {"exact", "loki-pca", "loki-balanced"}
    return replace(
        base,
        name="published-protocol",
        prompt=2,
        windows=2,
        batch=2,
        protocol="every query",
        arms=tuple(arm for arm in base.arms if arm.name in names),
    )


def diagnoses(scale: Scale) -> Diagnoses:
    """Recall, mass and sinks by layer, on the first window."""
    base = perplexity(scale)
    arms = base.arms if scale == "smoke" else (*base.arms, *more_perplexity(scale).arms)
    return Diagnoses(
        name="diagnoses",
        model=base.model,
        corpus=base.corpus,
        skip_tokens=base.skip_tokens,
        context=base.context,
        queries=128,
        arms=tuple(arm for arm in arms if not isinstance(arm.ranking, H2O | ByApproximateScores)),
    )


def passkeys(scale: Scale) -> Passkeys:
    """Every selector of `perplexity` on passkeys, with a quarter of the keys."""
    fitted, context = calibration(scale), 1024
    return Passkeys(
        name="passkeys",
        model=SmolLM2(),
        corpus=Wikipedia(),
        skip_tokens=SKIP,
        context=context,
        depths=(0.0, 0.25, 0.5, 0.75, 1.0),
        keys=(71432, 50986),
        arms=(*bases(fitted, keys=context // 4), *baselines(fitted, keys=context // 4)),
    )


def decoding(scale: Scale) -> Decoding:
    """SmolLM2's heads."""
    return Decoding(
        name="decoding",
        heads=9,
        kv_heads=3,
        head_width=64,
        lengths=(2048, 4096, 8192) if scale == "smoke" else (2048, 4096, 8192, 16384),
        share=0.25,
        page=16,
        divisor=4,
        seconds=2.0,
    )


ERRORS = (1e-3, 1e-2, 1e-1)
CERTIFICATE_SKIP = 280_000
"""Tokens before the windows of `certificates`: behind all those of `long_context`."""


def certificates(scale: Scale) -> Certificates:
    """Three errors, asked of four indices and of one who knows every score.

    The model was trained on 8,192 positions; at 16,384 it is beyond them.
    """
    fitted = replace(calibration(scale), context=2048)

    def loki(width: int, bits: int) -> ByCodes:
        ranked = ByBasis(kind="balanced", stage="after rotary", calibration=fitted, width=width)
        return ByCodes(basis=ranked, bits=bits)

    rankings: dict[str, Ranking] = {
        "exact": Exact(),
        "loki-norm": loki(WIDTH, 0),
        "loki-codes": loki(WIDTH, 4),
        "loki-bytes": loki(8, 8),
        "quest": Quest(page=16),
    }
    smoke = (Sample(context=512, windows=1, queries=4),)
    laptop = (
        Sample(context=512, windows=8, queries=8),
        Sample(context=2048, windows=4, queries=8),
        Sample(context=8192, windows=2, queries=4),
        Sample(context=16384, windows=1, queries=4),
    )
    return Certificates(
        name="certificates",
        model=SmolLM2(),
        corpus=Wikipedia(),
        skip_tokens=CERTIFICATE_SKIP,
        samples=smoke if scale == "smoke" else laptop,
        arms=tuple(
            Arm(
                name=f"{name}:{error:g}",
                ranking=ranking,
                budget=Budget(amount=Error(of_output=error)),
            )
            for error in ERRORS
            for name, ranking in rankings.items()
        ),
    )


TABLE_PROBES, TABLE_SKIP = 210_000, 330_000
"""Tokens before the texts that settings are chosen on, and before the windows: behind all other stages'."""


def fair_table(scale: Scale) -> FairTable:
    """An eighth and a quarter of the bytes, and five eighths, where those that read all keys take part."""
    return FairTable(
        name="fair-table",
        calibration=replace(calibration(scale), context=2048),
        lessons=20,
        probe_tokens=TABLE_PROBES,
        chosen_at=Sample(context=1024, windows=1, queries=32),
        skip_tokens=TABLE_SKIP,
        samples=(
            Sample(context=512, windows=12, queries=64),
            Sample(context=2048, windows=8, queries=64),
            Sample(context=4096, windows=3, queries=32),
        ),
        shares=(1 / 8, 1 / 4, 5 / 8),
    )
