"""Bounds on what comes out nearly verbatim, against every continuation there is."""

import itertools

import pytest
import torch
from rapidfuzz.distance import Levenshtein

from fourfold_goldfish.memorization.extraction import Sampling, recital_probabilities, sample
from fourfold_goldfish.memorization.near_verbatim import near_verbatim
from fourfold_parallel.run.models import Llama

VOCABULARY, SUFFIX = 5, 4


@pytest.fixture(scope="module")
def model():  # type: ignore[no-untyped-def]
    shape = {"width": 16, "depth": 1, "heads": 2, "kv_heads": 2, "hidden": 16}
    built = Llama(**shape, vocabulary=VOCABULARY, context=32, tied=True).build(seed=3).eval()
    with torch.no_grad():
        built.get_output_embeddings().weight.mul_(40)
    return built


def by_enumeration(model, passage: torch.Tensor, sampling: Sampling) -> dict[int, float]:  # type: ignore[no-untyped-def]
    """The chance of each edit distance, summed over all continuations."""
    every = torch.tensor([*itertools.product(range(VOCABULARY), repeat=SUFFIX)])
    rows = torch.cat([passage[:-SUFFIX].expand(len(every), -1), every], dim=1)
    chances = recital_probabilities(model, rows, suffix=SUFFIX, sampling=sampling)
    totals = dict.fromkeys(range(SUFFIX + 1), 0.0)
    for row, chance in zip(every.tolist(), chances.tolist(), strict=True):
        totals[Levenshtein.distance(row, passage[-SUFFIX:].tolist())] += chance
    return totals


@pytest.mark.parametrize("distance", [0, 1, 2, 3])
@pytest.mark.parametrize("top_k", [3, VOCABULARY])
@pytest.mark.parametrize("suffix", [[0, 1, 2, 3], [2, 2, 2, 2], [1, 2, 1, 2]], ids=str)
def test_a_whole_search_is_enumeration(model, distance: int, top_k: int, suffix: list[int]) -> None:  # type: ignore[no-untyped-def]
    """Both bounds are the sum over every continuation, whatever repeats in the text."""
    passage = torch.tensor([3, 0, 4, *suffix])
    sampling = Sampling(top_k=top_k)
    bounds = near_verbatim(
        model, passage, suffix=SUFFIX, distance=distance, sampling=sampling, passes=10_000
    )
    totals = by_enumeration(model, passage, sampling)
    within = sum(totals[edits] for edits in range(distance + 1))
    assert bounds.is_closed
    assert bounds.lower == pytest.approx(within, abs=1e-5)
    assert bounds.exact == pytest.approx(totals[0], abs=1e-6)


def test_bounds_close_in_on_the_chance_from_both_sides(model) -> None:  # type: ignore[no-untyped-def]
    """At every budget the chance lies between them, and neither ever turns back."""
    passage = torch.tensor([3, 0, 4, 1, 2, 1, 3])
    sampling = Sampling(temperature=2.0)
    totals = by_enumeration(model, passage, sampling)
    chance = totals[0] + totals[1] + totals[2]
    lower, upper = 0.0, 1.0
    for passes in (1, 2, 5, 10, 30, 100):
        bounds = near_verbatim(
            model, passage, suffix=SUFFIX, distance=2, sampling=sampling, passes=passes, batch=1
        )
        assert bounds.passes <= passes
        assert lower - 1e-6 <= bounds.lower <= chance + 1e-5
        assert chance - 1e-5 <= bounds.upper <= upper + 1e-6
        lower, upper = bounds.lower, bounds.upper
    assert upper - lower < 0.2


def test_samples_are_within_the_distance_as_often_as_the_bounds_say(model) -> None:  # type: ignore[no-untyped-def]
    passage = torch.tensor([3, 0, 4, 1, 2, 1, 3])
    sampling = Sampling(top_k=4)
    drawn = sample(model, passage[None, :3].expand(2000, -1), SUFFIX, sampling=sampling, seed=0)
    true = passage[-SUFFIX:].tolist()
    share = sum(Levenshtein.distance(row, true) <= 2 for row in drawn.tolist()) / 2000
    bounds = near_verbatim(model, passage, suffix=SUFFIX, distance=2, sampling=sampling, passes=999)
    assert bounds.lower - 0.05 < share < bounds.upper + 0.05


def test_a_distance_that_allows_everything_is_refused(model) -> None:  # type: ignore[no-untyped-def]
    passage = torch.arange(5)
    with pytest.raises(ValueError, match="allows every continuation"):
        near_verbatim(model, passage, suffix=4, distance=4, sampling=Sampling())
    with pytest.raises(ValueError, match="leaves no prompt"):
        near_verbatim(model, passage, suffix=5, distance=1, sampling=Sampling())
