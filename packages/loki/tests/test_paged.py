"""Paged storage: what it reads is what a contiguous cache reads, wherever its blocks lie."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, PreTrainedModel

from fourfold_loki import Basis, Budget, Count, Share, Statistics, fit, loki
from fourfold_loki.attention import Rotation, attend, scores_of
from fourfold_loki.calibration import calibrate_tokens
from fourfold_loki.paged import BlockTable, PagedCache, PagedLayer, paged_attention, whole

FLOAT32 = 1e-5
KV_HEADS, HEADS, WIDTH = 2, 6, 16
QUARTER = Budget(amount=Share(of_visible=0.25))


@pytest.fixture(scope="module")
def basis(statistics: Statistics) -> Basis:
    return fit(statistics)


def scattered(lengths: list[int], *, block: int, seed: int) -> PagedLayer:
    """A layer whose rows were appended to in turns, so that their blocks lie anywhere."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.eye(WIDTH).expand(KV_HEADS, -1, -1)
    table = BlockTable(rows=len(lengths), capacity=64, block=block)
    layer = PagedLayer(Rotation(maps, maps), 4, table=table, is_open=lambda: True)
    for tokens in range(0, max(lengths) + block, block):
        order = torch.randperm(len(lengths), generator=generator).tolist()
        for row in order:
            table.reserve(row, min(tokens, lengths[row]))
    shape = (len(lengths), KV_HEADS, 1, WIDTH)
    for _ in range(max(lengths)):
        layer.update(
            torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        )
        for row, length in enumerate(lengths):
            if int(layer.lengths[row]) > length:
                layer.hold(row, length)
    return layer


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    block=st.sampled_from([4, 8, 16]),
    page=st.sampled_from([1, 2, 4]),
    amount=st.sampled_from([Share(of_visible=0.25), Share(of_visible=1.0), Count(keys=12)]),
    forced=st.sampled_from([(0, 0), (1, 3)]),
)
def test_rows_of_any_lengths_and_places_read_what_the_reference_reads(
    seed: int, lengths: list[int], block: int, page: int, amount: Any, forced: tuple[int, int]
) -> None:
    """Each row by itself, contiguous, by the budget's own mask."""
    layer = scattered(lengths, block=block, seed=seed)
    sinks, window = forced if page == 1 or not isinstance(amount, Count) else (0, 0)
    budget = Budget(amount=amount, page=page, sinks=sinks, window=window)
    queries = torch.randn(
        len(lengths), HEADS, 1, WIDTH, generator=torch.Generator().manual_seed(seed)
    )
    visible = layer.visible(1)
    ours, read = paged_attention(
        queries, layer, visible, budget, number=0, scaling=0.3, is_dense=False
    )
    total = 0
    for row, length in enumerate(lengths):
        keys = whole(layer, layer.keys)[row : row + 1, :, :length]
        values = whole(layer, layer.values)[row : row + 1, :, :length]
        own = queries[row : row + 1]
        scores = scores_of(own[..., :4], keys[..., :4], scaling=0.3)
        seen = torch.ones(1, 1, 1, length, dtype=torch.bool)
        keep = budget.keep(scores, seen, kv_heads=KV_HEADS, layer=0)
        theirs = attend(own, keys, values, keep, scaling=0.3)
        torch.testing.assert_close(ours[row : row + 1], theirs, atol=FLOAT32, rtol=0)
        total += int(keep.sum())
    assert int(read) == total


