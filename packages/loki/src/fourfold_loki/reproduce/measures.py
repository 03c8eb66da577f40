"""The rules of the ledger: what each measures in our records, and how it decides.

Perplexity is compared on the same tokens: a difference in nats a token for each
window, its mean over windows and Student's 95 % interval.
"""

import math
from collections.abc import Callable

from fourfold_parallel.common.records import Event, Record
from fourfold_parallel.reproduce.claims import Finding, Interval, Records, Verdict, over_seeds

FULL = "full"
AFTER, BEFORE = "after rotary", "before rotary"
WIKIPEDIA = "English Wikipedia, first articles"


def losses(record: Record, arm: str) -> list[float]:
    """Nats a token of every window under an arm."""
    return [e.number("loss_nats") for e in record.of("scored") if e.values["arm"] == arm]


def added_nats(record: Record, arm: str, against: str = FULL) -> Interval:
    """What an arm costs more than another, in nats a token, over windows."""
    pairs = zip(losses(record, arm), losses(record, against), strict=True)
    return over_seeds([mine - theirs for mine, theirs in pairs])


def added_percent(record: Record, arm: str, against: str = FULL) -> Interval:
    """The same as a change of perplexity, in percent."""
    nats = added_nats(record, arm, against)

    def percent(value: float) -> float:
        return 100 * math.expm1(value)

    return Interval(
        value=percent(nats.value),
        low=percent(nats.low),
        high=percent(nats.high),
        seeds=nats.seeds,
    )


def tokens_scored(record: Record) -> int:
    """Tokens that each arm was scored on."""
    return sum(int(e.number("tokens")) for e in record.of("scored") if e.values["arm"] == FULL)


def rank_events(record: Record, stage: str, corpus: str = WIKIPEDIA) -> list[Event]:
    """Events of a stage, in order of layers."""
    return [
        e for e in record.of("rank") if e.values["stage"] == stage and e.values["corpus"] == corpus
    ]


def rank_shares(record: Record, stage: str, corpus: str = WIKIPEDIA) -> list[float]:
    """Rank at 90 % over head width, mean over heads, layer by layer."""
    shares = []
    for event in rank_events(record, stage, corpus):
        ranks = event.values["rank"]
        assert isinstance(ranks, list)
        mean = sum(float(str(rank)) for rank in ranks) / len(ranks)
        shares.append(mean / event.number("head_width"))
    return shares


def diagnosed(record: Record, arm: str, key: str) -> list[float]:
    """A number of the doctor's, layer by layer."""
    return [e.number(key) for e in record.of("diagnosis") if e.values["arm"] == arm]


def line_of(record: Record, kind: str, arm: str | None = None) -> int:
    """First line of a kind of event, of an arm where one is named."""
    events = [e for e in record.of(kind) if arm is None or e.values["arm"] == arm]
    return events[0].line


def three(is_true: bool, is_false: bool) -> Verdict:
    """A verdict from two conditions, of which at most one holds."""
    if is_true:
        return "reproduced"
    return "contradicted" if is_false else "inconclusive"


def low_rank(records: Records) -> Finding:
    """C1: directions for 90 % of the variance, over the head width."""
    record = records["ranks"]
    share = over_seeds(rank_shares(record, AFTER))
    width = int(rank_events(record, AFTER)[0].number("head_width"))
    return Finding(
        verdict=three(share.high < 0.75, share.low > 0.9),
        ours=f"{share.value * width:.1f} of {width} (share {share})",
        evidence="ranks",
        line=rank_events(record, AFTER)[0].line,
        because="interval over layers of rank at 90 % over head width, against 0.75 and 0.9",
    )


def first_layers(records: Records) -> Finding:
    """C2: the first layer against the others."""
    record = records["ranks"]
    first, *others = rank_shares(record, BEFORE)
    rest = over_seeds(others)
    return Finding(
        verdict=three(first < rest.low, first > rest.high),
        ours=f"{first:.3g} of the head width in the first layer, {rest} in the others (before rotary)",
        evidence="ranks",
        line=rank_events(record, BEFORE)[0].line,
        because="the first layer against the interval of the others",
    )


