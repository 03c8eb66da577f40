"""What users do to a model on the grid between its steps: it stays right, or is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from fourfold_parallel.grid.engine import Fourfold
from fourfold_parallel.grid.gradients import local
from fourfold_parallel.grid.huggingface import Parallel, parallelize
from fourfold_parallel.grid.trainer import share_loader
from fourfold_parallel.testing.grids import close, in_float64, mesh_of, piece_of
from fourfold_parallel.testing.ranks import run_on_ranks

GRADIENT = 1e-9
"""Float64 through two layers; a missing term shows at 1e-3 and above."""
ROWS, VOCABULARY = 4, 61
LLAMA = LlamaConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    intermediate_size=20, vocab_size=VOCABULARY, max_position_embeddings=32, use_cache=False,
)  # fmt: skip
OFF = "lm_head.weight"


def build() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LLAMA).to(torch.float64)


def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (ROWS, 7), generator=torch.Generator().manual_seed(3))


def loss_of(model: Any, share: int, shares: int) -> Tensor:
    mine = tokens().chunk(shares)[share]
    return model(input_ids=mine, labels=mine).loss


def serial_twin() -> nn.Module:
    """With the gradients of all rows; transformers' own loss is in float32."""
    serial: Any = in_float64(build())
    logits = serial(input_ids=tokens()).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten()).backward()
    return serial


def broken(module: nn.Module, *_: Any) -> None:
    raise RuntimeError(f"{type(module).__name__} broke")


def gradients_are_serial(parallel: Parallel) -> None:
    serial = serial_twin()
    for name, parameter in parallel.model.named_parameters():
        expected = parallel.stored[name].keep(serial.get_parameter(name).grad)
        assert parameter.grad is not None, name
        piece = piece_of(expected, parameter, parallel.mesh)
        close(local(parameter.grad), piece, what=name, tolerance=GRADIENT)


def fail_once(backward: Callable[[], None], model: nn.Module) -> None:
    handle = model.get_submodule("model.layers.0").register_full_backward_hook(broken)
    with pytest.raises(RuntimeError, match="broke"):
        backward()
    handle.remove()


def a_backward_that_broke_off() -> None:
    mesh = mesh_of((2, 1, 1, 1))
    parallel = parallelize(build(), mesh)
    backward = lambda: loss_of(parallel.model, mesh.data.rank, 2).backward()  # noqa: E731
    for _ in range(2):
        fail_once(backward, parallel.model)
        parallel.model.zero_grad()
        backward()
        gradients_are_serial(parallel)
        parallel.model.zero_grad()


def test_a_backward_that_broke_off_is_forgotten() -> None:
    run_on_ranks(2, a_backward_that_broke_off)


