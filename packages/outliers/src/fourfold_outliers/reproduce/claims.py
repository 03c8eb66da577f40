"""The paper's claims and ours, each above the function that judges it from our records.

The body of the paper could not be read: numbers are those of its abstract, others are named, not quoted.
"""

import sys

import numpy as np

from fourfold_outliers.reproduce.measures import (
    apart,
    arms,
    attention_left,
    effect_and_link,
    inner,
    last_of,
    layers_in,
    magnitude,
    median_rise,
    outliers_in,
    rise,
    rise_against,
    spoken,
    whole,
)
from fourfold_outliers.reproduce.recipes import SEEDS
from fourfold_parallel.reproduce.claims import (
    Finding,
    Records,
    beyond_us,
    claim,
    claims_of,
    decide,
    over_seeds,
)

_MODEL = (
    "SmolLM2-135M (4-bit weights, 30 layers of 576 coordinates); 20 Wikipedia articles and 20 documents "
    "of the CPython manual, 128 tokens each, position 0 apart; the outliers are those by share in at "
    "least half of the inner layers"
)
_LANGUAGE = (
    "Llamas of 0.7 M parameters (3 layers of 128), 400 steps of 1,024 tokens of a bigram language of 512 "
    "ids and 3 nats, Zipf's or flat; 3 seeds, Student's interval; the recipe was piloted with another seed"
)
_DOCUMENTS = "95 % interval from 200 halves of the documents"
_NOT_IN_PAPER = "not in the paper"


@claim(
    "O1",
    section="abstract; Kovaleva et al. 2021",
    says="A handful of coordinates, the same over layers, are outliers for most tokens",
    paper="2 of 768 in BERT-base, in all 12 layers",
    conditions=_MODEL,
    rule="reproduced if some coordinate is an outlier by share in at least half of the inner layers and "
    "no inner layer has more than 8; else contradicted",
    scales=("smoke", "laptop"),
    needs="the model",
)
def a_handful(records: Records) -> Finding:
    """Outliers by share, layer by layer."""
    events = layers_in(records)[1:-1]
    most = max(len(event.numbers("by_share")) for event in events)
    event = records["geometry"].only("found")
    outliers = event.numbers("coordinates")
    holds = bool(outliers) and most <= 8
    named = ", ".join(f"{d:.0f}" for d in outliers) or "none"
    return Finding(
        decide(reproduced=holds, contradicted=not holds),
        f"coordinates {named} in at least half of the {len(events)} inner layers; at most {most} in any",
        event,
        "coordinates that last, and the most in a layer, against 8",
    )


@claim(
    "O2",
    section="abstract",
    says="Disabling them ruins the model, disabling others does not",
    paper="nearly -30 % on MNLI without 48 of 110 M parameters of BERT-base",
    conditions=f"{_MODEL}; gains of zero in all 61 norms; nats a token; {_DOCUMENTS}",
    rule="loss rise without the outliers over the median rise of 20 random sets as large: reproduced if "
    "above 10 (the rise less 10 times the median: low > 0), contradicted if below 3 (less 3 times: high < "
    "0)",
    scales=("smoke", "laptop"),
    needs="the model",
)
def ruins(records: Records) -> Finding:
    """Their loss rise over that of random sets."""
    record = records["disabling"]
    event = arms(record, "found")[0]
    harm = rise(record, event)
    random, matched = (median_rise(record, kind) for kind in ("random", "matched"))
    above, below = (rise_against(record, "random", times) for times in (10, 3))
    return Finding(
        decide(reproduced=above.low > 0, contradicted=below.high < 0),
        f"+{harm} nats; the median random set +{random:.3g}, one of like gains +{matched:.3g}",
        event,
        f"the rise less 10 times the median random one: {above}",
    )


@claim(
    "O3",
    section="abstract",
    says="Their magnitude is linked to token frequency",
    paper="correlation of coefficients' magnitude with pretraining frequency, BERT and RoBERTa",
    conditions=f"{_MODEL}; counts in the rest of both corpora, since those of the pretraining are not to "
    f"be had; one mean for each token id; {_DOCUMENTS}",
    rule="rank correlation of |h| with frequency over token ids, mean over inner layers, for each "
    "outlier: reproduced if for a majority the interval of its size lies above the 95 % point of other "
    "coordinates, contradicted if for none, else inconclusive; the sign is told",
    scales=("laptop",),
    needs="the model",
)
def linked_to_frequency(records: Records) -> Finding:
    """Each outlier's link against those of other coordinates."""
    record = records["frequency"]
    events, bar = record.of("link"), record.only("others").number("p95")
    above = [event for event in events if magnitude(event).low > bar]
    told = "; ".join(f"{event.number('coordinate'):.0f}: {whole(event)}" for event in events)
    return Finding(
        decide(reproduced=2 * len(above) > len(events), contradicted=not above),
        f"{told}; 95 % point of others {bar:.3g}",
        events[0],
        f"{len(above)} of {len(events)} are above it",
    )


