"""Laws of the idea: what holds for any queries, keys, basis and budget."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fourfold_loki.attention import (
    Rotation,
    approximate_scores,
    attend,
    loki_attention,
    most_relevant,
    scores_of,
    shared_in_groups,
)

shapes = st.tuples(
    st.integers(1, 2),  # batch
    st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (9, 3)]),
    st.sampled_from([8, 16]),  # head width
    st.integers(1, 24),  # tokens
    st.integers(0, 2**31),
)
FLOAT32 = 1e-5
"""Relative; sums of a few dozen products of size one."""


def scene(shape) -> tuple[Tensor, Tensor, Tensor, Tensor, Rotation]:  # type: ignore[no-untyped-def]
    """Random queries, keys, values, a causal mask and a random invertible basis."""
    batch, (heads, kv_heads), width, tokens, seed = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    queries = normal(batch, heads, tokens, width)
    keys, values = normal(batch, kv_heads, tokens, width), normal(batch, kv_heads, tokens, width)
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(batch, 1, -1, -1)
    w = torch.linalg.qr(normal(kv_heads, width, width)).Q * (0.5 + torch.rand(kv_heads, 1, width))
    return queries, keys, values, causal, Rotation(w, torch.linalg.inv(w).mT.contiguous())


def dense(queries: Tensor, keys: Tensor, values: Tensor, causal: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        queries,
        keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1),
        values.repeat_interleave(queries.shape[1] // keys.shape[1], 1),
        attn_mask=causal,
    )


def loki_of(queries, keys, values, causal, rotation, *, width, counts, selection="per head"):  # type: ignore[no-untyped-def]
    return loki_attention(
        queries,
        keys,
        values,
        rotation=rotation,
        width=width,
        counts=counts,
        visible=causal,
        scaling=queries.shape[-1] ** -0.5,
        selection=selection,
    )


@given(shapes)
@settings(max_examples=30, deadline=None)
def test_turning_changes_no_score(shape) -> None:  # type: ignore[no-untyped-def]
    queries, keys, _, _, rotation = scene(shape)
    turned = scores_of(rotation.turn_queries(queries), rotation.turn_keys(keys), scaling=1.0)
    torch.testing.assert_close(turned, scores_of(queries, keys, scaling=1.0))


@given(shapes, st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_keeping_every_key_is_full_attention_at_any_width(shape, width) -> None:  # type: ignore[no-untyped-def]
    queries, keys, values, causal, rotation = scene(shape)
    counts = torch.full((queries.shape[0], 1, queries.shape[2]), keys.shape[2])
    for selection in ("per head", "shared in groups"):
        output = loki_of(
            queries, keys, values, causal, rotation, width=width, counts=counts, selection=selection
        )
        torch.testing.assert_close(output, dense(queries, keys, values, causal))


@given(shapes, st.integers(1, 24))
@settings(max_examples=30, deadline=None)
def test_at_full_width_loki_is_exact_top_k(shape, count) -> None:  # type: ignore[no-untyped-def]
    queries, keys, values, causal, rotation = scene(shape)
    counts = torch.full((queries.shape[0], 1, queries.shape[2]), count)
    full = queries.shape[-1]
    output = loki_of(queries, keys, values, causal, rotation, width=full, counts=counts)
    scores = scores_of(queries, keys, scaling=full**-0.5)
    keep = most_relevant(scores, causal, counts)
    torch.testing.assert_close(output, attend(queries, keys, values, keep, scaling=full**-0.5))


@given(shapes, st.integers(1, 24), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_a_direction_common_to_all_keys_changes_no_selection(shape, count, width) -> None:  # type: ignore[no-untyped-def]
    """It shifts all scores of a query alike, where the basis is fixed."""
    queries, keys, values, causal, rotation = scene(shape)
    counts = torch.full((queries.shape[0], 1, queries.shape[2]), count)
    shift = queries[:, : keys.shape[1], -1:].flip(-1)
    args = {"rotation": rotation, "width": width, "counts": counts}
    one = loki_of(queries, keys, values, causal, **args)
    other = loki_of(queries, keys + shift, values, causal, **args)
    torch.testing.assert_close(one, other)


@given(shapes, st.integers(1, 24), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_the_order_of_the_cache_does_not_matter(shape, count, width) -> None:  # type: ignore[no-untyped-def]
    """One query that sees all keys gets the same output from any permutation of them."""
    queries, keys, values, _, rotation = scene(shape)
    queries = queries[:, :, -1:]
    seen = torch.ones(queries.shape[0], 1, 1, keys.shape[2], dtype=torch.bool)
    counts = torch.full((queries.shape[0], 1, 1), count)
    order = values[0, 0, :, 0].argsort()
    args = {"rotation": rotation, "width": width, "counts": counts}
    one = loki_of(queries, keys, values, seen, **args)
    other = loki_of(queries, keys[:, :, order], values[:, :, order], seen, **args)
    torch.testing.assert_close(one, other)


@given(shapes, st.integers(1, 24))
@settings(max_examples=30, deadline=None)
def test_more_keys_only_add_keys(shape, count) -> None:  # type: ignore[no-untyped-def]
    """Kept sets are nested, and hold exactly as many visible keys as asked for."""
    queries, keys, _, causal, _ = scene(shape)
    scores = scores_of(queries, keys, scaling=1.0)
    counts = torch.full((queries.shape[0], 1, queries.shape[2]), count)
    few = most_relevant(scores, causal, counts)
    more = most_relevant(scores, causal, counts + 3)
    assert not (few & ~more).any()
    assert not (few & ~causal).any()
    assert torch.equal(few.sum(-1), counts.minimum(causal.sum(-1)).expand(-1, scores.shape[1], -1))


def test_of_equal_scores_the_earliest_keys_are_kept() -> None:
    scores = torch.tensor([[[[1.0, 2.0, 1.0, 2.0, 1.0, 0.0]]]])
    seen = torch.ones_like(scores, dtype=torch.bool)
    keep = most_relevant(scores, seen, torch.tensor([[[4]]]))
    assert keep.tolist() == [[[[True, True, True, True, False, False]]]]


@given(shapes, st.integers(1, 24))
@settings(max_examples=20, deadline=None)
def test_sharing_within_groups_of_one_is_selection_per_head(shape, count) -> None:  # type: ignore[no-untyped-def]
    queries, keys, _, causal, _ = scene(shape)
    queries = queries[:, : keys.shape[1]]
    scores = scores_of(queries, keys, scaling=1.0)
    counts = torch.full((queries.shape[0], 1, queries.shape[2]), count)
    shared = shared_in_groups(scores, causal, kv_heads=keys.shape[1])
    assert torch.equal(most_relevant(shared, causal, counts), most_relevant(scores, causal, counts))


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    queries, keys = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    visible = torch.zeros(1, 1, 3, 5, dtype=torch.bool)
    keep = most_relevant(scores_of(queries, keys, scaling=1.0), visible, torch.ones(1, 1, 3).long())
    assert not keep.any()
    assert torch.equal(attend(queries, keys, keys, keep, scaling=1.0), torch.zeros_like(queries))


@pytest.mark.parametrize("width", [0, 9])
def test_a_width_that_the_head_has_not_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=f"width={width} .* use 1 to 8"):
        approximate_scores(torch.ones(1, 1, 1, 8), torch.ones(1, 1, 1, 8), width=width, scaling=1.0)