def a_backward_that_broke_off_before_a_cut_step() -> None:
    serial = serial_twin()
    norm = nn.utils.clip_grad_norm_(serial.parameters(), 1e9)
    model = build()
    engine = Fourfold(data=2, depth=1, row=1, col=1, shards_optimizer=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with engine.open(model, optimizer, precision="fp32", batch=ROWS, microbatch=2) as session:
        backward = lambda: session.backward(loss_of(session.model, session.rank, 2))  # noqa: E731
        fail_once(backward, session.model)
        session.model.zero_grad()
        backward()
        assert session.update(1e9) == pytest.approx(norm.item(), rel=GRADIENT)


def test_a_cut_step_forgets_it_too() -> None:
    run_on_ranks(2, a_backward_that_broke_off_before_a_cut_step)


def unfrozen_later() -> None:
    mesh = mesh_of((2, 1, 1, 1))
    model = build()
    model.get_parameter(OFF).requires_grad_(False)
    parallel = parallelize(model, mesh)
    loss_of(parallel.model, mesh.data.rank, 2).backward()
    parallel.model.zero_grad()
    parallel.model.get_parameter(OFF).requires_grad_(True)
    loss_of(parallel.model, mesh.data.rank, 2).backward()
    gradients_are_serial(parallel)


def test_what_is_unfrozen_later_is_summed_too() -> None:
    run_on_ranks(2, unfrozen_later)


def unfrozen_after_the_cut() -> None:
    model = build()
    model.get_parameter(OFF).requires_grad_(False)
    engine = Fourfold(data=2, depth=1, row=1, col=1, shards_optimizer=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with engine.open(model, optimizer, precision="fp32", batch=ROWS, microbatch=2) as session:
        session.model.get_parameter(OFF).requires_grad_(True)
        with pytest.raises(RuntimeError, match="unfrozen after"):
            loss_of(session.model, session.rank, 2)


def test_unfreezing_after_the_optimizers_state_was_cut_is_refused() -> None:
    run_on_ranks(2, unfrozen_after_the_cut)


def copies_do_not_train() -> None:
    mesh = mesh_of((2, 1, 1, 1))
    parallel = parallelize(build(), mesh)
    twin = copy.deepcopy(parallel.model)
    with torch.no_grad():
        assert torch.equal(
            loss_of(twin, mesh.data.rank, 2), loss_of(parallel.model, mesh.data.rank, 2)
        )
    with pytest.raises(RuntimeError, match="copy of a parallelized model"):
        loss_of(twin, mesh.data.rank, 2)
    states = parallel.model.state_dict()
    parallel.model.load_state_dict(states)
    with pytest.raises(ValueError, match="assign=True"):
        parallel.model.load_state_dict(states, assign=True)
    with pytest.raises(ValueError, match=r"use Parallel\.save"):
        parallel.model.save_pretrained("nowhere")


def test_copies_and_assigned_parameters_are_refused() -> None:
    run_on_ranks(2, copies_do_not_train)


def a_frozen_weight_changes() -> None:
    for sizes in ((1, 2, 1, 1), (1, 1, 2, 1)):
        mesh = mesh_of(sizes)
        parallel = parallelize(build(), mesh)
        model = parallel.model
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("embed_tokens" in name)
        loss = loss_of(model, mesh.batch_rank(), mesh.batch_size())
        weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
        with torch.no_grad():
            weight.mul_(3.0)
        with pytest.raises(RuntimeError, match=r"up_proj\.weight was changed"):
            loss.backward()
        parallel.abandon()


def test_a_frozen_weight_changed_between_forward_and_backward_is_refused() -> None:
    run_on_ranks(2, a_frozen_weight_changes)


def saved_as_plain(folder: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LLAMA).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.generation_config.eos_token_id = 7
    parallel = parallelize(model.float(), mesh_of((1, 1, 2, 1)))
    parallel.save(folder)
    read = AutoModelForCausalLM.from_pretrained(folder)
    assert read.dtype == torch.float32
    assert read.generation_config.eos_token_id == 7


def test_files_say_their_number_format_and_how_to_generate(tmp_path: Path) -> None:
    run_on_ranks(2, saved_as_plain, folder=tmp_path / "saved")


def orders(epochs: int) -> list[list[int]]:
    loader: Any = share_loader(
        list(range(9)),  # pyright: ignore[reportArgumentType]
        mesh_of((2, 1, 1, 1)), batch=2, collate_fn=lambda rows: rows, shuffle=True, seed=1,
    )  # fmt: skip
    drawn = [[row for batch in loader for row in batch] for _ in range(epochs)]
    loader.set_epoch(1)
    drawn.append([row for batch in loader for row in batch])
    assert isinstance(loader.sampler, DistributedSampler)
    return drawn


def test_every_epoch_has_an_order_of_its_own() -> None:
    first, second = run_on_ranks(2, orders, epochs=3)
    for mine, theirs in zip(first, second, strict=True):
        assert len({*mine, *theirs}) == 8  # of nine rows, one is left out
    assert first[0] != first[1] != first[2] != first[0]
    assert first[3] == first[1]


def generated() -> tuple[bool, int]:
    mesh = mesh_of((1, 2, 1, 1))
    alone, model = build().eval(), parallelize(build(), mesh).model.eval()
    mine = tokens().chunk(2)[mesh.batch_rank()]
    how: Any = {"max_new_tokens": 4 + 3 * mesh.batch_rank(), "do_sample": False, "use_cache": True}
    expected = in_float64(alone).generate(mine, **how)
    return torch.equal(model.generate(mine, synced_gpus=True, **how), expected), expected.shape[1]


def test_shares_may_end_their_texts_apart() -> None:
    (first, length), (second, longer) = run_on_ranks(2, generated)
    assert first
    assert second
    assert length < longer
