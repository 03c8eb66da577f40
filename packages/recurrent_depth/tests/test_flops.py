"""Costs by formula against torch's counter."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from fourfold_recurrent_depth import RecurrentDepthConfig, RecurrentDepthForCausalLM
from fourfold_recurrent_depth.analysis.flops import costs, materialised_parameters, retrofit_costs
from fourfold_recurrent_depth.retrofit import retrofit


@pytest.mark.parametrize("pair", [(1, 0), (4, 0), (32, 0), (0, 4), (3, 2), (7, 4)])
def test_the_formula_is_what_torch_counts(
    tiny: RecurrentDepthForCausalLM, tokens: torch.Tensor, pair: tuple[int, int]
) -> None:
    """Forward at three depths and training at three pairs, exactly, attention included."""
    without, with_gradient = pair
    tiny.set_attn_implementation("eager")
    tiny.train(with_gradient > 0)
    price = costs(tiny.config, context=tokens.shape[1])
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(with_gradient > 0):
        out = tiny(tokens, labels=tokens, num_steps=(without, with_gradient))
        if with_gradient:
            out.loss.backward()
    expected = price.training(*pair) if with_gradient else price.forward(without)
    assert counter.get_total_flops() == expected * tokens.numel()


def test_the_formula_counts_a_loss_at_every_exit(
    tiny: RecurrentDepthForCausalLM, tokens: torch.Tensor
) -> None:
    """Coda and head once for each recurrence, forward and backward."""
    tiny.set_attn_implementation("eager")
    tiny.train()
    with FlopCounterMode(display=False) as counter:
        out = tiny(tokens, num_steps=(0, 4), depths=(1, 2, 3, 4))
        sum(logits.sum() for logits in out.logits_by_depth or ()).backward()  # type: ignore[union-attr]
    price = costs(tiny.config, context=tokens.shape[1])
    assert counter.get_total_flops() == price.training(0, 4, exits=4) * tokens.numel()


@pytest.mark.parametrize("pair", [(0, 1), (0, 4), (3, 2)])
def test_the_formula_counts_retrofitted_models(tokens: torch.Tensor, pair: tuple[int, int]) -> None:
    """Training at three pairs, exactly, with keys shared among heads; and the dense model."""
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, vocab_size=64, attn_implementation="eager",
    )  # fmt: skip
    dense = LlamaForCausalLM(config)
    shape: dict[str, int] = {"prelude": 1, "core": 2, "coda": 1}
    for model, price, options in (
        (dense, retrofit_costs(config, prelude=4, core=0, coda=0, context=12), None),
        (retrofit(dense, **shape), retrofit_costs(config, **shape, context=12), pair),
    ):
        with FlopCounterMode(display=False) as counter:
            chosen: dict[str, Any] = {} if options is None else {"num_steps": options}
            model(tokens, labels=tokens, use_cache=False, **chosen).loss.backward()
        expected = price.training(*(options or (0, 0)))
        assert counter.get_total_flops() == expected * tokens.numel()


def test_huginns_totals() -> None:
    """54.3 B parameters at r=32 unrolled; 172 GFLOP a training token at (25, 8)."""
    config = RecurrentDepthConfig()
    assert materialised_parameters(config, 32) / 1e9 == pytest.approx(54.3, abs=0.05)
    published = costs(config, context=0, splits_adapter=False)
    assert published.training(25, 8) / 1e9 == pytest.approx(172, abs=0.5)
    assert published.forward(32) / 1e9 == pytest.approx(108.6, abs=0.1)
