"""The paper's claims and ours, each above the function that judges it from our records.

Numbers of the paper's tables are quoted only where its abstract, captions or text could be read; the others
are named, not quoted.
"""

import math
import sys

from fourfold_loki.reproduce.measures import (
    AFTER,
    BEFORE,
    FULL,
    WIKIPEDIA,
    added_nats,
    added_percent,
    captured,
    certified,
    certified_share,
    competed,
    diagnosed,
    fair_arms,
    mean_share,
    nearer,
    rank_events,
    rank_shares,
    retrieved,
    tokens_scored,
)
from fourfold_parallel.reproduce.claims import (
    Finding,
    Interval,
    Records,
    Rule,
    beyond_us,
    claim,
    claims_of,
    decide,
    over_seeds,
)

_MODEL = "SmolLM2-135M (4-bit weights), 9 query and 3 key/value heads of 64; Wikipedia, windows of 512 tokens"
_LONG = (
    "SmolLM2-135M (4-bit weights); 16 other windows of Wikipedia, of 2,048 tokens; the last 512 are sparse "
    "and keep 512 keys"
)
_GEMMA = (
    "Gemma-3-270M (4-bit weights), 4 query heads of 256 on one key/value head, both normalised; the 3 of 18 "
    "layers that do not slide; Wikipedia, 16 windows of 512 tokens; the last 128 are sparse and keep 128 "
    "keys; rules after two windows were seen"
)
_FAR = "a model that is above chance on these tasks (1 B parameters and more), a GPU"
_NOT_IN_PAPER = "not in the paper"


@claim(
    "C1",
    section="3, figure 1",
    says="Keys are low-rank: few principal directions hold 90 % of their variance",
    paper="about 80 of 128, mean over layers and heads, six model families",
    conditions=_MODEL,
    rule="reproduced if the interval over layers of rank at 90 % over head width (after rotary) lies below "
    "0.75; contradicted if above 0.9",
    scales=("smoke", "laptop"),
    needs="the model",
)
def low_rank(records: Records) -> Finding:
    """Directions for 90 % of the variance, over the head width."""
    record = records["ranks"]
    share = over_seeds(rank_shares(record, AFTER))
    event = rank_events(record, AFTER)[0]
    width = int(event.number("head_width"))
    return Finding(
        decide(reproduced=share.high < 0.75, contradicted=share.low > 0.9),
        f"{share.value * width:.1f} of {width} (share {share})",
        event,
        "interval over layers of rank at 90 % over head width, against 0.75 and 0.9",
    )


@claim(
    "C2",
    section="3, figure 2",
    says="The first layers need fewest directions",
    paper="curves by layer",
    conditions=_MODEL,
    rule="reproduced if the first layer's rank before rotary lies below the interval of the other layers; "
    "contradicted if above",
    scales=("smoke", "laptop"),
    needs="the model",
)
def first_layers(records: Records) -> Finding:
    """The first layer against the others."""
    record = records["ranks"]
    first, *others = rank_shares(record, BEFORE)
    rest = over_seeds(others)
    return Finding(
        decide(reproduced=first < rest.low, contradicted=first > rest.high),
        f"{first:.3g} of the head width in the first layer, {rest} in the others (before rotary)",
        rank_events(record, BEFORE)[0],
        "the first layer against the interval of the others",
    )


@claim(
    "C3",
    section="3",
    says="Keys have lower rank before the rotary embedding than after",
    paper="bars by model",
    conditions=_MODEL,
    rule="reproduced if the interval over layers of the difference lies below 0; contradicted if above",
    scales=("smoke", "laptop"),
    needs="the model",
)
def before_is_lower(records: Records) -> Finding:
    """Rank before rotary less rank after it, layer by layer."""
    record = records["ranks"]
    pairs = zip(rank_shares(record, BEFORE), rank_shares(record, AFTER), strict=True)
    gap = over_seeds([before - after for before, after in pairs])
    return Finding(
        decide(reproduced=gap.high < 0, contradicted=gap.low > 0),
        f"{gap} of the head width, before less after",
        rank_events(record, BEFORE)[0],
        "interval over layers of the difference, against 0",
    )


