"""The laws that every selector of the catalogue keeps, and settings at which some could go wrong."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fourfold_loki import CATALOGUE, Budget, Count, Selector, Share, Sparse, Statistics, attending
from fourfold_loki.attention import attend
from fourfold_loki.selectors import Candidates, Quest, SparQ, Streaming

FLOAT32 = 1e-5
HEADS, KV_HEADS, WIDTH = 6, 2, 16
"""Of the model in conftest, which the statistics are of."""

every_selector = pytest.mark.parametrize("name", CATALOGUE)


def candidates(
    tokens: int, *, queries: int = 1, batch: int = 1, dtype: torch.dtype = torch.float32
) -> Candidates:
    """The last queries of a sequence over all its keys, at random."""
    generator = torch.Generator().manual_seed(tokens)
    visible = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
    visible = visible.expand(batch, 1, queries, tokens)
    return Candidates(
        queries=torch.randn(batch, HEADS, queries, WIDTH, generator=generator).to(dtype),
        keys=torch.randn(batch, KV_HEADS, tokens, WIDTH, generator=generator).to(dtype),
        visible=visible,
        scaling=0.25,
        layer=1,
        turned=False,
        past_mass=torch.zeros(batch, HEADS, tokens),
        allowance=torch.full((batch, 1, queries), 32),
    )


def test_every_selector_is_in_the_catalogue(statistics: Statistics) -> None:
    def below(kind: type[Selector]) -> set[str]:
        own = {kind.__name__} if kind.__module__.startswith("fourfold_") else set()
        return own.union(*(below(each) for each in kind.__subclasses__()))

    listed = {type(make(statistics)).__name__ for make in CATALOGUE.values()}
    assert listed == below(Selector) - {"Selector"}


@every_selector
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_query_gives_each_key_a_score(
    name: str, dtype: torch.dtype, statistics: Statistics
) -> None:
    """No NaN; the same question gets the same answer, and leaves queries and keys as they were."""
    selector, among = CATALOGUE[name](statistics), candidates(40, queries=3, batch=2, dtype=dtype)
    before = among.queries.clone(), among.keys.clone()
    scores, mass = selector.follow(among)
    assert scores.shape == (2, HEADS, 3, 40)
    assert mass.shape == (2, HEADS, 40)
    assert scores.is_floating_point()
    assert not scores.isnan().any()
    assert torch.equal(scores, selector.scores(among))
    assert torch.equal(among.queries, before[0])
    assert torch.equal(among.keys, before[1])


@every_selector
def test_the_sequences_of_a_batch_do_not_mix(name: str, statistics: Statistics) -> None:
    selector, both = CATALOGUE[name](statistics), candidates(40, queries=2, batch=2)
    first = replace(
        both,
        queries=both.queries[:1],
        keys=both.keys[:1],
        visible=both.visible[:1],
        past_mass=both.past_mass[:1],
        allowance=both.allowance[:1],
    )
    torch.testing.assert_close(selector.scores(both)[:1], selector.scores(first))


@every_selector
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("selection", ["per head", "shared in groups"])
def test_a_budget_is_used_whole_and_never_exceeded(
    name: str, dtype: torch.dtype, selection: str, statistics: Statistics
) -> None:
    """Eviction, which keeps count of earlier queries, may keep less."""
    selector, among = CATALOGUE[name](statistics), candidates(300, dtype=dtype)
    budget = Budget(amount=Count(keys=32), selection=selection)  # type: ignore[arg-type]
    keep = budget.keep(selector.scores(among), among.visible, kv_heads=KV_HEADS, layer=1)
    kept = keep.sum(-1)
    assert keep.shape[1] == (HEADS if selection == "per head" else KV_HEADS)
    assert (kept <= 32).all()
    assert (kept >= 1).all()
    assert selector.keeps_count or (kept == 32).all()


@every_selector
def test_keeping_every_key_is_full_attention(name: str, statistics: Statistics) -> None:
    """Where whole queries and keys weigh the values, and nothing was evicted before."""
    selector, among = CATALOGUE[name](statistics), candidates(40)
    values = torch.randn(1, KV_HEADS, 40, WIDTH, generator=torch.Generator().manual_seed(1))
    everything = among.visible.expand(-1, HEADS, -1, -1)
    full = attend(among.queries, among.keys, values, everything, scaling=among.scaling)
    budget = Budget(amount=Share(of_visible=1.0), selection="per head")
    scores = selector.scores(replace(among, allowance=torch.full((1, 1, 1), 2 * 40)))
    keep = budget.keep(scores, among.visible, kv_heads=KV_HEADS, layer=1)
    ours = attend(*selector.compared(among), values, keep, scaling=among.scaling)
    is_whole = type(selector).compared is Selector.compared
    assert torch.allclose(ours, full, atol=FLOAT32) == is_whole


@every_selector
@pytest.mark.parametrize("group", [1, 3])
def test_ranking_costs_at_most_a_read_of_all_keys(
    name: str, group: int, statistics: Statistics
) -> None:
    """Less than nothing where not even all coordinates of the kept keys are read."""
    cost = CATALOGUE[name](statistics).cost(head_width=WIDTH, group=group)
    assert -1 <= cost <= 1


@every_selector
def test_a_model_generates_within_the_budget(
    name: str, statistics: Statistics, llama: PreTrainedModel, tokens: Callable[..., Tensor]
) -> None:
    """And as with full attention where the budget holds everything."""
    ids, selector = tokens(1, 64), CATALOGUE[name](statistics)

    def generated() -> list[list[int]]:
        return llama.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
        ).tolist()

    full = generated()
    is_exact = type(selector).compared is Selector.compared and not selector.keeps_count
    group = HEADS // KV_HEADS
    for share in (1.0, 0.25):
        for selection, most in (("per head", group * share), ("shared in groups", share)):
            budget = Budget(amount=Share(of_visible=share), selection=selection)  # type: ignore[arg-type]
            with attending(llama, Sparse(selector=selector, budget=budget)) as session:
                text = generated()
            # vAttention reads a sample besides.
            assert 0 < session.reads.share <= (1.0 if name == "vattention" else min(1.0, most))
            assert text == full or share < 1 or not is_exact


def test_recency_counts_in_bfloat16_too() -> None:
    """Numbers of 8 bits tell no neighbours apart above 256."""
    among = candidates(8192, dtype=torch.bfloat16)
    budget = Budget(amount=Count(keys=16), selection="per head")
    scores = Streaming(sinks=2).scores(among)
    keep = budget.keep(scores, among.visible, kv_heads=KV_HEADS, layer=0)
    for head in range(HEADS):
        assert keep[0, head, 0].nonzero().flatten().tolist() == [0, 1, *range(8178, 8192)]


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="sinks=-1"):
        Streaming(sinks=-1)
    with pytest.raises(ValueError, match="page=0"):
        Quest(page=0)
    with pytest.raises(ValueError, match="channels=0"):
        SparQ(channels=0)
    with pytest.raises(ValueError, match="channels=17 of a head of 16"):
        SparQ(channels=17).scores(candidates(20))