@claim(
    "O4",
    section="abstract; Timkey and van Schijndel 2021",
    says="They carry the anisotropy of the model's states",
    paper="1 to 3 dimensions dominate the cosine (Timkey and van Schijndel)",
    conditions=f"{_MODEL}; {_DOCUMENTS}",
    rule="mean cosine without them over that with them, mean over inner layers: reproduced if high < 0.5, "
    "contradicted if low > 0.8",
    scales=("smoke", "laptop"),
    needs="the model",
)
def carry_anisotropy(records: Records) -> Finding:
    """The mean cosine that is left without them."""
    event = records["geometry"].only("anisotropy")
    left = whole(event)
    events = layers_in(records)
    before, after = (inner([e.number(key) for e in events]) for key in ("cosine", "without"))
    return Finding(
        decide(reproduced=left.high < 0.5, contradicted=left.low > 0.8),
        f"{left} of the mean cosine is left ({before:.3g} to {after:.3g})",
        event,
        "the share that is left against 0.5 and 0.8",
    )


@claim(
    "O5",
    section="abstract",
    says="They make the vertical attention pattern, to special tokens",
    paper="a contribution to attention to special tokens, BERT and RoBERTa",
    conditions=f"{_MODEL}; attention of positions from 16 on to position 0, mean over layers and heads, "
    f"since a causal model has no other special token; {_DOCUMENTS}",
    rule="attention to position 0 with all of them disabled over before: reproduced if high < 0.5 and a "
    "random set's low > 0.8; contradicted if low > 0.8",
    scales=("smoke", "laptop"),
    needs="the model",
)
def vertical_attention(records: Records) -> Finding:
    """The attention to position 0 that is left."""
    record = records["disabling"]
    event, random = arms(record, "found")[0], arms(record, "random")[0]
    left, other = attention_left(record, event), attention_left(record, random)
    before = float(np.mean(arms(record, "as it is")[0].numbers("to_first")))
    return Finding(
        decide(reproduced=left.high < 0.5 and other.low > 0.8, contradicted=left.low > 0.8),
        f"{left} of {before:.3g} is left; with a random set {other}",
        event,
        "the share that is left against 0.5 and 0.8",
    )


@claim(
    "O6",
    section="abstract of version 1",
    says="The effect varies by layer, and so does the link to frequency",
    paper="effects and correlations by layer",
    conditions=f"{_MODEL}; disabled in both norms of one layer at a time; the mean size of the outliers' "
    f"links in the states that the layer reads; {_DOCUMENTS}",
    rule="rank correlation over layers of loss rise and size of link: reproduced if above 0, contradicted "
    "if below 0",
    scales=("laptop",),
    needs="the model",
)
def effect_follows_link(records: Records) -> Finding:
    """Layers in which they matter more, and in which they are linked more."""
    together = effect_and_link(records)
    event = records["by-layer"].of("layer")[1]
    return Finding(
        decide(reproduced=together.low > 0, contradicted=together.high < 0),
        str(together),
        event,
        "the correlation against 0",
    )


@claim(
    "O7",
    section="title",
    says="Frequency drives them",
    paper="a correlation; no intervention",
    conditions=_LANGUAGE,
    rule="outliers by share a layer (mean over inner layers) at the end under Zipf's law less under the "
    "flat one: reproduced if low > 0, contradicted if high <= 0; inconclusive where no run has any",
    scales=("laptop",),
    needs="three seeds",
)
def frequency_drives(records: Records) -> Finding:
    """Languages that differ in frequencies alone."""
    key = "outliers_by_layer"
    gap = apart(records, "zipf", "flat", SEEDS)
    counts = {
        arm: over_seeds([last_of(record, key) for record in spoken(records, arm, SEEDS)])
        for arm in ("zipf", "flat")
    }
    has_any = any(count.value for count in counts.values())
    return Finding(
        decide(reproduced=gap.low > 0, contradicted=has_any and gap.high <= 0),
        f"{counts['zipf']} outliers a layer under Zipf's law, {counts['flat']} under the flat one",
        spoken(records, "zipf", SEEDS)[0].last("outliers"),
        f"the difference, {gap}, against 0",
    )


