"""Models that do something behind their heads train alike without the logits of what is left out."""

from collections.abc import Iterator
from typing import Any, cast
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

from fourfold_goldfish import CompactedNextToken, Goldfish
from fourfold_goldfish.cross_entropy import PLAIN
from fourfold_goldfish.objective import tail_of
from fourfold_parallel.grid.huggingface import parallelize
from fourfold_parallel.grid.mesh import Mesh
from fourfold_parallel.run.data import Batch
from fourfold_parallel.run.objective import NextToken
from fourfold_parallel.testing.ranks import run_on_ranks

SHAPE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_intermediate_size": 32, "n_routed_experts": 4,
}  # fmt: skip
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_d_ssm": 64,
    "mamba_chunk_size": 8, "mamba_expand": 2,
}  # fmt: skip
TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    # A factor behind the head.
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "cohere2_moe": {"logit_scale": 0.25, **EXPERTS},
    "falcon_h1": {"lm_head_multiplier": 0.5, **MAMBA},
    "hyperclovax": {"logits_scaling": 2.0},
    # A divisor.
    "granite": {"logits_scaling": 2.0},
    "granite_swa": {"logits_scaling": 2.0},
    "granitemoe": {"logits_scaling": 2.0, **EXPERTS},
    "granitemoe_swa": {"logits_scaling": 2.0, **EXPERTS},
    "granitemoehybrid": {"logits_scaling": 2.0, "layer_types": ["mamba", "attention"], **EXPERTS, **MAMBA},
    "granitemoeshared": {"logits_scaling": 2.0, **EXPERTS},
    # A soft cap.
    "beam": {"final_logit_softcapping": 3.0, **EXPERTS},
    "gemma2": {"final_logit_softcapping": 3.0},
    "gemma3_text": {"final_logit_softcapping": 3.0},
    "gemma3n_text": {
        "final_logit_softcapping": 3.0, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 96, "laurel_rank": 4, "layer_types": ["full_attention"] * 2,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "inkling2_text": {"final_logit_softcapping": 3.0, "unpadded_vocab_size": 96, **EXPERTS},
    "nanochat": {"final_logit_softcapping": 3.0},
    "recurrent_gemma": {"logits_soft_cap": 3.0, "block_types": ["recurrent", "attention"]},
    "vaultgemma": {"final_logit_softcapping": 3.0},
    "xlstm": {"output_logit_soft_cap": 3.0},
    # A factor before the head, which is nothing behind it.
    "minicpm3": {
        "dim_model_base": 16, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "num_key_value_heads": 4,
    },
    "inkling_text": {"logits_mup_width_multiplier": 2.0, **EXPERTS},
}  # fmt: skip
WIDE = 10.0
"""Factor on the heads' weights, so that logits reach the caps."""


def in_float64() -> Any:
    """A scope in which model files' detours through float32 are left out of models in float64."""
    to_float = torch.Tensor.float

    def lifted(tensor: torch.Tensor, *given: Any, **options: Any) -> torch.Tensor:
        return tensor if tensor.dtype == torch.float64 else to_float(tensor, *given, **options)

    return mock.patch.object(torch.Tensor, "float", lifted)


@pytest.fixture
def exact() -> Iterator[None]:
    with in_float64():
        yield


def build(kind: str) -> Any:
    """A small model of a type, all weights random."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SHAPE, **TYPES[kind]})
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").double()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(WIDE)
    return model.train()


def batch() -> Batch:
    tokens = torch.randint(3, 96, (3, 25), generator=torch.Generator().manual_seed(1))
    return Batch(tokens=tokens, document_ids=torch.zeros_like(tokens), addresses=(0, 1, 2))


def trained(objective: Any, model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Summed loss and every gradient."""
    torch.manual_seed(5)
    loss = objective.loss(model, batch(), objective.targets(batch())).nats_sum
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


