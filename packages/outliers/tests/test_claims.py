"""Rules on records made here: each verdict is reached where it should be, and not beside."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fourfold_outliers.reproduce import claims
from fourfold_outliers.reproduce.experiment import EXPERIMENT
from fourfold_outliers.reproduce.measures import effect_and_link, magnitude
from fourfold_outliers.reproduce.recipes import ARMS, SEEDS
from fourfold_parallel.common.records import Event, Record
from fourfold_parallel.reproduce.claims import Records


def record(*events: dict[str, Any]) -> Record:
    first = {"event": "run", "schema": 1, "seed": 0, "overrides": []}
    lines = [Event(n, v, "made.jsonl") for n, v in enumerate((first, *events), start=1)]
    return Record(Path("made.jsonl"), tuple(lines))


def languages(**by_arm: list[int]) -> Records:
    """Outliers in the two inner layers at the end, by seed."""
    return {
        f"language-{arm}-seed{seed}": record(
            {"event": "outliers", "outliers_by_layer": [9, by_arm[arm][seed], by_arm[arm][seed], 9]}
        )
        for arm in ARMS
        if arm in by_arm
        for seed in SEEDS
    }


@pytest.mark.parametrize(
    ("zipf", "flat", "verdict"),
    [
        ([2, 2, 3], [0, 0, 0], "reproduced"),
        ([0, 0, 0], [0, 0, 0], "inconclusive"),
        ([1, 1, 1], [1, 1, 1], "contradicted"),
        ([4, 0, 0], [0, 1, 0], "inconclusive"),
    ],
)
def test_frequency_drives(zipf: list[int], flat: list[int], verdict: str) -> None:
    """No outlier anywhere is no evidence: there was nothing to drive."""
    assert claims.frequency_drives.judge(languages(zipf=zipf, flat=flat)).verdict == verdict


def test_the_head_makes_them_where_most_go() -> None:
    judge = claims.by_way_of_the_head.judge
    assert judge(languages(zipf=[4, 4, 4], given=[0, 0, 0])).verdict == "reproduced"
    assert judge(languages(zipf=[4, 4, 4], given=[3, 3, 3])).verdict == "inconclusive"
    assert judge(languages(zipf=[2, 2, 2], given=[2, 3, 2])).verdict != "reproduced"


def disabled(harm: float, random: float) -> Records:
    base = np.linspace(2, 4, 8)
    wobble = 0.01 * np.cos(np.arange(8))

    def arm(name: str, more: float) -> dict[str, Any]:
        return {"event": "arm", "arm": name, "loss_nats": [*(base + more + wobble * (more > 0))]}

    others = [arm(kind, random) for kind in ("random", "matched") for _ in range(3)]
    return {"disabling": record(arm("as it is", 0), arm("found", harm), *others)}


@pytest.mark.parametrize(
    ("harm", "verdict"), [(2.0, "reproduced"), (0.5, "inconclusive"), (0.2, "contradicted")]
)
def test_ruin_is_ten_times_what_others_do(harm: float, verdict: str) -> None:
    assert claims.ruins.judge(disabled(harm, 0.1)).verdict == verdict


def linked(*intervals: tuple[float, float, float]) -> Records:
    events = [
        {"event": "link", "coordinate": n, "value": value, "low": low, "high": high}
        for n, (value, low, high) in enumerate(intervals)
    ]
    return {"frequency": record(*events, {"event": "others", "p95": 0.2})}


def test_a_link_counts_whatever_its_sign() -> None:
    strong, against = (0.5, 0.4, 0.6), (-0.5, -0.6, -0.4)
    weak, wide = (0.1, 0.05, 0.15), (0.3, -0.1, 0.7)
    judge = claims.linked_to_frequency.judge
    assert judge(linked(strong, against, weak)).verdict == "reproduced"
    assert judge(linked(against, weak, wide)).verdict == "inconclusive"
    assert judge(linked(weak, wide)).verdict == "contradicted"
    event = linked(wide)["frequency"].of("link")[0]
    assert magnitude(event).low == 0


def test_effect_and_link_are_compared_where_a_layer_reads() -> None:
    """The link of the states that enter a layer, not of those that leave it."""
    rises = np.asarray([0.1, 0.5, 0.3, 0.9])
    layers = [{"event": "layer", "layer": 0, "loss_nats": [1.0] * 6}]
    layers += [
        {"event": "layer", "layer": n, "loss_nats": [1.0 + float(rise)] * 6}
        for n, rise in enumerate(rises, start=1)
    ]
    size = [*map(float, rises), -5.0]
    halves = {"event": "halves", "size_by_layer": size, "resampled": [size] * 10}
    together = effect_and_link({"by-layer": record(*layers), "frequency": record(halves)})
    assert (together.value, together.low, together.high) == (1.0, 1.0, 1.0)


def test_every_claim_says_at_which_scale_it_is_judged_or_what_it_needs() -> None:
    assert [claim.id for claim in EXPERIMENT.claims] == [
        *(f"O{n}" for n in range(1, 9)), "N1", "N2", "N3",
    ]  # fmt: skip
    assert all(claim.needs for claim in EXPERIMENT.claims)
    assert all("laptop" in claim.scales for claim in EXPERIMENT.claims if claim.id != "O8")