def before_is_lower(records: Records) -> Finding:
    """C3: rank before rotary less rank after it, layer by layer."""
    record = records["ranks"]
    pairs = zip(rank_shares(record, BEFORE), rank_shares(record, AFTER), strict=True)
    gap = over_seeds([before - after for before, after in pairs])
    return Finding(
        verdict=three(gap.high < 0, gap.low > 0),
        ours=f"{gap} of the head width, before less after",
        evidence="ranks",
        line=rank_events(record, BEFORE)[0].line,
        because="interval over layers of the difference, against 0",
    )


def transfers(records: Records) -> Finding:
    """C4: variance that another corpus's directions lose, layer by layer."""
    record = records["ranks"]

    def held(fitted_on: str) -> list[float]:
        [event] = [
            e
            for e in record.of("transfer")
            if e.values["stage"] == AFTER
            and e.values["fitted_on"] == fitted_on
            and e.values["corpus"] == WIKIPEDIA
            and e.values["width"] == 16
        ]
        values = event.values["held_by_layer"]
        assert isinstance(values, list)
        return [float(str(value)) for value in values]

    [foreign] = {str(e.values["corpus"]) for e in record.of("rank")} - {WIKIPEDIA}
    pairs = zip(held(foreign), held(WIKIPEDIA), strict=True)
    lost = over_seeds([1 - theirs / mine for theirs, mine in pairs])
    return Finding(
        verdict=three(lost.high < 0.05, lost.low > 0.1),
        ours=f"{lost} of the captured variance is lost with 16 of 64 directions from {foreign}",
        evidence="ranks",
        line=line_of(record, "transfer"),
        because="interval over layers of the relative loss, against 0.05 and 0.1",
    )


def costs(
    arm: str, *, below: float, above: float, stage: str = "perplexity"
) -> Callable[[Records], Finding]:
    """Reproduced if the interval of added perplexity lies below `below` percent."""

    def rule(records: Records) -> Finding:
        record = records[stage]
        cost = added_percent(record, arm)
        return Finding(
            verdict=three(cost.high < below, cost.low > above),
            ours=f"+{cost} % perplexity on {tokens_scored(record)} tokens",
            evidence=stage,
            line=line_of(record, "scored", arm),
            because=f"interval over windows against {below} % and {above} %",
        )

    return rule


def beats_eviction(
    arm: str, besides: str, *, stage: str = "perplexity"
) -> Callable[[Records], Finding]:
    """Loss of a token under an arm less that under H2O, and beside it under another arm."""

    def rule(records: Records) -> Finding:
        record = records[stage]
        gap = added_nats(record, arm, "h2o")
        other = added_nats(record, besides, "h2o")
        return Finding(
            verdict=three(gap.high < 0, gap.low > 0),
            ours=f"{gap} nats a token more than H2O ({arm}); {other} ({besides})",
            evidence=stage,
            line=line_of(record, "scored", arm),
            because="interval over windows of the difference to H2O, against 0",
        )

    return rule


def fails(stage: str = "perplexity") -> Callable[[Records], Finding]:
    """What the published basis costs."""

    def rule(records: Records) -> Finding:
        record = records[stage]
        cost = added_percent(record, "loki-pca")
        exact = added_percent(record, "exact")
        return Finding(
            verdict=three(cost.low > 20, cost.high < 20),
            ours=f"+{cost} % perplexity; exact top-k +{exact} %",
            evidence=stage,
            line=line_of(record, "scored", "loki-pca"),
            because="interval over windows against 20 %",
        )

    return rule


def depends(records: Records) -> Finding:
    """C6: directions fitted before rotary against those after it."""
    record = records["variants"]
    gap = added_nats(record, "loki-pca-before-sinks", "loki-pca-sinks")
    return Finding(
        verdict=three(gap.low > 0 or gap.high < 0, False),
        ours=f"{gap} nats a token, before less after rotary (with 4 sinks and a window of 32)",
        evidence="variants",
        line=line_of(record, "scored", "loki-pca-before-sinks"),
        because="whether the interval of the difference leaves out 0; one model cannot contradict",
    )


def poor(records: Records) -> Finding:
    """C9: what attending with the approximate scores costs."""
    record = records["variants"]
    cost = added_percent(record, "pca-attention-half")
    return Finding(
        verdict=three(cost.low > 20, cost.high < 5),
        ours=f"+{cost} % perplexity with half of the coordinates, on {tokens_scored(record)} tokens",
        evidence="variants",
        line=line_of(record, "scored", "pca-attention-half"),
        because="interval over windows against 20 % and 5 %",
    )


