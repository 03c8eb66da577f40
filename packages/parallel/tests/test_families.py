"""Twenty unlike families on grids of four ranks are what they are in one process, to the last step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from fourfold_parallel.certify.compare import EXACT, Sizes, on_grids, worst_of
from fourfold_parallel.certify.toys import (
    NOT_BUILT,
    causal_types,
    default_toy,
    in_float64,
    toy,
    toy_model,
)
from fourfold_parallel.testing.ranks import run_on_ranks

GRIDS: list[Sizes] = [(1, 1, 2, 2), (1, 2, 2, 1)]
"""Row and col together, and row beside depth: each axis' collectives at least once."""
SAMPLE = {
    "llama": "the plain decoder",
    "gpt2": "transposed matrices, learned positions",
    "bloom": "biased scores",
    "opt": "no plan, learned positions with an offset",
    "bart": "a loss of its own",
    "gemma2": "caps, scaled embeddings, norms with an offset",
    "gemma3": "a composite configuration, windows, norms of heads",
    "nemotron": "a layer norm whose weight is one more",
    "nanochat": "norms without parameters",
    "olmo2": "norms behind gathered projections",
    "phi3": "packed projections",
    "falcon_h1": "attention and a state space side by side, multipliers",
    "mamba": "a state space alone",
    "qwen3_next": "gated linear attention, shared experts",
    "mixtral": "experts",
    "gpt_oss": "sinks, experts with biases",
    "deepseek_v3": "latent attention, groups of experts",
    "glm_moe_dsa": "an indexer",
    "deepseek_v4": "several residual streams",
    "gemma3n_text": "inputs of each layer, keys of other layers",
}  # fmt: skip


def outcomes(model_type: str, grids: list[Sizes]) -> list[Any]:
    by_rank = run_on_ranks(
        4,
        on_grids,
        config=default_toy(model_type),
        grids=grids,
        dtype=torch.float64,
        how={"checks": False},
    )
    return [worst_of(found) for found in zip(*by_rank, strict=True)]


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_family_on_a_grid_is_itself(model_type: str) -> None:
    """Loss, logits, every gradient and an AdamW step, in float64."""
    for outcome in outcomes(model_type, GRIDS):
        assert outcome.result == "equal", outcome
        assert outcome.differences.keys() == {"loss", "logits", "gradients", "step"}
        assert outcome.difference <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in causal_types() if name not in NOT_BUILT])
def test_every_family_is_itself_or_refused(model_type: str) -> None:
    """On five grids; `benchmarks/families.py` does the same with a record, and goes on where it stopped."""
    grids: list[Sizes] = [(1, 1, 4, 1), (1, 1, 1, 4), (1, 4, 1, 1), *GRIDS]
    for outcome in outcomes(model_type, grids):
        assert outcome.result in ("equal", "refused"), outcome


def published(model_type: str, **fields: Any) -> PretrainedConfig:
    return AutoConfig.for_model(model_type, **fields)


def test_a_toy_keeps_what_is_published() -> None:
    """Shapes shrink; groups, ties, biases, factors and every kind of layer stay."""
    shared = toy(published("llama", num_key_value_heads=8, tie_word_embeddings=True))
    assert (shared.num_attention_heads, shared.num_key_value_heads) == (8, 4)
    assert shared.tie_word_embeddings
    alone = toy(published("llama"))
    assert alone.num_key_value_heads == 8
    assert toy(published("gemma", num_key_value_heads=1)).num_key_value_heads == 1
    granite: Any = toy(published("granite", logits_scaling=16.0, attention_bias=True))
    assert (granite.logits_scaling, granite.attention_bias) == (16.0, True)
    mixed: Any = toy(published("gemma3_text"))
    assert set(mixed.layer_types) == {"sliding_attention", "full_attention"}
    assert mixed.sliding_window < 16
    experts: Any = toy(published("mixtral", router_jitter_noise=0.1))
    assert (experts.num_local_experts, experts.router_jitter_noise) == (8, 0.0)
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    turned: Any = toy(published("llama", rope_parameters={**yarn, "rope_theta": 1e6}))
    assert turned.rope_parameters["factor"] == 4.0


def test_a_toy_model_is_random_in_every_parameter_and_alike_each_time() -> None:
    config = default_toy("qwen3_next")
    first, second = (toy_model(config) for _ in range(2))
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert a.equal(b), name
        assert a.dtype == torch.float64
        assert a.flatten()[1:].ne(a.flatten()[0]).any() or a.numel() == 1, name


def test_detours_through_float32_are_lifted() -> None:
    """A norm of the model files rounds to 1e-8 outside of the scope, and not within it."""
    model: Any = toy_model(default_toy("llama"))
    x = torch.randn(4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    norm = model.model.norm
    exact = x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight
    assert 1e-10 < (norm(x) - exact).abs().max() < 1e-5
    with in_float64():
        assert (norm(x) - exact).abs().max() < 1e-14


def test_a_configuration_that_takes_no_small_sizes_is_named() -> None:
    config: Any = published("dots3_note")
    with pytest.raises(ValueError, match="dots3_note does not take the sizes of a toy"):
        toy(config)
