"""Numbers that claims, figures and tables take from the records."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from fourfold_outliers.frequency import spearman
from fourfold_outliers.reproduce.recipes import Arm
from fourfold_outliers.resampling import halves, interval
from fourfold_parallel.common.records import Event, Record
from fourfold_parallel.reproduce.claims import Interval, Records, over_seeds


def outliers_in(records: Records) -> list[int]:
    """The outliers: coordinates that are so by share in at least half of the inner layers.

    Raises:
        ValueError: there are none, and what is disabled or linked has no object.
    """
    outliers = [int(d) for d in records["geometry"].only("found").numbers("coordinates")]
    if not outliers:
        raise ValueError(
            "no coordinate is an outlier by share in half of the inner layers; use another model"
        )
    return outliers


def layers_in(records: Records) -> tuple[Event, ...]:
    """Events of the layers, the embedding's first."""
    return records["geometry"].of("layer")


def whole(event: Event) -> Interval:
    """An interval that a stage made."""
    return Interval(
        value=event.number("value"), low=event.number("low"), high=event.number("high"),
        seeds=0,
    )  # fmt: skip


def table_of(event: Event, key: str) -> dict[str, Any]:
    """An object of an event."""
    value = event.values[key]
    assert isinstance(value, dict)
    return value


def arms(record: Record, name: str) -> list[Event]:
    """Events of an arm's name."""
    return [*record.of("arm", arm=name)]


def losses(event: Event) -> Float[np.ndarray, " document"]:
    """Nats a target, document by document."""
    return np.asarray(event.numbers("loss_nats"))


def rise(record: Record, event: Event) -> Interval:
    """Nats a target that an arm loses, over documents."""
    more = losses(event) - losses(arms(record, "as it is")[0])
    weights = halves(len(more))
    return interval(float(more.mean()), weights @ more / weights.sum(1), len(more))


def rise_against(record: Record, against: str, times: float) -> Interval:
    """The outliers' loss rise less so many times the median rise of other sets as large, over documents.

    A difference, since the median rise may be near zero, where a ratio has no interval.
    """
    base, outliers = losses(arms(record, "as it is")[0]), losses(arms(record, "found")[0])
    others = np.stack([losses(event) for event in arms(record, against)])

    def gap(weights: Float[np.ndarray, "draw document"]) -> Float[np.ndarray, " draw"]:
        share = weights / weights.sum(1, keepdims=True)
        return share @ (outliers - base) - times * np.median(share @ (others - base).T, axis=1)

    count = len(base)
    return interval(float(gap(np.ones((1, count)))[0]), gap(halves(count)), count)


def median_rise(record: Record, against: str) -> float:
    """Median loss rise of an arm's sets."""
    return float(np.median([rise(record, event).value for event in arms(record, against)]))


def attention_left(record: Record, event: Event, key: str = "to_first") -> Interval:
    """Attention to position 0 under an arm over that of the model as it is."""
    base = np.asarray(arms(record, "as it is")[0].numbers(key))
    mine = np.asarray(event.numbers(key))
    weights = halves(len(base))
    return interval(float(mine.sum() / base.sum()), (weights @ mine) / (weights @ base), len(base))


def magnitude(event: Event) -> Interval:
    """Size of a link, whatever its sign; an interval that holds zero begins at zero."""
    signed = whole(event)
    holds_zero = signed.low <= 0 <= signed.high
    ends = sorted((abs(signed.low), abs(signed.high)))
    return Interval(
        value=abs(signed.value), low=0.0 if holds_zero else ends[0], high=ends[1], seeds=0
    )


def layer_rises(record: Record) -> Float[np.ndarray, "document layer"]:
    """Loss rise of each document, for each layer in which the outliers are disabled."""
    base, *each = [losses(event) for event in record.of("layer")]
    return np.stack(each, axis=1) - base[:, None]


def effect_and_link(records: Records) -> Interval:
    """Rank correlation over layers of the loss rise with the size of the link where the layer reads."""
    event = records["frequency"].only("halves")
    rises = layer_rises(records["by-layer"])
    size = np.asarray(event.numbers("size_by_layer"))[:-1]
    stored = event.values["resampled"]
    assert isinstance(stored, list)
    drawn = np.asarray(stored, dtype=np.float64)[:, :-1]
    weights = halves(len(rises), times=len(drawn))
    shares = weights / weights.sum(1, keepdims=True)
    resampled = np.asarray(
        [
            spearman((share @ rises)[:, None], size)[0]
            for share, size in zip(shares, drawn, strict=True)
        ]
    )
    value = float(spearman(rises.mean(0)[:, None], size)[0])
    return interval(value, resampled, len(rises))


def spoken(records: Records, arm: Arm, seeds: Sequence[int]) -> list[Record]:
    """Records of an arm's runs."""
    return [records[f"language-{arm}-seed{seed}"] for seed in seeds]


def inner(values: Sequence[float]) -> float:
    """Mean over inner layers: neither the embedding nor the last."""
    return math.fsum(values[1:-1]) / len(values[1:-1])


def last_of(record: Record, key: str) -> float:
    """A number of the last validation's event, mean over inner layers."""
    return inner(record.last("outliers").numbers(key))


def apart(
    records: Records, more: Arm, less: Arm, seeds: Sequence[int], key: str = "outliers_by_layer"
) -> Interval:
    """A number of one arm less that of another, over seeds."""
    pairs = zip(spoken(records, more, seeds), spoken(records, less, seeds), strict=True)
    return over_seeds([last_of(mine, key) - last_of(other, key) for mine, other in pairs])


def headline(records: Records) -> str:
    """The finding in a sentence."""
    outliers = outliers_in(records)
    harm = rise(records["disabling"], arms(records["disabling"], "found")[0]).value
    median = median_rise(records["disabling"], "random")
    counts = {
        arm: np.mean(
            [last_of(record, "outliers_by_layer") for record in spoken(records, arm, (0,))]
        )
        for arm in ("zipf", "flat")
    }
    return (
        f"{len(outliers)} of SmolLM2's 576 coordinates carry it: without them the loss rises by {harm:.2g} "
        f"nats, without as many others by {median:.2g}. A small model of a language with Zipf's "
        f"frequencies has {counts['zipf']:.2g} outliers a layer, of a flat one {counts['flat']:.2g}."
    )
