"""Laws of the accounting: what is forced counts, nothing exceeds the budget, bytes follow the formula."""

import pytest
import torch
from torch import Tensor

from fourfold_loki.attention import most_relevant
from fourfold_loki.budget import Budget, Count, Mass, Share

AMOUNTS = [Share(of_visible=0.3), Count(keys=17)]


def scene() -> tuple[Tensor, Tensor]:
    """Scores of 6 query heads over 2 key/value heads, and a causal mask with padding on the left."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 6, 20, 40, generator=generator)
    visible = torch.ones(20, 40, dtype=torch.bool).tril(20).expand(2, 1, -1, -1).clone()
    visible[1, :, :, :7] = False
    return scores, visible


@pytest.mark.parametrize("amount", AMOUNTS, ids=str)
@pytest.mark.parametrize("selection", ["per head", "shared in groups"])
@pytest.mark.parametrize("page", [1, 4])
@pytest.mark.parametrize(("sinks", "window"), [(0, 0), (2, 3)])
def test_nothing_exceeds_the_count_and_forced_keys_are_in_it(
    amount: Share | Count, selection: str, page: int, sinks: int, window: int
) -> None:
    """In whole pages where there are pages, of what is visible only."""
    scores, visible = scene()
    budget = Budget(
        amount=amount,
        selection=selection,  # type: ignore[arg-type]
        page=page,
        sinks=sinks,
        window=window,
    )
    keep = budget.keep(scores, visible, kv_heads=2, layer=0)
    assert keep.shape[1] == (6 if selection == "per head" else 2)
    assert not (keep & ~visible).any()
    seen = visible.sum(-1)
    allowed = budget.allowance(visible)
    if page == 1:
        assert torch.equal(keep.sum(-1), allowed.minimum(seen).expand(-1, keep.shape[1], -1))
        position = visible.cumsum(-1)
        forced = visible & ((position <= sinks) | (position > seen[..., None] - window))
        fits = (allowed >= sinks + window)[..., None]
        assert not (forced & fits & ~keep).any()
    else:
        assert (keep.sum(-1) <= allowed.clamp(min=page)).all()


@pytest.mark.parametrize("amount", [Share(of_visible=1.0), Count(keys=64)], ids=str)
def test_a_budget_for_all_keys_keeps_all_keys(amount: Share | Count) -> None:
    """Pages that padding or the end leaves short included."""
    scores, visible = scene()
    for page in (1, 4, 16):
        budget = Budget(amount=amount, page=page)
        keep = budget.keep(scores, visible, kv_heads=2, layer=0)
        assert torch.equal(keep, visible.expand(-1, 2, -1, -1))


def test_a_budget_below_a_page_keeps_one_page() -> None:
    """Where all keys rank alike too, and whatever another row of the batch looks like."""
    visible = torch.ones(2, 1, 1, 49, dtype=torch.bool)
    scores = torch.randn(2, 2, 1, 49, generator=torch.Generator().manual_seed(0))
    scores[0] = 0
    for amount in (Share(of_visible=0.25), Count(keys=8)):
        budget = Budget(amount=amount, page=16)
        keep = budget.keep(scores, visible, kv_heads=2, layer=0)
        assert keep[0].sum(-1).tolist() == [[16], [16]]
        assert set(keep[1].sum(-1).flatten().tolist()) <= {1, 16}


@pytest.mark.parametrize("page", [1, 16])
def test_kernels_and_masks_count_alike(page: int) -> None:
    """Also for shares that float32 rounds up to a key more, and for counts above the length."""
    for amount in (
        *(Share(of_visible=share) for share in (0.1, 0.29, 0.35, 0.7, 1.0)),
        *(Count(keys=keys) for keys in (5, 128)),
    ):
        budget = Budget(amount=amount, page=page)
        for seen in (1, 15, 20, 49, 60, 100, 200):
            visible = torch.ones(1, 1, 1, seen, dtype=torch.bool)
            scores = torch.arange(seen).flip(0).float().expand(1, 1, 1, -1)
            kept = int(budget.keep(scores, visible, kv_heads=1, layer=0).sum())
            assert kept == min(budget.units(seen) * page, seen), (amount, seen)


def test_a_share_below_sinks_and_window_keeps_the_earliest_of_them() -> None:
    visible = torch.ones(1, 1, 1, 64, dtype=torch.bool)
    budget = Budget(amount=Share(of_visible=0.25), sinks=4, window=32)
    keep = budget.keep(torch.randn(1, 1, 1, 64), visible, kv_heads=1, layer=0)
    assert keep[0, 0, 0].nonzero().flatten().tolist() == [*range(4), *range(32, 44)]


@pytest.mark.parametrize("padding", range(16))
def test_a_count_that_is_accepted_loses_neither_sinks_nor_window(padding: int) -> None:
    budget = Budget(amount=Count(keys=80), sinks=2, window=32, page=16)
    visible = (torch.arange(200) >= padding).expand(1, 1, 1, 200)
    keep = budget.keep(torch.randn(1, 1, 1, 200), visible, kv_heads=1, layer=0)[0, 0, 0]
    assert bool(keep[padding : padding + 2].all())
    assert bool(keep[-32:].all())


def test_short_queries_read_everything() -> None:
    scores, visible = scene()
    keep = Budget(amount=Count(keys=2), dense_below=30).keep(scores, visible, kv_heads=2, layer=0)
    short = visible.sum(-1) < 30
    assert torch.equal(keep.sum(-1) == visible.sum(-1), short.expand(-1, 2, -1))


def test_forced_keys_alone_are_streaming() -> None:
    """A budget of sinks and window ranks nothing."""
    scores, visible = scene()
    budget = Budget(amount=Count(keys=5), sinks=2, window=3)
    keep = budget.keep(scores, visible, kv_heads=2, layer=0)
    other = budget.keep(-scores, visible, kv_heads=2, layer=0)
    assert torch.equal(keep, other)


def test_mass_keeps_the_fewest_keys_that_claim_it() -> None:
    scores, visible = scene()
    budget = Budget(amount=Mass(claimed=(0.8,), floor=1), selection="per head")
    keep = budget.keep(scores, visible, kv_heads=2, layer=0)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    kept_mass = (weights * keep).sum(-1)
    lightest = (weights.masked_fill(~keep, 2.0)).amin(-1)
    assert (kept_mass >= 0.8 - 1e-6).all()
    assert (kept_mass - lightest < 0.8).all()


def test_reads_follow_the_formula() -> None:
    """d/(2D) + k_f of dense attention; per query head, up to as many times k_f as the group has heads."""
    from fourfold_loki.huggingface.reads import Reads

    scores, visible = scene()
    visible = torch.ones_like(visible)
    for selection, times in (("shared in groups", 1.0), ("per head", 3.0)):
        reads = Reads(ranking=0.25)
        budget = Budget(amount=Share(of_visible=0.25), selection=selection)  # type: ignore[arg-type]
        reads.add_masks(budget.keep(scores, visible, kv_heads=2, layer=0), visible, kv_heads=2)
        assert 0.25 <= reads.share <= 0.25 * times
        assert reads.read_share == pytest.approx(reads.share + 0.125)


def test_the_boundary_of_bfloat16_scores_and_unequal_counts() -> None:
    scores, visible = scene()
    counts = torch.arange(1, 21).expand(2, 1, 20)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        keep = most_relevant(scores.to(dtype), visible, counts)
        assert torch.equal(keep.sum(-1), counts.minimum(visible.sum(-1)).expand(-1, 6, -1))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Share(of_visible=1.2), "of_visible=1.2"),
        (lambda: Budget(amount=0.25), r"amount=0\.25 .* amount=Share\(of_visible"),  # type: ignore[arg-type]
        (lambda: Budget(amount=64), r"amount=64 .* amount=Count\(keys"),  # type: ignore[arg-type]
        (lambda: Count(keys=-1), "keys=-1"),
        (lambda: Mass(claimed=(), floor=1), "claimed"),
        (lambda: Mass(claimed=(0.5,), floor=0), "floor=0"),
        (lambda: Budget(amount=Count(keys=3), sinks=-1), "sinks=-1"),
        (lambda: Budget(amount=Count(keys=3), page=0), "page=0"),
        (lambda: Budget(amount=Count(keys=3), sinks=2, window=2), "sinks=2 and window=2"),
        (lambda: Budget(amount=Count(keys=40), sinks=1, window=32, page=16), "or 64 keys"),
    ],
)
def test_a_budget_that_means_nothing_is_refused(make, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words):
        make()
