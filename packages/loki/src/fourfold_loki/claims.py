"""What the paper says, its number, and the rule that judges our records.

Numbers of the paper's tables are quoted only where its abstract, captions or text could be read; the others
are named, not quoted. Perplexity is compared on the same tokens: a difference in nats a token for each
window, its mean over windows and Student's 95 % interval.
"""

import math
from collections.abc import Callable

from fourfold_parallel.run.claims import Claim, Finding, Interval, Records, Verdict, over_seeds
from fourfold_parallel.run.records import Event, Record

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


def _line(record: Record, kind: str, arm: str | None = None) -> int:
    events = [e for e in record.of(kind) if arm is None or e.values["arm"] == arm]
    return events[0].line


def _three(is_true: bool, is_false: bool) -> Verdict:
    if is_true:
        return "reproduced"
    return "contradicted" if is_false else "inconclusive"


def _low_rank(records: Records) -> Finding:
    record = records["ranks"]
    share = over_seeds(rank_shares(record, AFTER))
    width = int(rank_events(record, AFTER)[0].number("head_width"))
    return Finding(
        verdict=_three(share.high < 0.75, share.low > 0.9),
        ours=f"{share.value * width:.1f} of {width} (share {share})",
        evidence="ranks",
        line=rank_events(record, AFTER)[0].line,
        because="interval over layers of rank at 90 % over head width, against 0.75 and 0.9",
    )


def _first_layers(records: Records) -> Finding:
    record = records["ranks"]
    first, *others = rank_shares(record, BEFORE)
    rest = over_seeds(others)
    return Finding(
        verdict=_three(first < rest.low, first > rest.high),
        ours=f"{first:.3g} of the head width in the first layer, {rest} in the others (before rotary)",
        evidence="ranks",
        line=rank_events(record, BEFORE)[0].line,
        because="the first layer against the interval of the others",
    )


def _before_is_lower(records: Records) -> Finding:
    record = records["ranks"]
    pairs = zip(rank_shares(record, BEFORE), rank_shares(record, AFTER), strict=True)
    gap = over_seeds([before - after for before, after in pairs])
    return Finding(
        verdict=_three(gap.high < 0, gap.low > 0),
        ours=f"{gap} of the head width, before less after",
        evidence="ranks",
        line=rank_events(record, BEFORE)[0].line,
        because="interval over layers of the difference, against 0",
    )


def _transfers(records: Records) -> Finding:
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
        verdict=_three(lost.high < 0.05, lost.low > 0.1),
        ours=f"{lost} of the captured variance is lost with 16 of 64 directions from {foreign}",
        evidence="ranks",
        line=_line(record, "transfer"),
        because="interval over layers of the relative loss, against 0.05 and 0.1",
    )


def _costs(arm: str, *, below: float, above: float) -> Callable[[Records], Finding]:
    """Reproduced if the interval of added perplexity lies below `below` percent."""

    def rule(records: Records) -> Finding:
        record = records["perplexity"]
        cost = added_percent(record, arm)
        return Finding(
            verdict=_three(cost.high < below, cost.low > above),
            ours=f"+{cost} % perplexity on {tokens_scored(record)} tokens",
            evidence="perplexity",
            line=_line(record, "scored", arm),
            because=f"interval over windows against {below} % and {above} %",
        )

    return rule


def _beats_eviction(records: Records) -> Finding:
    record = records["perplexity"]
    gap = added_nats(record, "loki-pca", "h2o")
    safe = added_nats(record, "loki-pca-uncentred", "h2o")
    return Finding(
        verdict=_three(gap.high < 0, gap.low > 0),
        ours=f"{gap} nats a token more than H2O as published; {safe} with the uncentred basis",
        evidence="perplexity",
        line=_line(record, "scored", "loki-pca"),
        because="interval over windows of the difference to H2O, against 0",
    )


def _fails(records: Records) -> Finding:
    record = records["perplexity"]
    cost = added_percent(record, "loki-pca")
    exact = added_percent(record, "exact")
    return Finding(
        verdict=_three(cost.low > 20, cost.high < 20),
        ours=f"+{cost} % perplexity; exact top-k +{exact} %",
        evidence="perplexity",
        line=_line(record, "scored", "loki-pca"),
        because="interval over windows against 20 %",
    )


