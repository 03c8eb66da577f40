"""Figures: pure functions from records to figures."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from fourfold_outliers.charts import bars, heat, stack
from fourfold_outliers.reproduce.measures import (
    arms,
    layer_rises,
    layers_in,
    outliers_in,
    rise,
    table_of,
)
from fourfold_outliers.reproduce.recipes import ARMS, SEEDS
from fourfold_parallel.reproduce.claims import Records
from fourfold_parallel.reproduce.experiment import Drawing
from fourfold_parallel.reproduce.figures import BASELINE, CONTROL, IDEAL, METHOD, SHADES
from fourfold_parallel.reproduce.scale import Scale

COLORS = {"zipf": METHOD, "flat": CONTROL, "given": BASELINE}
NAMES = {
    "zipf": "Zipf's frequencies",
    "flat": "flat frequencies",
    "given": "Zipf's, given to the head",
}


def where(records: Records) -> Figure:
    """Share of tokens in which a coordinate is far from the others, by layer."""
    events = layers_in(records)
    names = [*table_of(events[0], "shares")]
    rows = {name: [float(table_of(e, "shares")[name]) for e in events] for name in names}
    figure = Figure(figsize=(6.4, 1.4 + 0.26 * len(rows)))
    axes = figure.subplots()
    heat(axes, dict(sorted(rows.items(), key=lambda item: -sum(item[1]))))
    axes.set_title("SmolLM2: a handful of coordinates, the same over layers")
    return figure


def anisotropy(records: Records) -> Figure:
    """Contributions of the outliers to the mean cosine, by layer."""
    events = layers_in(records)
    figure = Figure(figsize=(6.4, 3.4))
    axes = figure.subplots()
    parts = {
        str(d): [float(table_of(e, "contributions")[str(d)]) for e in events]
        for d in outliers_in(records)
    }
    whole, without = ([e.number(key) for e in events] for key in ("cosine", "without"))
    stack(axes, parts, whole, without)
    axes.set_title("SmolLM2: who carries the mean cosine")
    return figure


def disabled(records: Records) -> Figure:
    """Loss rises of the outliers, of other ways to take them, and of other sets."""
    record = records["disabling"]
    ours = [e for e in record.of("arm") if str(e.values["arm"]).startswith(("found", "only"))]
    rows = [
        (str(e.values["arm"]).replace("found", "all of them"), rise(record, e), METHOD)
        for e in ours
    ]
    for kind, color in (("random", CONTROL), ("matched", BASELINE)):
        others = sorted((rise(record, e) for e in arms(record, kind)), key=lambda r: r.value)
        named = {"random": "random coordinates", "matched": "others of like gains"}[kind]
        rows.append((f"{named}: median of {len(others)}", others[len(others) // 2], color))
        rows.append((f"{named}: worst", others[-1], color))
    figure = Figure(figsize=(6.4, 1.2 + 0.27 * len(rows)))
    axes = figure.subplots()
    bars(axes, rows)
    axes.set_title("SmolLM2: what its outliers are worth")
    return figure


def links(records: Records) -> Figure:
    """Rank correlation of size with frequency by layer, beside other coordinates."""
    record = records["frequency"]
    others = record.only("others")
    figure = Figure(figsize=(6.4, 3.4))
    axes = figure.subplots()
    p95 = np.asarray(others.numbers("p95_by_layer"))
    layers = np.arange(len(p95))
    axes.fill_between(
        layers, -p95, p95, color=BASELINE, alpha=0.25, linewidth=0, label="95 % of the others"
    )
    for place, event in enumerate(record.of("link")):
        value, far = (np.asarray(event.numbers(key)) for key in ("by_layer", "reach_by_layer"))
        color = SHADES[place % len(SHADES)]
        axes.plot(value, color=color, label=f"{event.number('coordinate'):.0f}")
        axes.fill_between(layers, value - far, value + far, color=color, alpha=0.2, linewidth=0)
    axes.axhline(0, color=IDEAL, linestyle="--", linewidth=1.2)
    axes.set_xlabel("layer (0: the embedding)")
    axes.set_ylabel("rank correlation of |h| and frequency")
    axes.set_title("SmolLM2: the link to frequency is mostly negative")
    axes.legend(ncols=2, fontsize=8)
    return figure


def by_layer(records: Records) -> Figure:
    """Loss rise with the outliers disabled in one layer, and the size of the link there."""
    rises = layer_rises(records["by-layer"]).mean(0)
    size = np.asarray(records["frequency"].only("halves").numbers("size_by_layer"))[:-1]
    figure = Figure(figsize=(6.4, 3.4))
    upper, lower = figure.subplots(2, 1, sharex=True)
    layers = np.arange(1, len(rises) + 1)
    upper.bar(layers, rises, color=METHOD)
    upper.set_yscale("symlog", linthresh=0.01)
    upper.set_ylabel("loss rise (nats)")
    lower.plot(layers, size, color=METHOD, marker="o", markersize=3.5)
    lower.set_ylabel("size of the link")
    lower.set_ylim(bottom=0)
    lower.set_xlabel("layer in whose norms the outliers are disabled")
    upper.set_title("SmolLM2: effect and link, layer by layer")
    return figure


def languages(records: Records) -> Figure:
    """When outliers arise: outlier coordinates behind the second layer, and its mean cosine, by step."""
    figure = Figure(figsize=(6.8, 3.2))
    left, right = figure.subplots(1, 2)
    for arm in ARMS:
        for seed in SEEDS:
            name = f"language-{arm}-seed{seed}"
            if name not in records:
                continue
            events = records[name].of("outliers")
            steps = [event.number("step") for event in events]
            shown = {"color": COLORS[arm], "alpha": 0.85}
            label = NAMES[arm] if seed == SEEDS[0] else None
            # Lines that lie upon one another are set apart by a hair.
            apart = 0.04 * (seed - 1)
            counts = [event.numbers("outliers_by_layer")[2] + apart for event in events]
            left.plot(steps, counts, label=label, **shown)
            right.plot(steps, [event.numbers("cosine_by_layer")[2] for event in events], **shown)
    left.set_ylabel("outlier coordinates")
    right.set_ylabel("mean cosine of two tokens")
    for axes in (left, right):
        axes.set_xlabel("step")
    left.set_title("Frequency makes outliers")
    left.legend(fontsize=8)
    return figure


def drawings(scale: Scale) -> Sequence[Drawing]:
    """The figures of a scale; layers apart at laptop scale only."""
    documents = "4 documents of 32 tokens" if scale == "smoke" else "40 documents of 128 tokens"
    seeds = "one seed, 12 steps" if scale == "smoke" else "three seeds, one line each"
    made = [
        Drawing(
            name="languages",
            caption="Outliers by share behind the second of three layers, and the mean cosine there, in "
            f"Llamas of 0.7 M parameters that learn a bigram language of 3 nats a token; {seeds}. Only "
            "frequencies differ; grey: Zipf's language, its log frequencies added to the logits.",
            draw=languages,
        ),
        Drawing(
            name="where",
            caption="Share of the tokens in which a coordinate lies beyond three standard deviations of "
            f"the token's coordinates, position 0 apart. SmolLM2-135M, {documents}.",
            draw=where,
        ),
        Drawing(
            name="anisotropy",
            caption="Parts of the outliers in the mean cosine of two tokens, the whole, and what is left "
            f"without them. SmolLM2-135M, {documents}.",
            draw=anisotropy,
        ),
        Drawing(
            name="disabled",
            caption="Rise of the loss with coordinates disabled by a gain of zero in every norm, or as "
            f"said; 95 % over documents. SmolLM2-135M, {documents}.",
            draw=disabled,
        ),
        Drawing(
            name="links",
            caption="Rank correlation over token ids of a coordinate's mean size with frequency in both "
            "corpora; bands: 95 % over documents, and 95 % of other coordinates. SmolLM2-135M, "
            f"{documents}.",
            draw=links,
        ),
    ]
    if scale == "laptop":
        made.append(
            Drawing(
                name="by-layer",
                caption="Above: rise of the loss with the outliers disabled in both norms of one layer. "
                "Below: mean size of their links to frequency in the states that the layer reads. "
                f"SmolLM2-135M, {documents}.",
                draw=by_layer,
            )
        )
    return made