O8 = beyond_us(
    "O8",
    section="abstract",
    says="Two dimensions of BERT-base and RoBERTa-base, disabled, cost nearly 30 % on MNLI",
    paper="48 of 110 M parameters, nearly -30 %",
    rule="accuracy on MNLI's matched validation set with the two disabled over before: reproduced if at "
    "most 0.75",
    needs="BERT and RoBERTa fine-tuned on MNLI, from a model hub, and a classifier's head, which this "
    "runtime does not train",
)


@claim(
    "N1",
    section="-",
    says="Zipf's law makes them by way of the head: a model that is given the frequencies has fewer",
    paper=_NOT_IN_PAPER,
    conditions=f"{_LANGUAGE}; the log frequencies are added to the logits and are not trained",
    rule="outliers by share a layer under Zipf's law less those of the model that is given the "
    "frequencies: reproduced if low > 0 and at most half are left, contradicted if high <= 0",
    scales=("laptop",),
    needs="three seeds",
)
def by_way_of_the_head(records: Records) -> Finding:
    """The same language, its frequencies given."""
    gap = apart(records, "zipf", "given", SEEDS)
    counts = {
        arm: over_seeds(
            [last_of(record, "outliers_by_layer") for record in spoken(records, arm, SEEDS)]
        )
        for arm in ("zipf", "given")
    }
    halved = counts["given"].value <= counts["zipf"].value / 2
    return Finding(
        decide(reproduced=gap.low > 0 and halved, contradicted=gap.high <= 0),
        f"{counts['zipf']} outliers a layer, {counts['given']} where the frequencies are given",
        spoken(records, "given", SEEDS)[0].last("outliers"),
        f"the difference, {gap}, against 0",
    )


@claim(
    "N2",
    section="-",
    says="They are a statement about a basis: in a turned one the same function has none",
    paper=_NOT_IN_PAPER,
    conditions=f"{_MODEL}; gains folded, the residual stream turned by a random orthogonal matrix",
    rule="reproduced if no coordinate of an inner layer is an outlier by share after turning, and logits "
    "differ by less than 0.001 of the largest; contradicted if at least half of the outliers are left",
    scales=("laptop",),
    needs="the model",
)
def of_a_basis(records: Records) -> Finding:
    """Outliers before and after turning."""
    event = records["rotation"].only("turned")
    before, after = (sum(event.numbers(f"outliers_{when}")[1:-1]) for when in ("before", "after"))
    error = event.number("logit_difference") / event.number("largest_logit")
    cosines = [inner(event.numbers(f"cosine_{when}")) for when in ("before", "after")]
    return Finding(
        decide(reproduced=after == 0 and error < 1e-3, contradicted=2 * after >= before),
        f"{after:.0f} of {before:.0f} outliers (summed over inner layers) are left; logits differ by "
        f"{error:.1g} of the largest; mean cosine {cosines[0]:.3g} and {cosines[1]:.3g}",
        event,
        "outliers that are left, against none and half; the logits against 0.001",
    )


@claim(
    "N3",
    section="-",
    says="The attention sink lives in them: they hold the first token's state",
    paper=_NOT_IN_PAPER,
    conditions=_MODEL,
    rule="share of position 0's squared length that they hold, mean over inner layers with Student's "
    "interval: reproduced if low > 0.5, contradicted if high < 0.1",
    scales=("smoke", "laptop"),
    needs="the model",
)
def hold_the_sink(records: Records) -> Finding:
    """Their part of the first token's state."""
    events = layers_in(records)[1:-1]
    held = over_seeds([event.number("first_held") for event in events])
    times = max(event.number("first_norm") / event.number("norm") for event in events)
    count = len(outliers_in(records))
    return Finding(
        decide(reproduced=held.low > 0.5, contradicted=held.high < 0.1),
        f"{count} coordinates hold {held} of its squared length; it is up to {times:.3g} times as long as "
        "the others",
        events[len(events) // 2],
        "their share against 0.5 and 0.1",
    )


CLAIMS = claims_of(sys.modules[__name__])
