"""A transformers model on the grid is the transformers model: every family, every grid."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fourfold_parallel.grid.collectives import Trace
from fourfold_parallel.grid.gradients import local
from fourfold_parallel.grid.huggingface import parallelize
from fourfold_parallel.testing.grids import (
    OVERLAPS,
    Sizes,
    close,
    factorisations,
    in_float64,
    mesh_of,
    piece_of,
)
from fourfold_parallel.testing.ranks import run_on_ranks

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


def batch_of(rows: int, length: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 67, (rows, length), generator=random)
    labels = tokens.masked_fill(torch.rand(rows, length, generator=random) < 0.3, -100)
    labels[: rows // 4] = -100  # some ranks have no valid target at all
    return tokens, labels


@lru_cache
def serial_gradients(
    family: str, rows: int, length: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    model = in_float64(build(family))
    tokens, labels = batch_of(rows, length)
    logits = model(input_ids=tokens, use_cache=False).logits
    targets = labels[:, 1:].flatten()
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), loss.detach(), gradients


def model_is_serial(
    family: str, grids: list[Sizes], overlaps: list[str], steps: int, length: int = 9, **how: Any
) -> None:
    rows = 16
    logits, loss, gradients = serial_gradients(family, rows, length)
    tokens, labels = batch_of(rows, length)
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


CUT_TOKENS = ["llama", "gpt2", "qwen3", "gemma", "gpt_neox"]
"""OPT's layers hold norms and hidden units in one module, which the sequence form refuses."""


@pytest.mark.parametrize("family", CUT_TOKENS)
def test_the_sequence_form_is_serial(family: str) -> None:
    """Tokens cut over row between blocks, heads shared by rows included: the same gradients."""
    run_on_ranks(
        4, model_is_serial, family=family, grids=[(1, 1, 2, 2), (1, 1, 4, 1), (1, 2, 2, 1)],
        overlaps=["all"], steps=1, length=8, cuts_tokens=True,
    )  # fmt: skip


def sequence_form_sends_as_much(sizes: Sizes) -> None:
    volumes, saved = [], []
    for cuts_tokens in (False, True):
        trace = Trace()
        mesh = mesh_of(sizes).observed(trace)
        parallel = parallelize(build("llama"), mesh, cuts_tokens=cuts_tokens)
        tokens, labels = batch_of(4, 8)
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = parallel.model(input_ids=tokens, labels=labels, use_cache=False).loss
        trace.events.clear()
        loss.backward()
        row = [e for e in trace.events if e.axis == "row" and e.moment == "start"]
        volumes.append(sum(e.payload_bytes * (2 if e.what == "all_reduce" else 1) for e in row))
        saved.append(sum(kept.values()))
    assert volumes[1] < volumes[0]  # one gather of dY and one spread of dX a block; before, one
    # all-reduce of dX for each of its plain layers
    assert saved[1] < saved[0]


def test_the_sequence_form_sends_no_more_and_keeps_less() -> None:
    run_on_ranks(4, sequence_form_sends_as_much, sizes=(1, 1, 4, 1))


def sequence_form_refuses() -> None:
    with pytest.raises(ValueError, match=r"layer_norm normalises.*turn it off"):
        parallelize(build("opt"), mesh_of((1, 1, 2, 1)), cuts_tokens=True)
    parallel = parallelize(build("llama"), mesh_of((1, 1, 2, 1)), cuts_tokens=True)
    with pytest.raises(ValueError, match="9 tokens does not divide over axis 'row' of size 2"):
        parallel.model(input_ids=batch_of(4, 9)[0], use_cache=False)


def test_the_sequence_form_refuses_what_it_cannot_cut() -> None:
    run_on_ranks(2, sequence_form_refuses)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", CUT_TOKENS)
def test_the_sequence_form_is_serial_on_every_grid_with_every_overlap(family: str) -> None:
    for sizes in factorisations(8):
        run_on_ranks(
            8, model_is_serial, family=family, grids=[sizes], overlaps=list(OVERLAPS), steps=2,
            length=8, cuts_tokens=True,
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_on_every_grid_with_every_overlap_is_serial(family: str) -> None:
    for sizes in factorisations(8):
        run_on_ranks(
            8, model_is_serial, family=family, grids=[sizes], overlaps=list(OVERLAPS), steps=2
        )
