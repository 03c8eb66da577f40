"""On one rank the grid is plain torch, bit for bit; and what does not fit is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PreTrainedModel, Qwen2Config

from fourfold_parallel.grid.huggingface import parallelize
from fourfold_parallel.grid.layout import Divided, Plain, Whole, check_sizes, rules_for
from fourfold_parallel.grid.linear import Linear, bias_cut, weight_cut
from fourfold_parallel.grid.mesh import check_sizes as check_ranks
from fourfold_parallel.grid.products import Products
from fourfold_parallel.grid.schedule import Overlaps, Schedule
from fourfold_parallel.testing.grids import mesh_of
from fourfold_parallel.testing.ranks import run_on_ranks

LLAMA: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 61, "max_position_embeddings": 32,
}  # fmt: skip


def layer_is_bitwise() -> None:
    mesh = mesh_of((1, 1, 1, 1))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for swapped in (False, True):
            torch.manual_seed(0)
            dense = nn.Linear(33, 47, dtype=dtype)
            layer = Linear(
                nn.Parameter(mesh.distribute(dense.weight.detach(), weight_cut(swapped=swapped))),
                nn.Parameter(mesh.distribute(dense.bias.detach(), bias_cut(swapped=swapped))),
                mesh=mesh, name="layer", schedule=Schedule(Overlaps()), swapped=swapped,
                products=Products(),
            )  # fmt: skip
            x = torch.randn(5, 7, 33, dtype=dtype)
            ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
            a, b = layer(ours), dense(theirs)
            dy = torch.randn_like(b)
            a.backward(dy)
            b.backward(dy)
            assert torch.equal(a, b)
            assert torch.equal(ours.grad, theirs.grad)
            assert torch.equal(layer.weight.grad.to_local(), dense.weight.grad)
            assert torch.equal(layer.bias.grad.to_local(), dense.bias.grad)


def model_is_bitwise(config: Any) -> None:
    mesh = mesh_of((1, 1, 1, 1))
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    parallel = parallelize(AutoModelForCausalLM.from_config(config), mesh)
    tokens = torch.randint(0, 61, (2, 9))
    ours = parallel.model.eval()(input_ids=tokens, use_cache=False).logits
    theirs = plain.eval()(input_ids=tokens, use_cache=False).logits
    assert torch.equal(ours, theirs)
    ours.square().mean().backward()
    theirs.square().mean().backward()
    serial = dict(plain.named_parameters())
    for name, parameter in parallel.model.named_parameters():
        gradient = parallel.stored[name].publish(parameter.grad.to_local())
        assert torch.equal(gradient, serial[name].grad), name


def test_a_layer_on_one_rank_is_torchs_bit_for_bit() -> None:
    run_on_ranks(1, layer_is_bitwise)


@pytest.mark.parametrize(
    "config", [LlamaConfig(**LLAMA), Qwen2Config(**LLAMA)], ids=["llama", "qwen2"]
)
def test_a_model_on_one_rank_is_the_plain_model_bit_for_bit(config: Any) -> None:
    """Not GPT-2: its Conv1D stores weights transposed, so its products round differently."""
    run_on_ranks(1, model_is_bitwise, config=config)


def llama(**settings: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA | settings))


def test_sizes_that_do_not_use_every_rank_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data=2 \* depth=1 \* row=2 \* col=1 has 4 ranks, but 8"):
        check_ranks({"data": 2, "depth": 1, "row": 2, "col": 1}, 8)
    with pytest.raises(ValueError, match="row=0 is not a size"):
        check_ranks({"data": 8, "depth": 1, "row": 0, "col": 1}, 8)


def test_heads_that_would_be_cut_are_refused() -> None:
    model = llama()
    rules = rules_for(model, {})
    with pytest.raises(
        ValueError, match=r"q_proj: heads=4 does not divide over axis 'row' of size 3"
    ):
        check_sizes(model, rules, {"row": 3})
    model = llama(num_attention_heads=12, num_key_value_heads=3, hidden_size=48)
    with pytest.raises(
        ValueError, match=r"key_value_heads=3 neither divides over axis 'row' of size 4"
    ):
        check_sizes(model, rules_for(model, {}), {"row": 4})


def test_a_rule_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rule 'model.layers.\*.q_prj' matches no module"):
        rules_for(llama(), {"model.layers.*.q_prj": Plain()})


def test_a_plan_with_a_word_that_nobody_has_met_is_refused() -> None:
    model = llama()
    model.config.base_model_tp_plan = {"layers.*.mlp.down_proj": "rowwise_with_a_twist"}
    with pytest.raises(
        ValueError, match=r"down_proj: the model's plan says 'rowwise_with_a_twist'"
    ):
        rules_for(model, {})


def test_what_has_no_rule_makes_its_block_whole_or_is_refused() -> None:
    model = llama()
    model.get_submodule("model.layers.0.mlp").register_module("gate", nn.Bilinear(64, 64, 64))
    rules = rules_for(model, {})
    wholes = {name: rule for name, rule in rules.items() if isinstance(rule, Whole)}
    assert [*wholes] == ["model.layers.0.mlp"]
    assert rules["model.layers.0.mlp.up_proj"] == Divided()
    assert rules["model.layers.1.mlp.up_proj"] == Plain()
    with pytest.raises(
        ValueError, match=r"mlp.gate \(Bilinear\): neither.*'model.layers.0.mlp' whole"
    ):
        rules_for(model, {}, whole="refuse")


def test_words_for_gathered_outputs_make_blocks_whole() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Phi3Config(**LLAMA | {"pad_token_id": 0}))
    rules = rules_for(model, {})
    assert isinstance(rules["model.layers.0.self_attn"], Whole)
    assert "'colwise_gather_output'" in rules["model.layers.0.self_attn"].reason
    assert rules["model.layers.0.self_attn.qkv_proj"] == Divided()


def every_rank_says_the_same() -> str:
    try:
        parallelize(llama(), mesh_of((1, 1, 4, 1)))
    except ValueError as error:
        return str(error)
    return "accepted"


def test_every_rank_refuses_with_the_same_words() -> None:
    answers = set(run_on_ranks(4, every_rank_says_the_same))
    assert len(answers) == 1
    assert "pass weights=PATH" in answers.pop()