@claim(
    "C4",
    section="3",
    says="Directions carry over between corpora",
    paper="overlapping curves for three corpora",
    conditions=_MODEL + ", and CPython's manual",
    rule="reproduced if, with 16 directions fitted on the other corpus, the interval over layers of the "
    "relative loss of captured variance lies below 0.05; contradicted if above 0.1",
    scales=("laptop",),
    needs="the laptop scale, which calibrates on two corpora",
)
def transfers(records: Records) -> Finding:
    """Variance that another corpus's directions lose, layer by layer."""
    record = records["ranks"]
    [foreign] = {str(event.values["corpus"]) for event in record.of("rank")} - {WIKIPEDIA}
    pairs = zip(captured(record, foreign), captured(record, WIKIPEDIA), strict=True)
    lost = over_seeds([1 - theirs / mine for theirs, mine in pairs])
    return Finding(
        decide(reproduced=lost.high < 0.05, contradicted=lost.low > 0.1),
        f"{lost} of the captured variance is lost with 16 of 64 directions from {foreign}",
        record.of("transfer")[0],
        "interval over layers of the relative loss, against 0.05 and 0.1",
    )


def costs(arm: str, *, at_most: float, stage: str = "perplexity") -> Rule:
    """Reproduced if the interval of added perplexity lies below `at_most` percent."""

    def rule(records: Records) -> Finding:
        record = records[stage]
        cost = added_percent(record, arm)
        return Finding(
            decide(reproduced=cost.high < at_most, contradicted=cost.low > at_most),
            f"+{cost} % perplexity on {tokens_scored(record)} tokens",
            record.of("scored", arm=arm)[0],
            f"interval over windows against {at_most} % and {at_most} %",
        )

    return rule


def beats_eviction(arm: str, besides: str, *, stage: str = "perplexity") -> Rule:
    """Loss of a token under an arm less that under H2O, and beside it under another arm."""

    def rule(records: Records) -> Finding:
        record = records[stage]
        gap = added_nats(record, arm, "h2o")
        other = added_nats(record, besides, "h2o")
        return Finding(
            decide(reproduced=gap.high < 0, contradicted=gap.low > 0),
            f"{gap} nats a token more than H2O ({arm}); {other} ({besides})",
            record.of("scored", arm=arm)[0],
            "interval over windows of the difference to H2O, against 0",
        )

    return rule


def published_basis_fails(stage: str) -> Rule:
    """The cost of the published basis."""

    def rule(records: Records) -> Finding:
        record = records[stage]
        cost, exact = added_percent(record, "loki-pca"), added_percent(record, "exact")
        return Finding(
            decide(reproduced=cost.low > 20, contradicted=cost.high < 20),
            f"+{cost} % perplexity; exact top-k +{exact} %",
            record.of("scored", arm="loki-pca")[0],
            "interval over windows against 20 %",
        )

    return rule


C5 = claim(
    "C5",
    section="5, table 2",
    says="Perplexity stays near full attention's at a quarter of keys and coordinates",
    paper="a table (Llama-2, Llama-3, Mistral); its values could not be verified",
    conditions=_MODEL + "; centred PCA as published",
    rule="reproduced if the interval over windows of added perplexity lies below 5 %; contradicted if above "
    "5 %",
    scales=("smoke", "laptop"),
    needs="the model",
)(costs("loki-pca", at_most=5))

C5B = claim(
    "C5b",
    section="5, table 2",
    says="At an equal budget Loki is better than H2O",
    paper="the same table",
    conditions=_MODEL + "; centred PCA as published",
    rule="reproduced if the interval over windows of Loki's loss less H2O's lies below 0; contradicted if "
    "above",
    scales=("laptop",),
    needs="the laptop scale, which runs H2O",
)(beats_eviction("loki-pca", "loki-pca-uncentred"))


@claim(
    "C6",
    section="5, figures 3 and 4",
    says="Which transform is best, before or after rotary, depends on the model",
    paper="bars by model",
    conditions=_MODEL + "; one model",
    rule="reproduced if the two differ: the interval over windows of the difference leaves out 0; otherwise "
    "inconclusive",
    scales=("laptop",),
    needs="the laptop scale, which runs both",
)
def depends(records: Records) -> Finding:
    """Directions fitted before rotary against those after it."""
    record = records["variants"]
    gap = added_nats(record, "loki-pca-before-sinks", "loki-pca-sinks")
    return Finding(
        decide(reproduced=gap.low > 0 or gap.high < 0, contradicted=False),
        f"{gap} nats a token, before less after rotary (with 4 sinks and a window of 32)",
        record.of("scored", arm="loki-pca-before-sinks")[0],
        "whether the interval of the difference leaves out 0; one model cannot contradict",
    )


