"""A transformers model on the grid is the transformers model: every family, every grid."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fourfold_parallel.grid.gradients import local
from fourfold_parallel.grid.huggingface import parallelize
from fourfold_parallel.grid.laws import (
    OVERLAPS,
    Sizes,
    close,
    factorisations,
    in_float64,
    mesh_of,
    piece_of,
)
from fourfold_parallel.testing import run_on_ranks

MODEL = 1e-9
"""Float64 through four layers and a softmax; a missing term shows at 1e-3 and above."""

SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 67,
    "intermediate_size": 36, "max_position_embeddings": 32, "attn_implementation": "sdpa",
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL | {"num_key_value_heads": 2},
    "gpt2": {
        "n_embd": 32, "n_layer": 2, "n_head": 8, "n_positions": 32, "vocab_size": 67, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "attn_implementation": "sdpa",
    },
    "opt": SMALL | {"ffn_dim": 36, "word_embed_proj_dim": 32, "dropout": 0.0},
    "mistral": SMALL | {"num_key_value_heads": 4},
    "qwen2": SMALL | {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3": SMALL | {"num_key_value_heads": 2, "head_dim": 6},
    "gemma": SMALL | {"num_key_value_heads": 1, "head_dim": 4},
    "gpt_neox": SMALL | {"hidden_dropout": 0.0, "attention_dropout": 0.0},
}  # fmt: skip
"""36 and 67 divide by nothing that a grid has; key and value heads are fewer than some rows."""


def build(family: str, *, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    settings = dict(FAMILIES[family])
    implementation = settings.pop("attn_implementation")
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    for parameter in model.parameters():  # norms and biases must matter
        nn.init.normal_(parameter, std=0.3)
    return model.to(torch.float64).eval()


def batch_of(rows: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 67, (rows, 9), generator=random)
    labels = tokens.masked_fill(torch.rand(rows, 9, generator=random) < 0.3, -100)
    labels[: rows // 4] = -100  # some ranks have no valid target at all
    return tokens, labels


@lru_cache
def serial_gradients(family: str, rows: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    model = in_float64(build(family))
    tokens, labels = batch_of(rows)
    logits = model(input_ids=tokens, use_cache=False).logits
    targets = labels[:, 1:].flatten()
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), loss.detach(), gradients


def model_is_serial(
    family: str, grids: list[Sizes], overlaps: list[str], steps: int, **how: Any
) -> None:
    rows = 16
    logits, loss, gradients = serial_gradients(family, rows)
    tokens, labels = batch_of(rows)
    for sizes, name in product(grids, overlaps):
        mesh = mesh_of(sizes)
        mine = slice(
            mesh.batch_rank() * rows // mesh.batch_size(),
            (mesh.batch_rank() + 1) * rows // mesh.batch_size(),
        )
        model = build(family)
        parallel = parallelize(
            in_float64(model, "*.[qk]_norm"), mesh, overlaps=OVERLAPS[name], **how
        )
        for step in range(steps):
            what = f"{family} {sizes} {name} step {step}"
            parallel.model.zero_grad()
            out = parallel.model(input_ids=tokens[mine], labels=labels[mine], use_cache=False)
            out.loss.backward()
            if how.get("logits", "whole") == "whole":
                close(out.logits, logits[mine], what=f"{what}: logits", tolerance=MODEL)
            close(out.loss, loss, what=f"{what}: loss", tolerance=MODEL)
            ours = {key: p for key, p in parallel.model.named_parameters() if p.grad is not None}
            assert ours.keys() == gradients.keys(), f"{what}: {ours.keys() ^ gradients.keys()}"
            for key, parameter in ours.items():
                expected = piece_of(parallel.stored[key].keep(gradients[key]), parameter, mesh)
                assert parameter.grad is not None
                close(local(parameter.grad), expected, what=f"{what}: d{key}", tolerance=MODEL)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_on_a_grid_is_serial(family: str) -> None:
    """Logits, loss and every gradient, with uneven valid targets, and heads shared by rows."""
    grids = [(1, 2, 1, 2), (1, 1, 4, 1), (2, 1, 2, 1)]
    run_on_ranks(4, model_is_serial, family=family, grids=grids, overlaps=["all"], steps=1)


def test_split_logits_are_serial() -> None:
    """The vocabulary-parallel loss gives the same gradients without gathering any logits."""
    run_on_ranks(
        4, model_is_serial, family="gpt2", grids=[(1, 1, 4, 1)], overlaps=["all"], steps=1,
        logits="split",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_on_every_grid_with_every_overlap_is_serial(family: str) -> None:
    for sizes in factorisations(8):
        run_on_ranks(
            8, model_is_serial, family=family, grids=[sizes], overlaps=list(OVERLAPS), steps=2
        )
