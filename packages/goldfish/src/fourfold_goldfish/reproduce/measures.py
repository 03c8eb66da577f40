"""Measures on the records: functions that rules and figures share."""

import math
from typing import Literal

import numpy as np

from fourfold_goldfish.memorization.membership import auc
from fourfold_goldfish.reproduce.recipes import ONE_PASS_SEEDS, REPETITIONS, SEEDS
from fourfold_parallel.common.records import Event
from fourfold_parallel.reproduce.claims import Interval, Records, over_seeds, proportion


def extractions(
    records: Records, series: str, bucket: str, repetitions: int | None = None
) -> list[Event]:
    """The "extraction" event of a bucket for each seed; None where the run has one such bucket."""
    fields = {} if repetitions is None else {"repetitions": repetitions}
    return [
        records[f"{series}-seed{seed}"].only("extraction", bucket=bucket, **fields)
        for seed in SEEDS
    ]


def pooled(events: list[Event], successes: str, trials: str) -> Interval:
    """A share of two counts, pooled over events of one seed each."""
    counts = [sum(int(event.number(key)) for event in events) for key in (successes, trials)]
    return proportion(*counts, seeds=len(events))


def recited(records: Records, series: str, bucket: str, repetitions: int | None = None) -> Interval:
    """Share of passages recited verbatim, pooled over seeds."""
    return pooled(extractions(records, series, bucket, repetitions), "exact", "passages")


def headline(records: Records) -> str:
    """The finding in a sentence: a pretrained model recites, and does not."""
    plain, goldfish = (
        recited(records, f"smollm2-{arm}", "trained").value for arm in ("plain", "k4")
    )
    return (
        f"SmolLM2, fine-tuned on passages that recur, recites {100 * plain:.0f} % of them word for word; "
        f"with one target in four left out, {100 * goldfish:.0f} %."
    )


def mean_rouge_l(events: list[Event]) -> Interval:
    """Mean ROUGE-L of the events' passages, over seeds."""
    return over_seeds([event.number("mean_rouge_l") for event in events])


def recital_law(k: int, suffix: int, guess: float = 0.0) -> float:
    """Chance that a passage whose kept targets are known by heart is recited all the same.

    Each of `suffix` tokens is left out with probability 1/k and then guessed with probability `guess`:
    (1 - (1 - guess)/k)^suffix. The paper gives no such law; it follows from its construction.
    """
    return (1 - (1 - guess) / k) ** suffix


def passage_scores(records: Records, name: str, bucket: str, key: str) -> np.ndarray:
    """A number of every passage of a bucket in one record."""
    return np.asarray([event.number(key) for event in records[name].of("passage", bucket=bucket)])


def membership_auc(records: Records, series: str, score: str) -> Interval:
    """Area under the ROC of a membership score, over seeds."""
    return over_seeds(
        [
            auc(
                passage_scores(records, f"{series}-seed{seed}", "trained", score),
                passage_scores(records, f"{series}-seed{seed}", "control", score),
            )
            for seed in SEEDS
        ]
    )


def validation_loss(records: Records, series: str) -> list[float]:
    """Unmasked validation loss at the end of each seed's run."""
    return [
        records[f"{series}-seed{seed}"].last("validation").number("validation_loss_nats")
        for seed in ONE_PASS_SEEDS
    ]


def passes_needed(
    records: Records, size: str, bound: Literal["value", "low", "high"] = "value"
) -> float:
    """Fewest repetitions at which half of a bucket is recited, pooled over seeds; inf if none.

    By the share itself, or by an end of its 95 % interval: the upper one needs fewest.
    """
    for repetitions in sorted(REPETITIONS):
        bucket = "trained" if repetitions else "control"
        share = recited(records, f"buckets-{size}-plain", bucket, repetitions)
        if getattr(share, bound) >= 0.5:
            return repetitions
    return math.inf