C7 = beyond_us(
    "C7",
    section="5",
    says="Downstream tasks are nearly unchanged",
    paper="six tasks, eight models; values could not be verified",
    conditions="not run: a model of 135 M parameters is near chance on them",
    rule="no rule at this scale",
    needs=_FAR,
)

C8 = beyond_us(
    "C8",
    section="5, figures 6 and 7",
    says="LongBench scores stay close",
    paper="a trade-off curve",
    conditions="not run",
    rule="no rule at this scale",
    needs=_FAR,
)


@claim(
    "C9",
    section="appendix",
    says="Attending with the approximate scores themselves (PCAAttn) is poor",
    paper="a table",
    conditions=_MODEL + "; half of the coordinates of the published basis",
    rule="reproduced if the interval over windows of added perplexity lies above 20 %; contradicted if "
    "below 5 %",
    scales=("laptop",),
    needs="the laptop scale, which runs it",
)
def poor(records: Records) -> Finding:
    """The cost of attending with the approximate scores."""
    record = records["variants"]
    cost = added_percent(record, "pca-attention-half")
    return Finding(
        decide(reproduced=cost.low > 20, contradicted=cost.high < 5),
        f"+{cost} % perplexity with half of the coordinates, on {tokens_scored(record)} tokens",
        record.of("scored", arm="pca-attention-half")[0],
        "interval over windows against 20 % and 5 %",
    )


@claim(
    "C10",
    section="6",
    says="Attention is up to 45 % faster than the library's own",
    paper="up to 45 % less time than eager attention (Llama-2-13B, prompts near 3,500)",
    conditions="attention of one layer for one token on a CPU, one thread, SmolLM2's heads, float32; a "
    "quarter of the keys in pages of 16; no GPU",
    rule="reproduced if, at the longest context, the interval over rounds of the time saved against the "
    "library's own attention lies above 0; contradicted if below",
    scales=("laptop",),
    needs="the laptop scale, which times a CPU; the paper's number needs a GPU of 80 GB",
)
def saves_time(records: Records) -> Finding:
    """Time of a token's attention, paired within rounds, at the longest context."""
    event = max(records["decoding"].of("decoding"), key=lambda event: event.number("tokens"))

    def saved(against: str) -> Interval:
        # A slow contender is timed in fewer rounds; the others are paired.
        pairs = zip(event.numbers(against), event.numbers("loki_ms"), strict=False)
        return over_seeds([100 * (1 - ours / theirs) for theirs, ours in pairs])

    library, packed = saved("sdpa_ms"), saved("packed_sdpa_ms")
    return Finding(
        decide(reproduced=library.low > 0, contradicted=library.high < 0),
        f"{library} % less time than transformers' sdpa, {packed} % less than sdpa with packed heads, "
        f"on a CPU at {int(event.number('tokens'))} tokens",
        event,
        "interval over rounds of the time saved against the library's own attention, against 0",
    )


@claim(
    "C11",
    section="appendix",
    says="Approximate and exact top-k keys agree well",
    paper="a plot",
    conditions=_MODEL,
    rule="reproduced if the interval over layers of recall at a quarter of keys and coordinates lies above "
    "0.7; contradicted if below",
    scales=("smoke", "laptop"),
    needs="the model",
)
def agrees(records: Records) -> Finding:
    """Keys that approximate and exact ranking have in common."""
    record = records["diagnoses"]
    recall = over_seeds(diagnosed(record, "loki-pca", "recall"))
    mass = over_seeds(diagnosed(record, "loki-pca", "mass_recall"))
    return Finding(
        decide(reproduced=recall.low > 0.7, contradicted=recall.high < 0.7),
        f"{recall} of the exact top-k keys (chance: 0.25), holding {mass} of the attention mass",
        record.of("diagnosis", arm="loki-pca")[0],
        "interval over layers of the recall, against 0.7",
    )