@settings(max_examples=60, deadline=None)
@given(data=st.data(), rows=st.integers(1, 4), blocks=st.integers(1, 12))
def test_a_block_belongs_to_one_row_or_to_a_shared_beginning(
    data: st.DataObject, rows: int, blocks: int
) -> None:
    """Whatever is reserved, shared and released: none is lost, none is held twice."""
    table = BlockTable(rows=rows, capacity=24, block=4, blocks=blocks)
    held = [0] * rows
    shared = [0] * rows
    for _ in range(12):
        row, other = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, rows - 1))
        match data.draw(st.sampled_from(["reserve", "share", "release"])):
            case "reserve":
                tokens = data.draw(st.integers(0, 24))
                if -(-tokens // 4) - held[row] > table.free:
                    with pytest.raises(ValueError, match="are free"):
                        table.reserve(row, tokens)
                else:
                    table.reserve(row, tokens)
                    held[row] = max(held[row], -(-tokens // 4))
            case "share" if row != other and not held[row] and held[other]:
                table.share(row, other, 4 * held[other])
                held[row] = shared[row] = held[other]
            case _:
                table.release(row)
                held[row] = shared[row] = 0
        lists = [table.places[r, : held[r]].tolist() for r in range(rows)]
        used = {place for each in lists for place in each}
        assert len(used) + table.free == blocks
        for mine in lists:
            assert len(set(mine)) == len(mine)
        for a in range(rows):
            for b in range(a):
                common = set(lists[a]) & set(lists[b])
                assert all(lists[a].index(p) == lists[b].index(p) for p in common)


def steps(model: PreTrainedModel, cache: Any, ids: Tensor, *, prompt: int = 30) -> Tensor:
    with torch.no_grad():
        model(ids[:, :prompt], past_key_values=cache)
        rows = [
            model(ids[:, i : i + 1], past_key_values=cache).logits
            for i in range(prompt, ids.shape[1])
        ]
        return torch.cat(rows, 1)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("page", [1, 4])
def test_a_model_over_pages_is_the_model_over_a_cache(
    llama: PreTrainedModel, basis: Basis, tokens: Any, batch: int, page: int
) -> None:
    """Logits step by step, after a prompt and after a block behind it; and what was read."""
    ids = tokens(batch, 50)
    budget = Budget(amount=Share(of_visible=0.25), page=page)
    logits, shares = [], []
    for paged in (False, True):
        with loki(llama, basis, budget, width=4) as session:
            cache = (
                session.paged_cache(rows=batch, capacity=64, block=8) if paged else session.cache()
            )
            logits.append(steps(llama, cache, ids))
            with torch.no_grad():
                logits[-1] = torch.cat(
                    [logits[-1], llama(ids[:, :5], past_key_values=cache).logits], 1
                )
            shares.append(session.reads.share)
            assert cache.get_seq_length() == 55
    torch.testing.assert_close(*logits, atol=2e-4, rtol=0)
    # The kernels count a last page that is not full as a whole one.
    assert shares[0] == pytest.approx(shares[1], rel=0 if page == 1 else 0.02)


def test_generate_over_pages(llama: PreTrainedModel, basis: Basis, tokens: Any) -> None:
    """Greedy, with padding on the left, and again after crop."""
    ids = tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    ways = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
    with loki(llama, basis, QUARTER, width=4) as session:
        theirs = llama.generate(ids, **session.cached(), **ways)
        pages = session.paged_cache(rows=2, capacity=48, block=16)
        ours = llama.generate(ids, past_key_values=pages, **ways)
    assert ours.tolist() == theirs.tolist()


def test_short_rows_are_dense_bit_for_bit(
    llama: PreTrainedModel, basis: Basis, tokens: Any
) -> None:
    """Below the length from which selection pays, as with a budget of everything."""
    ids, logits = tokens(1, 50), []
    for budget in (
        Budget(amount=Share(of_visible=1.0), dense_below=64),
        Budget(amount=Share(of_visible=0.25), dense_below=40),
    ):
        with loki(llama, basis, budget, width=4) as session:
            cache = session.paged_cache(rows=1, capacity=64, block=8)
            logits.append(steps(llama, cache, ids))
    # Query 38 is the last to see fewer than 40 keys: steps 30 to 38.
    assert torch.equal(logits[0][:, :9], logits[1][:, :9])
    assert not torch.allclose(logits[0][:, 9:], logits[1][:, 9:], atol=1e-3)


def test_a_shared_beginning_is_read_from_the_same_blocks(
    llama: PreTrainedModel, basis: Basis, tokens: Any
) -> None:
    """Two rows that share a prompt, of which one holds it, go on as two rows that hold it each."""
    ids = tokens(1, 16).expand(2, -1)
    rest = tokens(2, 12, 5)
    with loki(llama, basis, QUARTER, width=4) as session, torch.no_grad():
        apart = session.paged_cache(rows=2, capacity=32, block=8)
        llama(ids, past_key_values=apart)
        both = session.paged_cache(rows=2, capacity=32, block=8, blocks=6)
        both.table.reserve(0, 16)
        both.table.share(1, 0, 16)  # before the prompt: both rows write the same numbers there
        llama(ids, past_key_values=both)
        both.table.reserve(0, 32)
        both.table.reserve(1, 32)
        assert both.table.free == 0
        for place in range(12):
            step = rest[:, place : place + 1]
            ours, theirs = (
                llama(
                    step, past_key_values=cache, position_ids=torch.full((2, 1), 16 + place)
                ).logits
                for cache in (both, apart)
            )
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        both.release(0)
        assert both.table.free == 2
        assert both.layers[0].shortest == 0


def test_windows_stay_dense_beside_pages(tokens: Any) -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=64, vocab_size=97, max_position_embeddings=128, sliding_window=None,
        )
    ).eval()  # fmt: skip
    basis, ids = fit(calibrate_tokens(model, tokens(4, 64))), tokens(1, 40)
    from fourfold_loki import Loki, Sparse, attending

    logits = []
    for paged in (False, True):
        mode = Sparse(selector=Loki(basis=basis, widths=(4, 4)), budget=QUARTER, dense_layers=(1,))
        with attending(model, mode) as session:
            cache = session.paged_cache(rows=1, capacity=48) if paged else session.cache()
            logits.append(steps(model, cache, ids))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)


def test_what_pages_cannot_do_is_refused(llama: PreTrainedModel, basis: Basis, tokens: Any) -> None:
    with loki(llama, basis, QUARTER) as session:
        cache = session.paged_cache(rows=1, capacity=16, block=8)
        assert isinstance(cache, PagedCache)
        with torch.no_grad(), pytest.raises(ValueError, match="20 tokens exceed the paged cache's"):
            llama(tokens(1, 20), past_key_values=cache)
        with pytest.raises(ValueError, match="never moved"):
            llama.generate(tokens(1, 6), past_key_values=session.paged_cache(rows=2, capacity=16),
                           num_beams=2, max_new_tokens=4)  # fmt: skip
        with torch.no_grad(), pytest.raises(ValueError, match="2 sequences for a paged cache of 1"):
            llama(tokens(2, 6), past_key_values=session.paged_cache(rows=1, capacity=16))
    for table, words in (
        (lambda: BlockTable(rows=0, capacity=8, block=8), "rows=0"),
        (lambda: BlockTable(rows=1, capacity=8, block=8).reserve(0, 9), "exceed the capacity of 8"),
        (lambda: BlockTable(rows=2, capacity=8, block=8).share(1, 0, 4), "whole blocks"),
        (
            lambda: BlockTable(rows=1, capacity=8, block=8, blocks=0).reserve(0, 1),
            "0 of 0 are free",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            table()
    with (
        loki(llama, basis, Budget(amount=Share(of_visible=0.25), page=3)) as session,
        torch.no_grad(),
        pytest.raises(ValueError, match="a page divides a block"),
    ):
        steps(llama, session.paged_cache(rows=1, capacity=64, block=8), tokens(1, 32))