def agrees(records: Records) -> Finding:
    """C11: keys that approximate and exact ranking have in common."""
    record = records["diagnoses"]
    recall = over_seeds(diagnosed(record, "loki-pca", "recall"))
    mass = over_seeds(diagnosed(record, "loki-pca", "mass_recall"))
    return Finding(
        verdict=three(recall.low > 0.7, recall.high < 0.7),
        ours=f"{recall} of the exact top-k keys (chance: 0.25), holding {mass} of the attention mass",
        evidence="diagnoses",
        line=line_of(record, "diagnosis", "loki-pca"),
        because="interval over layers of the recall, against 0.7",
    )


def predicted_reads(records: Records) -> Finding:
    """C12: what was read, counted, against the formula."""
    record = records["perplexity"]

    def share(arm: str, key: str) -> float:
        events = [e.number(key) for e in record.of("scored") if e.values["arm"] == arm]
        return sum(events) / len(events)

    kept, read = (
        share("loki-balanced-shared", "kept_share"),
        share("loki-balanced-shared", "read_share"),
    )
    predicted = kept + 0.25 / 2
    heads = share("loki-balanced", "read_share")
    return Finding(
        verdict=three(abs(read / predicted - 1) < 0.1, True),
        ours=f"{read:.3g} of the elements of dense attention, predicted {predicted:.3g}; with selection "
        f"per query head, as published, {heads:.3g} (three query heads a key/value head)",
        evidence="perplexity",
        line=line_of(record, "scored", "loki-balanced-shared"),
        because="counted reads against d_f/2 + k_f, within 10 %",
    )


def untested(records: Records) -> Finding:
    """For claims that no scale of this version tests."""
    del records
    return Finding(
        verdict="not tested", ours="", evidence="", line=0, because="no scale here tests it"
    )


def finds_passkeys(records: Records) -> Finding:
    """F3: Loki against recency alone, where full attention finds the key."""
    record = records["passkeys"]

    def found(arm: str) -> list[bool]:
        return [bool(e.values["is_found"]) for e in record.of("passkey") if e.values["arm"] == arm]

    full, loki, recent = (found(arm) for arm in (FULL, "loki-balanced-shared", "streaming"))
    kept = sum(a and b for a, b in zip(full, loki, strict=True))
    lost = sum(a and not b for a, b in zip(full, recent, strict=True))
    enough = sum(full) >= len(full) / 2
    return Finding(
        verdict=three(
            enough and kept >= 0.9 * sum(full) and lost >= 0.5 * sum(full),
            enough and kept < 0.5 * sum(full),
        ),
        ours=f"full attention finds {sum(full)} of {len(full)}; of these Loki finds {kept}, StreamingLLM "
        f"{sum(full) - lost}",
        evidence="passkeys",
        line=line_of(record, "passkey", "loki-balanced-shared"),
        because="at least 9 of 10 kept and half lost, where full attention finds at least half",
    )


def saves_time(records: Records) -> Finding:
    """C10: time of a token's attention, paired within rounds, at the longest context."""
    record = records["decoding"]
    longest = max(int(e.number("tokens")) for e in record.of("decoding"))
    [event] = [e for e in record.of("decoding") if e.number("tokens") == longest]

    def milliseconds(name: str) -> list[float]:
        values = event.values[name]
        assert isinstance(values, list)
        return [float(str(value)) for value in values]

    loki = milliseconds("loki_ms")

    def saved(against: list[float]) -> Interval:
        return over_seeds([100 * (1 - b / a) for a, b in zip(against, loki, strict=False)])

    library = saved(milliseconds("sdpa_ms"))
    packed = saved(milliseconds("packed_sdpa_ms"))
    return Finding(
        verdict=three(library.low > 0, library.high < 0),
        ours=f"{library} % less time than transformers' sdpa, {packed} % less than sdpa with packed heads, "
        f"on a CPU at {longest} tokens",
        evidence="decoding",
        line=event.line,
        because="interval over rounds of the time saved against the library's own attention, against 0",
    )