@claim(
    "C12",
    section="4.2",
    says="Loki reads d/(2D) + k_f of what dense attention reads",
    paper="speed-up bound 1/(d_f/2 + k_f): 2.67 at a quarter each",
    conditions=_MODEL + "; selection shared by the query heads of a key/value head",
    rule="reproduced if the counted share is within 10 % of the formula; contradicted otherwise",
    scales=("smoke", "laptop"),
    needs="the model",
)
def predicted_reads(records: Records) -> Finding:
    """Counted reads against the formula."""
    record = records["perplexity"]
    read = mean_share(record, "loki-balanced-shared", "read_share")
    predicted = mean_share(record, "loki-balanced-shared", "kept_share") + 0.25 / 2
    per_head = mean_share(record, "loki-balanced", "read_share")
    is_near = abs(read / predicted - 1) < 0.1
    return Finding(
        decide(reproduced=is_near, contradicted=not is_near),
        f"{read:.3g} of the elements of dense attention, predicted {predicted:.3g}; with selection per "
        f"query head, as published, {per_head:.3g} (three query heads a key/value head)",
        record.of("scored", arm="loki-balanced-shared")[0],
        "counted reads against d_f/2 + k_f, within 10 %",
    )


F1 = claim(
    "F1",
    section="ours",
    says="Centred PCA, as published, drops the attention sink and fails on this model",
    paper=_NOT_IN_PAPER,
    conditions=_MODEL,
    rule="reproduced if the interval over windows of added perplexity lies above 20 %; contradicted if below",
    scales=("smoke", "laptop"),
    needs="the model",
)(published_basis_fails("perplexity"))

F2 = claim(
    "F2",
    section="ours",
    says="A basis that looks at queries too repairs it, without keeping sinks by force",
    paper=_NOT_IN_PAPER,
    conditions=_MODEL + "; balanced basis, per query head",
    rule="reproduced if the interval over windows of added perplexity lies below 1.5 %; contradicted if "
    "above",
    scales=("smoke", "laptop"),
    needs="the model",
)(costs("loki-balanced", at_most=1.5))

F1B = claim(
    "F1b",
    section="ours",
    says="F1 at four times the context",
    paper=_NOT_IN_PAPER,
    conditions=_LONG,
    rule="as F1: reproduced if the interval over windows of added perplexity lies above 20 %; contradicted "
    "if below",
    scales=("laptop",),
    needs="the laptop scale, which runs long windows",
)(published_basis_fails("long-context"))

F2B = claim(
    "F2b",
    section="ours",
    says="F2 at four times the context",
    paper=_NOT_IN_PAPER,
    conditions=_LONG + "; balanced basis, per query head",
    rule="as F2: reproduced if the interval over windows of added perplexity lies below 1.5 %; contradicted "
    "if above",
    scales=("laptop",),
    needs="the laptop scale, which runs long windows",
)(costs("loki-balanced", at_most=1.5, stage="long-context"))

F2C = claim(
    "F2c",
    section="ours",
    says="With that basis Loki is better than H2O at an equal budget, at four times the context",
    paper=_NOT_IN_PAPER,
    conditions=_LONG + "; balanced basis, per query head",
    rule="as C5b: reproduced if the interval over windows of Loki's loss less H2O's lies below 0; "
    "contradicted if above",
    scales=("laptop",),
    needs="the laptop scale, which runs long windows",
)(beats_eviction("loki-balanced", "loki-pca", stage="long-context"))


F1C = claim(
    "F1c",
    section="ours",
    says="F1 on a model of another family",
    paper=_NOT_IN_PAPER,
    conditions=_GEMMA,
    rule="as F1: reproduced if the interval over windows of added perplexity lies above 20 %; contradicted "
    "if below",
    scales=("laptop",),
    needs="Gemma 3's wheels, at the laptop scale",
)(published_basis_fails("second-family"))

F2D = claim(
    "F2d",
    section="ours",
    says="F2 on a model of another family",
    paper=_NOT_IN_PAPER,
    conditions=_GEMMA + "; balanced basis, per query head",
    rule="as F2: reproduced if the interval over windows of added perplexity lies below 1.5 %; contradicted "
    "if above",
    scales=("laptop",),
    needs="Gemma 3's wheels, at the laptop scale",
)(costs("loki-balanced", at_most=1.5, stage="second-family"))