def _depends(records: Records) -> Finding:
    record = records["variants"]
    gap = added_nats(record, "loki-pca-before-sinks", "loki-pca-sinks")
    return Finding(
        verdict=_three(gap.low > 0 or gap.high < 0, False),
        ours=f"{gap} nats a token, before less after rotary (with 4 sinks and a window of 32)",
        evidence="variants",
        line=_line(record, "scored", "loki-pca-before-sinks"),
        because="whether the interval of the difference leaves out 0; one model cannot contradict",
    )


def _poor(records: Records) -> Finding:
    record = records["variants"]
    cost = added_percent(record, "pca-attention-half")
    return Finding(
        verdict=_three(cost.low > 20, cost.high < 5),
        ours=f"+{cost} % perplexity with half of the coordinates, on {tokens_scored(record)} tokens",
        evidence="variants",
        line=_line(record, "scored", "pca-attention-half"),
        because="interval over windows against 20 % and 5 %",
    )


def _agrees(records: Records) -> Finding:
    record = records["diagnoses"]
    recall = over_seeds(diagnosed(record, "loki-pca", "recall"))
    mass = over_seeds(diagnosed(record, "loki-pca", "mass_recall"))
    return Finding(
        verdict=_three(recall.low > 0.7, recall.high < 0.7),
        ours=f"{recall} of the exact top-k keys (chance: 0.25), holding {mass} of the attention mass",
        evidence="diagnoses",
        line=_line(record, "diagnosis", "loki-pca"),
        because="interval over layers of the recall, against 0.7",
    )


def _predicted_reads(records: Records) -> Finding:
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
        verdict=_three(abs(read / predicted - 1) < 0.1, True),
        ours=f"{read:.3g} of the elements of dense attention, predicted {predicted:.3g}; with selection "
        f"per query head, as published, {heads:.3g} (three query heads a key/value head)",
        evidence="perplexity",
        line=_line(record, "scored", "loki-balanced-shared"),
        because="counted reads against d_f/2 + k_f, within 10 %",
    )


def _untested(records: Records) -> Finding:
    """For claims that no scale of this version tests."""
    del records
    return Finding(
        verdict="not tested", ours="", evidence="", line=0, because="no scale here tests it"
    )


_MODEL = "SmolLM2-135M (4-bit weights), 9 query and 3 key/value heads of 64; Wikipedia, windows of 512 tokens"
_NOT_HERE = "a model that is above chance on these tasks (1 B parameters and more), a GPU"

