"""The cache after everything that transformers does to caches."""

from collections.abc import Callable

import pytest
import torch
from einops import rearrange
from torch import Tensor
from transformers import PreTrainedModel

from fourfold_loki import Budget, LokiCache, Share, Statistics, fit, loki
from fourfold_loki.cache import LokiLayer

QUARTER = Budget(amount=Share(of_visible=0.25))


def in_step(cache: LokiCache, length: int) -> None:
    """The leading coordinates are those of the keys, for every token held."""
    for layer in cache.layers:
        assert isinstance(layer, LokiLayer)
        assert layer.keys is not None
        assert layer.get_seq_length() == length
        held = rearrange(layer.leading, "b h n w t -> b h (n t) w")[:, :, :length]
        assert torch.equal(held, layer.keys[:, :, :length, : layer.width])


@pytest.fixture
def filled(llama: PreTrainedModel, statistics: Statistics, tokens: Callable[..., Tensor]):  # type: ignore[no-untyped-def]
    """A session with a cache of 3 sequences of 30 tokens, and the keys it should hold."""
    with loki(llama, fit(statistics), QUARTER, width=4) as session, torch.no_grad():
        cache = session.cache()
        llama(tokens(3, 30), past_key_values=cache)
        yield llama, session, cache


def keys_of(cache: LokiCache) -> list[Tensor]:
    return [
        layer.keys[:, :, : layer.get_seq_length()].clone()  # type: ignore[index]
        for layer in cache.layers
    ]


def test_it_holds_turned_keys_and_grows(filled, tokens: Callable[..., Tensor]) -> None:  # type: ignore[no-untyped-def]
    llama, _, cache = filled
    in_step(cache, 30)
    before = keys_of(cache)
    for _ in range(50):
        llama(tokens(3, 1), past_key_values=cache)
    in_step(cache, 80)
    for old, new in zip(before, keys_of(cache), strict=True):
        assert torch.equal(new[:, :, :30], old)


def test_cropping_reordering_repeating_and_choosing(filled) -> None:  # type: ignore[no-untyped-def]
    _, _, cache = filled
    cache.crop(-4)
    in_step(cache, 26)
    before = keys_of(cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    in_step(cache, 26)
    assert torch.equal(keys_of(cache)[0], before[0][[2, 0, 0]])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    in_step(cache, 26)
    assert torch.equal(keys_of(cache)[1], before[1][[2, 0]])
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    in_step(cache, 26)
    cache.reset()
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)


def test_after_a_reset_another_batch_may_come(filled, tokens: Callable[..., Tensor]) -> None:  # type: ignore[no-untyped-def]
    llama, session, cache = filled
    cache.reset()
    ids = tokens(2, 20)
    expected = llama(ids, past_key_values=session.cache()).logits
    torch.testing.assert_close(llama(ids, past_key_values=cache).logits, expected)
    in_step(cache, 20)


def test_after_a_crop_the_model_goes_on_as_if_nothing_had_been_there(
    filled, tokens: Callable[..., Tensor]
) -> None:  # type: ignore[no-untyped-def]
    llama, _, cache = filled
    detour, last = tokens(3, 5, 7), tokens(3, 1, 8)
    expected = llama(last, past_key_values=cache).logits
    cache.crop(-1)
    llama(detour, past_key_values=cache)
    cache.crop(-5)
    torch.testing.assert_close(llama(last, past_key_values=cache).logits, expected)