@claim(
    "F3",
    section="ours",
    says="A quarter of the keys, chosen by Loki, holds a passkey at any depth; the last quarter does not",
    paper="not in the paper, which shows LongBench",
    conditions="SmolLM2-135M (4-bit weights); windows of 1,024 tokens of Wikipedia, five depths, two numbers "
    "each; teacher-forced greedy decoding",
    rule="reproduced if full attention finds at least half, Loki (balanced, shared) at least nine tenths of "
    "those, and StreamingLLM at most half of those; contradicted if Loki finds less than half",
    scales=("laptop",),
    needs="the laptop scale, which hides passkeys",
)
def finds_passkeys(records: Records) -> Finding:
    """Loki against recency alone, where full attention finds the key."""
    record = records["passkeys"]
    full, loki, recent = (
        retrieved(record, arm) for arm in (FULL, "loki-balanced-shared", "streaming")
    )
    kept = sum(a and b for a, b in zip(full, loki, strict=True))
    lost = sum(a and not b for a, b in zip(full, recent, strict=True))
    is_enough = sum(full) >= len(full) / 2
    return Finding(
        decide(
            reproduced=is_enough and kept >= 0.9 * sum(full) and lost >= 0.5 * sum(full),
            contradicted=is_enough and kept < 0.5 * sum(full),
        ),
        f"full attention finds {sum(full)} of {len(full)}; of these Loki finds {kept}, StreamingLLM "
        f"{sum(full) - lost}",
        record.of("passkey", arm="loki-balanced-shared")[0],
        "at least 9 of 10 kept and half lost, where full attention finds at least half",
    )


_CERTIFICATES = (
    "SmolLM2-135M (4-bit weights, trained on 8,192 positions); the last 4 to 8 queries of 15 windows of "
    "Wikipedia, 512 to 16,384 tokens, every layer; errors of 0.001, 0.01 and 0.1"
)


@claim(
    "F4",
    section="ours",
    says="No bound of a certificate is exceeded",
    paper=_NOT_IN_PAPER,
    conditions=_CERTIFICATES,
    rule="reproduced if under every index, in every window and layer, the largest error and the largest "
    "weight not read are at most their largest bounds (and 1e-9); contradicted otherwise",
    scales=("laptop",),
    needs="the laptop scale, which measures certificates",
)
def bounds_hold(records: Records) -> Finding:
    """Bounds beside what they bound, each the largest of a layer's queries."""
    events = records["certificates"].of("certified")
    pairs = [
        pair
        for event in events
        for true, bound in (("error", "bound"), ("unread", "unread_bound"))
        for pair in zip(event.numbers(true), event.numbers(bound), strict=True)
    ]
    # Records hold six digits.
    exceeded = sum(true > bound * (1 + 1e-5) + 1e-9 for true, bound in pairs)
    return Finding(
        decide(reproduced=exceeded == 0, contradicted=exceeded > 0),
        f"{exceeded} of {len(pairs)} bounds exceeded",
        events[0],
        "count of bounds below what they bound",
    )


def saves_reads(error: float) -> Rule:
    """Reading with codes, at the longest length that the model was trained on."""

    def rule(records: Records) -> Finding:
        record = records["certificates"]
        shares = {
            name: certified_share(certified(record, f"{name}:{error:g}", 8192))
            for name in ("loki-codes", "loki-norm", "exact")
        }
        ours = shares["loki-codes"]
        return Finding(
            decide(reproduced=ours.high < 1, contradicted=ours.low > 1),
            f"{ours} of the elements of dense attention at 8,192 tokens; with norms alone "
            f"{shares['loki-norm']}; who knows all scores, and reads all keys for it, {shares['exact']}",
            certified(record, f"loki-codes:{error:g}", 8192)[0],
            "interval over layers of the elements read, against 1",
        )

    return rule


F5 = claim(
    "F5",
    section="ours",
    says="A certified error of 0.1 saves reads",
    paper=_NOT_IN_PAPER,
    conditions=_CERTIFICATES,
    rule="reproduced if with 16 coordinates and 4-bit codes of the rest, at 8,192 tokens, the interval over "
    "layers of elements read over dense attention's lies below 1; contradicted if above",
    scales=("laptop",),
    needs="the laptop scale, which measures certificates",
)(saves_reads(0.1))

F5B = claim(
    "F5b",
    section="ours",
    says="A certified error of 0.01 saves reads",
    paper=_NOT_IN_PAPER,
    conditions=_CERTIFICATES,
    rule="as F5",
    scales=("laptop",),
    needs="the laptop scale, which measures certificates",
)(saves_reads(0.01))


_TABLE = (
    "SmolLM2-135M (4-bit weights); the last 32 or 64 tokens of windows of Wikipedia, dense prompts; 4 first "
    "and 8 last keys kept by all; sizes of indices chosen, and adaptive parameters found, on other windows"
)


