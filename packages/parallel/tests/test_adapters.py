"""Low-rank adapters on the grid: gradients, what frozen weights send, files that peft reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

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
"""Float64 through two layers and a softmax; a missing sum shows at 1e-3 and above."""
TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]
CONFIG = LlamaConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
    intermediate_size=36, vocab_size=67, max_position_embeddings=32, use_cache=False,
)  # fmt: skip


def adapted_model(
    *, targets: list[str], adapter: str = "default", bias: bool = False
) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG)
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", lora_bias=bias
    )
    model.add_adapter(config, adapter_name=adapter)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # B is zero at the start, and A would then have no gradient
            nn.init.normal_(parameter, std=0.3)
    return model.to(torch.float64).eval()


def tokens_of(rows: int) -> Tensor:
    return torch.randint(0, 67, (rows, 8), generator=torch.Generator().manual_seed(3))


def adapters_are_serial(grids: list[Sizes], overlaps: list[str], cuts_tokens: bool = False) -> None:
    serial = in_float64(adapted_model(targets=TARGETS))
    tokens = tokens_of(8)
    logits = serial(input_ids=tokens).logits[:, :-1]  # the model's own loss is in float32
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    expected = dict(serial.named_parameters())
    for sizes in grids:
        mesh = mesh_of(sizes)
        mine = tokens.chunk(mesh.batch_size())[mesh.batch_rank()]
        for name in overlaps:
            model = adapted_model(targets=TARGETS)
            parallel = parallelize(model, mesh, overlaps=OVERLAPS[name], cuts_tokens=cuts_tokens)
            ours = parallel.model(input_ids=mine, labels=mine).loss
            ours.backward()
            close(ours, loss, what=f"{sizes}: loss", tolerance=MODEL)
            for key, parameter in parallel.model.named_parameters():
                assert parameter.requires_grad == ("lora_" in key)
                if parameter.grad is None:
                    assert not parameter.requires_grad
                    continue
                gradient = expected[key].grad
                assert gradient is not None
                piece = piece_of(gradient, parameter, mesh)
                close(local(parameter.grad), piece, what=f"{sizes}: d{key}", tolerance=MODEL)


def test_adapters_train_as_they_do_alone() -> None:
    grids = [(1, 2, 2, 1), (1, 1, 2, 2), (2, 1, 1, 2), (1, 1, 4, 1)]
    run_on_ranks(4, adapters_are_serial, grids=grids, overlaps=["all", "none"])


def test_adapters_train_in_the_sequence_form() -> None:
    grids = [(1, 1, 2, 2), (1, 1, 4, 1), (1, 2, 2, 1)]
    run_on_ranks(4, adapters_are_serial, grids=grids, overlaps=["all"], cuts_tokens=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_adapters_train_as_they_do_alone_on_every_grid() -> None:
    grids = [sizes for sizes in factorisations(8) if sizes[2] <= 4]
    run_on_ranks(8, adapters_are_serial, grids=grids, overlaps=[*OVERLAPS])


def frozen_weights_are_silent() -> None:
    trace = Trace()
    mesh = mesh_of((1, 2, 1, 1)).observed(trace)
    parallel = parallelize(adapted_model(targets=TARGETS), mesh)
    tokens = tokens_of(4).chunk(2)[mesh.batch_rank()]
    parallel.model(input_ids=tokens, labels=tokens).loss.backward()
    verbs = {event.what for event in trace.events if event.axis == "depth"}
    assert verbs == {"all_gather", "all_reduce"}  # tiles, and the sums of the adapters' gradients


def test_frozen_weights_send_no_gradients() -> None:
    run_on_ranks(2, frozen_weights_are_silent)


def files_are_pefts(folder: Path, adapter: str) -> None:
    parallel = parallelize(adapted_model(targets=TARGETS, adapter=adapter), mesh_of((1, 2, 2, 1)))
    parallel.save(folder)


@pytest.mark.parametrize("adapter", ["default", "mine"])
def test_what_the_grid_saves_peft_reads(tmp_path: Path, adapter: str) -> None:
    run_on_ranks(4, files_are_pefts, folder=tmp_path, adapter=adapter)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    if adapter != "default":  # that one lies in the folder itself, where transformers takes it up
        read.load_adapter(str(tmp_path / adapter))
    tokens = tokens_of(4)
    with torch.no_grad():
        expected = adapted_model(targets=TARGETS, adapter=adapter)(input_ids=tokens).logits
        assert torch.equal(read(input_ids=tokens).logits, expected)


def shared_heads_are_refused() -> None:
    with pytest.raises(ValueError, match=r"v_proj.*key_value_heads=4 are shared.*row of at most 4"):
        parallelize(adapted_model(targets=["v_proj"]), mesh_of((1, 1, 8, 1)))
    with pytest.raises(ValueError, match=r"lm_head.*leave 'lm_head' out of target_modules"):
        parallelize(adapted_model(targets=["lm_head"]), mesh_of((1, 1, 8, 1)))
    with pytest.raises(ValueError, match=r"lora_B.*bias of its own.*lora_bias=False"):
        parallelize(adapted_model(targets=["q_proj"], bias=True), mesh_of((1, 1, 8, 1)))


def test_an_adapter_that_cannot_be_cut_is_refused() -> None:
    run_on_ranks(8, shared_heads_are_refused)