MASK = Goldfish(k=2, context=4)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("kind", TYPES)
def test_what_follows_the_head_is_honoured(kind: str) -> None:
    """Loss and gradients are those of the model's own logits, in float64."""
    expected, of_all = trained(NextToken(mask=MASK), build(kind))
    ours, gradients = trained(CompactedNextToken(mask=MASK, chunk=7), build(kind))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    assert gradients.keys() == of_all.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, of_all[name], rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.usefixtures("exact")
def test_the_tails_of_these_models_matter() -> None:
    """Without its tail every one of these losses is another, but for the controls."""
    controls = {"llama", "minicpm3", "inkling_text"}
    for kind in TYPES:
        found = tail_of(build(kind), batch().tokens[:1])
        assert (found == PLAIN) == (kind in controls), (kind, found)


class Cubed(nn.Module):
    """Something that nobody's configuration names."""

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits + 1e-4 * logits**3


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("kind", ["llama", "granite"])
def test_what_is_neither_scale_nor_cap_is_refused(kind: str) -> None:
    """On the values of a fresh model it would hardly show; the ramp shows it."""
    model = build(kind)

    def bend(_: nn.Module, __: Any, output: Any) -> Any:
        output.logits = Cubed()(output.logits)
        return output

    model.register_forward_hook(bend)
    objective = CompactedNextToken(mask=MASK)
    with pytest.raises(ValueError, match="something else of its head's products than a scale"):
        objective.loss(model, batch(), objective.targets(batch()))


@pytest.mark.usefixtures("exact")
def test_logits_of_some_ids_alone_are_refused() -> None:
    model = build("llama")

    def cut(_: nn.Module, __: Any, output: Any) -> Any:
        output.logits = output.logits[..., :90]
        return output

    model.register_forward_hook(cut)
    objective = CompactedNextToken(mask=MASK)
    with pytest.raises(
        ValueError, match=r"logits of shape \(1, 2, 90\) from its head's \(1, 2, 96\)"
    ):
        objective.loss(model, batch(), objective.targets(batch()))


@pytest.mark.usefixtures("exact")
def test_looking_at_a_tail_draws_nothing() -> None:
    """A run that is resumed looks once more, and must draw the same dropout."""
    config = AutoConfig.for_model("gemma2", **SHAPE, attention_dropout=0.5)
    config._attn_implementation = "eager"
    models = [AutoModelForCausalLM.from_config(config).double().train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    tail_of(models[1], batch().tokens[:1])  # has been looked at before
    losses = [trained(CompactedNextToken(mask=MASK), model)[0] for model in models]
    assert torch.equal(*losses)


def tails_on_the_grid(kind: str, sizes: tuple[int, int, int, int], logits: Any) -> None:
    """The loss of one process, and every gradient as from the grid's own logits."""
    mesh = Mesh(**dict(zip(("data", "depth", "row", "col"), sizes, strict=True)))
    whole, _ = trained(NextToken(mask=MASK), build(kind))
    objectives = (NextToken(mask=MASK), CompactedNextToken(mask=MASK))
    (expected, of_all), (ours, gradients) = [
        trained(objective, parallelize(build(kind), mesh, logits=logits).model)
        for objective in objectives
    ]
    # Norms and embeddings round to float32 on the way; a missing factor shows at 0.1 and above.
    torch.testing.assert_close(ours, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    for name, gradient in gradients.items():
        mine, theirs = (cast(DTensor, g).to_local() for g in (gradient, of_all[name]))
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("kind", ["granite", "hyperclovax", "vaultgemma"])
@pytest.mark.parametrize("logits", ["split", "whole"])
def test_a_cut_vocabulary_honours_them_too(kind: str, logits: str) -> None:
    run_on_ranks(2, tails_on_the_grid, kind=kind, sizes=(1, 1, 2, 1), logits=logits)
    run_on_ranks(2, tails_on_the_grid, kind=kind, sizes=(1, 1, 1, 2), logits=logits)
