"""Laws of the sums: parts add up, grouping changes nothing, what is planted is what is told."""

import pytest
import torch
from torch import Tensor

from fourfold_outliers.geometry import (
    Sums,
    by_parameter,
    by_share,
    by_variance,
    lasting,
    partition_isotropy,
    top_share,
)

EXACT = 1e-10
"""Float64 sums in another order."""


def states(tokens: int = 40, width: int = 24, *, seed: int = 0, offset: float = 1.0) -> Tensor:
    """Correlated coordinates about a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    return mixed @ torch.randn(width, width, generator=generator, dtype=torch.float64) + offset


def sums_of(*documents: Tensor) -> Sums:
    sums = Sums.empty(len(documents), 1, documents[0].shape[1])
    for number, document in enumerate(documents):
        sums.add_(number, 0, document)
    return sums


def mean_cosine(h: Tensor) -> float:
    """Over pairs, one at a time."""
    pairs = [
        float(torch.dot(h[i], h[j]) / (h[i].norm() * h[j].norm()))
        for i in range(len(h))
        for j in range(len(h))
        if i != j
    ]
    return sum(pairs) / len(pairs)


def test_contributions_add_up_to_the_mean_cosine_of_pairs() -> None:
    h = states()
    sums = sums_of(h)
    assert float(sums.contributions().sum()) == pytest.approx(mean_cosine(h), abs=EXACT)
    assert float(sums.cosines()[0, 0]) == pytest.approx(mean_cosine(h), abs=EXACT)


def test_streamed_statistics_are_those_of_two_passes() -> None:
    h = states(offset=30.0)
    sums = sums_of(*h.split(7))
    whole = sums.pooled()
    z = (h - h.mean(1, keepdim=True)).abs() / h.std(1, keepdim=True, correction=0)
    for ours, theirs in (
        (whole.means()[0, 0], h.mean(0)),
        (whole.variances()[0, 0], h.var(0, correction=0)),
        (whole.shares()[0, 0], (z > 3).double().mean(0)),
        (whole.norms()[0, 0], h.norm(dim=1).mean()),
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-10)


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [3, 30, 7]])
def test_no_grouping_into_chunks_or_documents_changes_a_number(sizes: list[int]) -> None:
    h = states()
    chunked = Sums.empty(1, 1, h.shape[1])
    for chunk in h.split(sizes):
        chunked.add_(0, 0, chunk)
    apart = sums_of(*h.split(sizes)).pooled()
    added = sum((sums_of(chunk) for chunk in h.split(sizes)[1:]), start=sums_of(h.split(sizes)[0]))
    for name in ("contributions", "variances", "shares"):
        expected = getattr(sums_of(h), name)()
        for sums in (chunked, apart, added):
            torch.testing.assert_close(getattr(sums, name)(), expected, atol=EXACT, rtol=EXACT)


def test_a_drawn_document_counts_as_often_as_it_is_drawn() -> None:
    documents = states().split(10)
    drawn = sums_of(*documents).drawn(torch.tensor([[2.0, 0.0, 1.0, 0.0]]))
    expected = sums_of(torch.cat([documents[0], documents[0], documents[2]]))
    torch.testing.assert_close(drawn.cosines(), expected.cosines(), atol=EXACT, rtol=0)


@pytest.mark.parametrize("kind", ["centred", "standardised", "without"])
def test_a_view_is_measured_as_its_states_are(kind: str) -> None:
    h = states(offset=5.0)
    first = sums_of(h)
    view = first.without((3, 7)) if kind == "without" else getattr(first, kind)()
    deviation = h.std(0, correction=0)
    kept = [d for d in range(h.shape[1]) if d not in (3, 7)]
    expected = {
        "centred": h - h.mean(0),
        "standardised": (h - h.mean(0)) / deviation,
        "without": h[:, kept],
    }[kind]
    assert float(sums_of(view(0, h)).cosines()) == pytest.approx(mean_cosine(expected), abs=1e-9)


def test_what_is_planted_is_found_and_nothing_else() -> None:
    """50 draws: a large value at some coordinates in most tokens, and in too few at another."""
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        h = torch.randn(60, 64, generator=generator, dtype=torch.float64)
        places = torch.randperm(64, generator=generator)
        planted, rare = places[:2], places[2]
        chosen = torch.randperm(60, generator=generator)
        h[chosen[:40, None], planted] += 40.0
        h[chosen[:20], rare] -= 40.0
        told = by_share(sums_of(h))[0]
        assert set(torch.nonzero(told).flatten().tolist()) == set(planted.tolist())


def test_the_three_definitions_name_different_sets() -> None:
    """What is far and steady is one by share, what swings by variance, a gain by parameter."""
    h = states(offset=0.0) * 0.1
    h[:, 2] = 50.0
    h[:, 5] = torch.linspace(-5, 5, len(h))
    gains = torch.ones(4, 24)
    gains[:, 9] += torch.linspace(5, 8, 4)
    gains[0, 11] = 30.0
    sums = sums_of(h)
    assert torch.nonzero(by_share(sums)[0]).flatten().tolist() == [2]
    assert torch.nonzero(by_variance(sums)[0]).flatten().tolist() == [5]
    assert torch.nonzero(by_parameter(gains)).flatten().tolist() == [9]


def test_an_outlier_lasts_from_half_of_the_layers_on() -> None:
    outliers = torch.zeros(4, 6, dtype=torch.bool)
    outliers[:2, 1] = outliers[:1, 4] = True
    assert lasting(outliers) == (1,)


def test_the_top_share_is_that_of_the_largest_three() -> None:
    parts = torch.tensor([[0.1, 0.4, 0.2, 0.25, 0.05]])
    assert float(top_share(parts)) == pytest.approx(0.85)


def test_isotropy_is_the_least_over_the_greatest_partition() -> None:
    """Against sums of exponentials along each axis, those without states included; it is 1 of a ball."""
    h = states(tokens=6, width=9)
    scaled = h / h.square().sum(1).mean().sqrt()
    _, axes = torch.linalg.eigh(scaled.T @ scaled)
    partitions = [
        sum(float(torch.exp(sign * (axis @ row))) for row in scaled)
        for axis in axes.T
        for sign in (1, -1)
    ]
    assert partition_isotropy(h) == pytest.approx(min(partitions) / max(partitions), rel=1e-9)
    ball = torch.cat([torch.eye(5), -torch.eye(5)])
    assert partition_isotropy(ball) == pytest.approx(1.0)


def test_pieces_of_the_width_are_measured_as_the_whole() -> None:
    """What a grid does over col: each rank gets sums over all coordinates from outside."""
    h = states()
    whole = sums_of(h)
    for start, stop in ((0, 10), (10, 24)):
        other = h[:, [d for d in range(24) if not start <= d < stop]]
        rest = iter(
            [
                torch.full((len(h),), float(other.shape[1]), dtype=torch.float64),
                torch.stack([other.sum(1), other.square().sum(1)]),
            ]
        )
        piece = Sums.empty(1, 1, stop - start)
        piece.add_(0, 0, h[:, start:stop], over_width=lambda t, rest=rest: t + next(rest))
        for name in ("beyond", "unit", "total"):
            torch.testing.assert_close(
                getattr(piece, name), getattr(whole, name)[..., start:stop], atol=EXACT, rtol=0
            )
