"""Selection under torch.compile, over a static cache."""

import pytest
import torch
from transformers import PreTrainedModel, StaticCache

from fourfold_loki import Budget, Share, Statistics, fit, loki

pytestmark = pytest.mark.compile


def test_a_compiled_step_selects_as_the_plain_one(
    llama: PreTrainedModel, statistics: Statistics
) -> None:
    """One decoding step of the reference, compiled as a whole but for the refusals around it."""
    ids = torch.randint(2, 97, (1, 40), generator=torch.Generator().manual_seed(2))
    budget = Budget(amount=Share(of_visible=0.25))
    logits = []
    for is_compiled in (False, True):
        with loki(llama, fit(statistics), budget, width=4), torch.no_grad():
            step = torch.compile(llama.forward, backend="eager") if is_compiled else llama.forward
            cache = StaticCache(config=llama.config, max_cache_len=64)
            llama(ids[:, :39], past_key_values=cache)
            logits.append(step(ids[:, 39:], past_key_values=cache).logits)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)


def test_compiled_steps_over_our_cache(llama: PreTrainedModel, statistics: Statistics) -> None:
    """Three tokens, one after another: the cache is written and read inside what is compiled."""
    ids = torch.randint(2, 97, (1, 40), generator=torch.Generator().manual_seed(2))
    budget = Budget(amount=Share(of_visible=0.25))
    logits = []
    for is_compiled in (False, True):
        with loki(llama, fit(statistics), budget, width=4) as session, torch.no_grad():
            step = torch.compile(llama.forward, backend="eager") if is_compiled else llama.forward
            cache = session.cache(capacity=64)
            llama(ids[:, :37], past_key_values=cache)
            steps = [
                step(ids[:, place : place + 1], past_key_values=cache).logits
                for place in range(37, 40)
            ]
            assert cache.get_seq_length() == 40
            logits.append(torch.cat(steps, 1))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)


def test_one_graph_serves_every_length_of_a_paged_cache(
    llama: PreTrainedModel, statistics: Statistics
) -> None:
    """Ten steps by what was compiled for the first ones: shapes are fixed, and nothing reads a length."""
    ids = torch.randint(2, 97, (1, 50), generator=torch.Generator().manual_seed(2))
    budget = Budget(amount=Share(of_visible=0.25), page=4)
    logits, graphs = [], 0

    def counting(module: torch.fx.GraphModule, inputs: object) -> object:
        nonlocal graphs
        del inputs
        graphs += 1
        return module.forward

    for is_compiled in (False, True):
        with loki(llama, fit(statistics), budget, width=4) as session, torch.no_grad():
            torch.compiler.reset()
            step = torch.compile(llama.forward, backend=counting) if is_compiled else llama.forward
            cache = session.paged_cache(rows=1, capacity=64, block=8)
            llama(ids[:, :37], past_key_values=cache)
            rows = []
            for place in range(37, 50):
                if place == 40:
                    before = graphs
                rows.append(step(ids[:, place : place + 1], past_key_values=cache).logits)
            logits.append(torch.cat(rows, 1))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=0)
    assert graphs == before
    assert graphs > 0