CLAIMS = (
    Claim(
        id="C1",
        section="3, figure 1",
        statement="Keys are low-rank: few principal directions hold 90 % of their variance",
        paper_value="about 80 of 128, mean over layers and heads, six model families",
        conditions=_MODEL,
        rule_text="reproduced if the interval over layers of rank at 90 % over head width (after rotary) "
        "lies below 0.75; contradicted if above 0.9",
        rule=_low_rank,
        scales=("smoke", "laptop"),
        needs="the model",
    ),
    Claim(
        id="C2",
        section="3, figure 2",
        statement="The first layers need fewest directions",
        paper_value="curves by layer",
        conditions=_MODEL,
        rule_text="reproduced if the first layer's rank before rotary lies below the interval of the other "
        "layers; contradicted if above",
        rule=_first_layers,
        scales=("smoke", "laptop"),
        needs="the model",
    ),
    Claim(
        id="C3",
        section="3",
        statement="Keys have lower rank before the rotary embedding than after",
        paper_value="bars by model",
        conditions=_MODEL,
        rule_text="reproduced if the interval over layers of the difference lies below 0; contradicted if "
        "above",
        rule=_before_is_lower,
        scales=("smoke", "laptop"),
        needs="the model",
    ),
    Claim(
        id="C4",
        section="3",
        statement="Directions carry over between corpora",
        paper_value="overlapping curves for three corpora",
        conditions=_MODEL + ", and CPython's manual",
        rule_text="reproduced if, with 16 directions fitted on the other corpus, the interval over layers of "
        "the relative loss of captured variance lies below 0.05; contradicted if above 0.1",
        rule=_transfers,
        scales=("laptop",),
        needs="the laptop scale, which calibrates on two corpora",
    ),
    Claim(
        id="C5",
        section="5, table 2",
        statement="Perplexity stays near full attention's at a quarter of keys and coordinates",
        paper_value="a table (Llama-2, Llama-3, Mistral); its values could not be verified",
        conditions=_MODEL + "; centred PCA as published",
        rule_text="reproduced if the interval over windows of added perplexity lies below 5 %; contradicted "
        "if above 5 %",
        rule=_costs("loki-pca", below=5, above=5),
        scales=("smoke", "laptop"),
        needs="the model",
    ),
    Claim(
        id="C5b",
        section="5, table 2",
        statement="At an equal budget Loki is better than H2O",
        paper_value="the same table",
        conditions=_MODEL + "; centred PCA as published",
        rule_text="reproduced if the interval over windows of Loki's loss less H2O's lies below 0; "
        "contradicted if above",
        rule=_beats_eviction,
        scales=("laptop",),
        needs="the laptop scale, which runs H2O",
    ),
    Claim(
        id="C6",
        section="5, figures 3 and 4",
        statement="Which transform is best, before or after rotary, depends on the model",
        paper_value="bars by model",
        conditions=_MODEL + "; one model",
        rule_text="reproduced if the two differ: the interval over windows of the difference leaves out 0; "
        "otherwise inconclusive",
        rule=_depends,
        scales=("laptop",),
        needs="the laptop scale, which runs both",
    ),
    Claim(
        id="C7",
        section="5",
        statement="Downstream tasks are nearly unchanged",
        paper_value="six tasks, eight models; values could not be verified",
        conditions="not run: a model of 135 M parameters is near chance on them",
        rule_text="no rule at this scale",
        rule=_untested,
        scales=(),
        needs=_NOT_HERE,
    ),
    Claim(
        id="C8",
        section="5, figures 6 and 7",
        statement="LongBench scores stay close",
        paper_value="a trade-off curve",
        conditions="not run",
        rule_text="no rule at this scale",
        rule=_untested,
        scales=(),
        needs=_NOT_HERE,
    ),
    Claim(
        id="C9",
        section="appendix",
        statement="Attending with the approximate scores themselves (PCAAttn) is poor",
        paper_value="a table",
        conditions=_MODEL + "; half of the coordinates of the published basis",
        rule_text="reproduced if the interval over windows of added perplexity lies above 20 %; "
        "contradicted if below 5 %",
        rule=_poor,
        scales=("laptop",),
        needs="the laptop scale, which runs it",
    ),
    Claim(
        id="C10",
        section="6",
        statement="Attention is up to 45 % faster than the library's own",
        paper_value="up to 45 % less time than eager attention (Llama-2-13B, prompts near 3,500)",
        conditions="not run on a GPU; benchmarks/loki_decode.py times a CPU",
        rule_text="no rule at this scale",
        rule=_untested,
        scales=(),
        needs="a GPU of 80 GB",
    ),
    Claim(
        id="C11",
        section="appendix",
        statement="Approximate and exact top-k keys agree well",
        paper_value="a plot",
        conditions=_MODEL,
        rule_text="reproduced if the interval over layers of recall at a quarter of keys and coordinates "
        "lies above 0.7; contradicted if below",
        rule=_agrees,
        scales=("smoke", "laptop"),
        needs="the model",
    ),
    Claim(
        id="C12",
        section="4.2",
        statement="Loki reads d/(2D) + k_f of what dense attention reads",
        paper_value="speed-up bound 1/(d_f/2 + k_f): 2.67 at a quarter each",
        conditions=_MODEL + "; selection shared by the query heads of a key/value head",
        rule_text="reproduced if the counted share is within 10 % of the formula; contradicted otherwise",
        rule=_predicted_reads,
        scales=("smoke", "laptop"),
        needs="the model",
    ),
    Claim(
        id="F1",
        section="ours",
        statement="Centred PCA, as published, drops the attention sink and fails on this model",
        paper_value="not in the paper",
        conditions=_MODEL,
        rule_text="reproduced if the interval over windows of added perplexity lies above 20 %; "
        "contradicted if below",
        rule=_fails,
        scales=("smoke", "laptop"),
        needs="the model",
    ),
    Claim(
        id="F2",
        section="ours",
        statement="A basis that looks at queries too repairs it, without keeping sinks by force",
        paper_value="not in the paper",
        conditions=_MODEL + "; balanced basis, per query head",
        rule_text="reproduced if the interval over windows of added perplexity lies below 1.5 %; "
        "contradicted if above",
        rule=_costs("loki-balanced", below=1.5, above=1.5),
        scales=("smoke", "laptop"),
        needs="the model",
    ),
)