@claim(
    "F6",
    section="ours",
    says="The traffic model counts what is read, for every method whose amount is fixed",
    paper=_NOT_IN_PAPER,
    conditions=_TABLE,
    rule="reproduced if in every window of every length, under every method and share, the elements counted "
    "are within 0.1 % of those predicted; contradicted otherwise",
    scales=("laptop",),
    needs="the laptop scale, which fills the fair table",
)
def counts_agree(records: Records) -> Finding:
    """The largest deviation of counted reads from predicted ones."""
    record = records["fair-table"]
    apart = [
        (abs(event.number("read_share") / entry.number("predicted") - 1), entry, event)
        for entry in record.of("entry", is_fixed=True)
        for event in record.of(
            "fair", **{key: entry.values[key] for key in ("arm", "context", "share")}
        )
    ]
    most, entry, event = max(apart, key=lambda each: each[0])
    return Finding(
        decide(reproduced=most <= 1e-3, contradicted=most > 1e-3),
        f"at most {100 * most:.2g} % apart in {len(apart)} comparisons ({entry.values['arm']}, "
        f"{int(entry.number('context'))} tokens, {entry.number('share'):g} of the bytes)",
        event,
        "largest relative deviation, against 0.1 %",
    )


def nearest_of_all(context: int, share: float) -> Rule:
    """Loki in the balanced basis against every other method that has to find its keys."""

    def rule(records: Records) -> Finding:
        record = records["fair-table"]
        others = [
            arm
            for arm in fair_arms(record)
            if arm not in ("loki", "oracle") and competed(record, arm, context, share)
        ]
        gaps = {arm: nearer(record, "loki", arm, context, share) for arm in others}
        better = [arm for arm, gap in gaps.items() if gap.low > 0]
        worse = [arm for arm, gap in gaps.items() if gap.high < 0]
        said = ", ".join(f"{arm} {gaps[arm]}" for arm in better) or "none"
        return Finding(
            decide(reproduced=len(worse) == len(others), contradicted=bool(better)),
            f"farther from full attention than Loki: {', '.join(worse) or 'none'}; nearer (nats a token by "
            f"which Loki is farther): {said}",
            competed(record, "loki", context, share)[0],
            "intervals over windows of Loki's divergence less each other method's, against 0",
        )

    return rule


_NEAREST = (
    "reproduced if for every other method the interval over windows of Loki's divergence from full attention "
    "less the other's lies below 0; contradicted if for any it lies above 0"
)

F7 = claim(
    "F7",
    section="ours",
    says="At an eighth of the bytes Loki's predictions are the nearest to full attention's",
    paper=_NOT_IN_PAPER,
    conditions=_TABLE + "; 8 windows of 2,048 tokens; balanced basis, shared in groups",
    rule=_NEAREST,
    scales=("laptop",),
    needs="the laptop scale, which fills the fair table",
)(nearest_of_all(2048, 1 / 8))

F7B = claim(
    "F7b",
    section="ours",
    says="F7 at a quarter of the bytes",
    paper=_NOT_IN_PAPER,
    conditions=_TABLE + "; 8 windows of 2,048 tokens; balanced basis, shared in groups",
    rule="as F7",
    scales=("laptop",),
    needs="the laptop scale, which fills the fair table",
)(nearest_of_all(2048, 1 / 4))


@claim(
    "F8",
    section="ours",
    says="Half of the bytes are better spent on a weighted sample of the other keys than on more heavy ones",
    paper="not in the paper; Desai et al. 2025 (vAttention) say so of top-k",
    conditions=_TABLE
    + "; 8 windows of 2,048 tokens, a quarter of the bytes; the heavy keys are ranked by "
    "Loki in both; what vAttention reads varies with the text",
    rule="reproduced if the interval over windows of vAttention's divergence less Loki's lies below 0; "
    "contradicted if above",
    scales=("laptop",),
    needs="the laptop scale, which fills the fair table",
)
def sampling_pays(records: Records) -> Finding:
    """Divergence with a sample against that without."""
    record = records["fair-table"]
    gap = nearer(record, "vattention", "loki", 2048, 1 / 4)
    events = competed(record, "vattention", 2048, 1 / 4)
    read = math.fsum(event.number("read_share") for event in events) / len(events)
    return Finding(
        decide(reproduced=gap.high < 0, contradicted=gap.low > 0),
        f"{gap} nats a token farther from full attention with the sample, reading {read:.3g} of the bytes",
        events[0],
        "interval over windows of the difference, against 0",
    )


CLAIMS = claims_of(sys.modules[__name__])
