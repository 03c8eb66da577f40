"""Cooling down, the rule of the learning rate, and the error of five laws on runs held out."""

from __future__ import annotations

import math

import numpy as np

from fourfold_gemstones.architecture import Embeddings
from fourfold_gemstones.laws import SHAPE_ONLY, WIDTH_DEPTH
from fourfold_gemstones.parametric import ParametricLaw
from fourfold_gemstones.published import preflight, published_frame
from fourfold_gemstones.questions.comparison import GEMSTONE_SPLITS, mean_error
from fourfold_gemstones.reproduce.paper.settings import Events, Revisit, spearman
from fourfold_gemstones.reproduce.stages import BOTH, paper_claim, published
from fourfold_parallel.reproduce.claims import Finding, Records


def held_out(run: Revisit) -> Events:
    """Mean error of five laws where runs were held out, and in sample."""
    table = published_frame("hot_100b+")
    laws = {
        "N, T": ParametricLaw(delta=1e-3),
        "N without embeddings, T": ParametricLaw(delta=1e-3, embeddings=Embeddings.NONE),
        "FLOPs per token, T": ParametricLaw(
            delta=1e-3, variables=("effective_parameters", "tokens")
        ),
        "w, d, T": ParametricLaw(delta=1e-3, variables=SHAPE_ONLY),
        "w, d, N, T": ParametricLaw(delta=1e-3, variables=WIDTH_DEPTH),
    }
    for name, law in laws.items():
        fit = run.fitted(law, table)
        residual = np.abs(np.log(table.column("loss_nats") / fit.predict(table)))
        inside = float(residual.mean())
        yield "held_out", {"law": name, "split": "in sample", "error_percent": 100 * inside}
        for split in GEMSTONE_SPLITS:
            error = mean_error(law, table, split)
            yield "held_out", {"law": name, "split": split.name, "error_percent": 100 * error}


def cooldown(run: Revisit) -> Events:
    """Gain of cooling down, against size and tokens."""
    del run
    begin, end = published_frame("cool_begin"), published_frame("cool_end")
    gain = np.log(begin.column("loss_nats")) - np.log(end.column("loss_nats"))
    nats = begin.column("loss_nats") - end.column("loss_nats")
    last = begin.column("tokens") > 9.9e10
    sizes = spearman(begin.column("parameters")[last], gain[last])
    first = begin.column("tokens") < 1.1e10
    yield (
        "cooldown",
        {
            "pairs": len(gain),
            "mean_nats": float(nats.mean()),
            "at_10b_nats": float(nats[first].mean()),
            "at_100b_nats": float(nats[last].mean()),
            "size_spearman_at_100b": sizes[0],
            "size_p_at_100b": sizes[1],
        },
    )


def learning_rates(run: Revisit) -> Events:
    """Best rate of each preflight shape, as it is and times width times the root of depth."""
    del run
    best: dict[tuple[int, int], tuple[float, float]] = {}
    for width, depth, rate, loss in preflight():
        if loss < best.get((width, depth), (math.inf, 0.0))[0]:
            best[width, depth] = (loss, rate)
    rates = np.asarray([rate for _, rate in best.values()])
    bases = np.asarray([rate * w * math.sqrt(d) for (w, d), (_, rate) in best.items()])
    yield (
        "learning_rates",
        {
            "shapes": len(best),
            "best_rates": rates.tolist(),
            "best_bases": bases.tolist(),
            "rate_ratio": float(rates.max() / rates.min()),
            "base_ratio": float(bases.max() / bases.min()),
        },
    )


@paper_claim(
    "C1",
    section="3.1",
    says="A base rate over width times root depth transfers",
    paper="one base for 22 shapes",
    rule="reproduced if the best base varies less than half as much as the best rate",
    scales=BOTH,
)
def learning_rate_rule(records: Records) -> Finding:
    """The rule lines the best rates up."""
    record = published(records)
    event = record.last("learning_rates")
    base, rate = event.number("base_ratio"), event.number("rate_ratio")
    ours = (
        f"best base varies {base:.1f}x, best rate {rate:.0f}x, {event.number('shapes'):.0f} shapes"
    )
    better = base < rate / 2
    return Finding(
        "reproduced" if better else "contradicted",
        ours,
        event,
        "the base varies less than half as much as the rate; one step of the sweep is 2 to 5x, so no "
        "finer statement is possible"
        if better
        else "the base varies as much as the rate",
    )
