"""What is under way has an owner, and nothing is after a step, a validation, a save or an exception."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from fourfold_parallel.common.held import Saved
from fourfold_parallel.grid.collectives import finish_under_way, refuse_under_way, under_way
from fourfold_parallel.grid.engine import Fourfold, GridSession
from fourfold_parallel.grid.gradients import local
from fourfold_parallel.grid.mesh import Mesh
from fourfold_parallel.run.checkpoint import restore, save
from fourfold_parallel.run.objective import token_nats
from fourfold_parallel.testing.grids import Sizes, close, mesh_of
from fourfold_parallel.testing.ranks import run_on_ranks

ROWS, VOCABULARY = 4, 61
LLAMA = LlamaConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=36, vocab_size=VOCABULARY, max_position_embeddings=32, use_cache=False,
)  # fmt: skip


class StoppedError(Exception):
    """Something other than a collective went wrong."""


@contextmanager
def opened(sizes: Sizes, **how: Any) -> Iterator[GridSession]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LLAMA).to(torch.float64).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data, depth, row, col = sizes
    engine = Fourfold(data=data, depth=depth, row=row, col=col, **how)
    with engine.open(model, optimizer, precision="fp32", batch=ROWS, microbatch=ROWS) as session:
        yield session


def nats(session: GridSession) -> Tensor:
    """The loss of this rank's share of a batch."""
    tokens = torch.randint(0, VOCABULARY, (ROWS, 9), generator=torch.Generator().manual_seed(1))
    mine = tokens.chunk(session.ranks)[session.rank]
    logits = session.model(input_ids=mine[:, :-1], use_cache=False).logits
    return token_nats(logits, mine[:, 1:], session.model).sum() / (8 * ROWS)


def step(session: GridSession) -> None:
    for is_last in (False, True):
        with session.microbatch(is_last=is_last):
            session.backward(nats(session))
        refuse_under_way(when="after a microbatch")
    session.update(1.0)
    refuse_under_way(when="after a step")


def weights(session: GridSession) -> dict[str, Tensor]:
    return {name: whole.clone() for name, whole in session.parallel.published()}


def owners_are_not_needed(sizes: Sizes) -> None:
    mesh = mesh_of(sizes)
    for _ in range(50):
        for number in range(8):  # nobody keeps what is sent, and at last nobody keeps the result
            mesh.depth.all_gather(torch.full((33, 7), float(number)), rows=66)
            mesh.depth.all_reduce(torch.full((33, 7), float(number)))
            mesh.depth.reduce_scatter(torch.full((66, 7), float(number)))
        gc.collect()
        pending = under_way()
        assert len(pending) == 24
        for number in range(8):
            gathered, summed, spread = (one.wait() for one in pending[3 * number : 3 * number + 3])
            assert gathered.shape == (66, 7)
            assert spread.shape == summed.shape == (33, 7)
            assert torch.all(gathered == number)
            assert torch.all(summed == 2 * number)
            assert torch.all(spread == 2 * number)
        assert not under_way()


def test_what_is_under_way_outlives_whoever_started_it() -> None:
    run_on_ranks(2, owners_are_not_needed, sizes=(1, 2, 1, 1))


def nothing_is_left(sizes: Sizes, folder: Path, **how: Any) -> None:
    here = folder / "-".join(map(str, sizes))
    with opened(sizes, **how) as session:
        for _ in range(2):
            step(session)
            with torch.no_grad(), session.microbatch(is_last=True):
                nats(session)
            refuse_under_way(when="after a validation")
            save(session, here)
            refuse_under_way(when="after a save")
            restore(session, here / "step-00000000")
            refuse_under_way(when="after a load")


@pytest.mark.parametrize("shards_optimizer", [False, True])
def test_nothing_is_under_way_between_the_parts_of_a_run(
    tmp_path: Path, shards_optimizer: bool
) -> None:
    for sizes in ((1, 4, 1, 1), (2, 2, 1, 1), (1, 1, 2, 2)):
        run_on_ranks(
            4, nothing_is_left, sizes=sizes, folder=tmp_path, shards_optimizer=shards_optimizer
        )


def what_was_gathered_ahead_is_dropped(sizes: Sizes) -> None:
    with opened(sizes) as session, opened(sizes) as twin:
        for one in (session, twin):
            step(one)  # the schedule learns what follows what
            with torch.no_grad(), one.microbatch(is_last=True):
                nats(one)
        with session.microbatch(is_last=True):
            nats(session)  # a forward whose backward, that it gathers for, never comes
            assert under_way()
        assert not under_way()
        with torch.no_grad(), session.microbatch(is_last=True), stopped_forward(session):
            nats(session)
        assert not under_way()
        for one in (session, twin):
            step(one)
        for name, whole in weights(twin).items():
            assert torch.equal(whole, weights(session)[name]), name


@contextmanager
def stopped_forward(session: GridSession) -> Iterator[None]:
    """Stop a forward at the second layer, and go on as if nothing had been."""

    def stop(*_: object) -> None:
        raise StoppedError

    hook = session.model.get_submodule("model.layers.1.mlp").register_forward_pre_hook(stop)
    with suppress(StoppedError):
        yield
    hook.remove()
    assert under_way(), "the test tests nothing"


def test_gathers_that_nobody_asked_for_end_with_the_microbatch() -> None:
    """Of a training forward without a backward, and of a validation that was cut short."""
    run_on_ranks(2, what_was_gathered_ahead_is_dropped, sizes=(1, 2, 1, 1))


def in_forward(session: GridSession) -> None:
    nats(session)
    assert under_way()
    raise StoppedError


def in_backward(session: GridSession) -> None:
    loss = nats(session)

    def stop(gradient: Tensor) -> Tensor:
        del gradient
        assert under_way()
        raise StoppedError

    parameter = session.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    hook = parameter.register_hook(stop)
    try:
        session.backward(loss)
    finally:
        hook.remove()


BROKEN = {"forward": in_forward, "backward": in_backward}


def an_exception_leaves_nothing(sizes: Sizes, where: str, **how: Any) -> None:
    with opened(sizes, **how) as session, opened(sizes, **how) as twin:
        for one in (session, twin):
            for _ in range(2):
                step(one)
        with pytest.raises(StoppedError), session.microbatch(is_last=True):
            BROKEN[where](session)
        assert not under_way()
        session.model.zero_grad(set_to_none=True)
        for one in (session, twin):
            step(one)
        for name, whole in weights(twin).items():
            assert torch.equal(whole, weights(session)[name]), name


@pytest.mark.parametrize("where", list(BROKEN))
def test_after_an_exception_nothing_is_under_way_and_the_next_step_is_right(where: str) -> None:
    run_on_ranks(2, an_exception_leaves_nothing, sizes=(1, 2, 1, 1), where=where)


def test_after_an_exception_no_gradient_is_under_way_to_its_share() -> None:
    run_on_ranks(
        2, an_exception_leaves_nothing, sizes=(2, 1, 1, 1), where="backward", shards_optimizer=True
    )


def other_gradients_leave_nothing(sizes: Sizes) -> None:
    with opened(sizes) as session:
        step(session)
        mine = torch.randn(2, 8, 32, dtype=torch.float64, requires_grad=True)
        counts: list[int] = []
        for scale in (1.0, 2.0):
            out = session.model(inputs_embeds=mine, use_cache=False).logits.sum()
            torch.autograd.grad(out, mine, retain_graph=True)
            (out * scale).backward()
            counts.append(len(under_way()))
        assert counts[0] == counts[1], "the second forward did not end what the first had left"
        assert counts[0]
        # Of this use alone, after one that did not ask for weights' gradients: 1 + 2 times the first's.
        twice = local(session.model.get_parameter("model.layers.0.mlp.up_proj.weight").grad).clone()
        session.model.zero_grad(set_to_none=True)
        session.model(inputs_embeds=mine, use_cache=False).logits.sum().backward()
        once = local(session.model.get_parameter("model.layers.0.mlp.up_proj.weight").grad)
        close(twice, 3 * once, what="after other gradients")
        with session.microbatch(is_last=True):
            out = session.model(inputs_embeds=mine, use_cache=False).logits.sum()
            torch.autograd.grad(out, mine)
        assert not under_way()


def test_gradients_that_nobody_asked_for_end_too() -> None:
    """`torch.autograd.grad` of the inputs alone, and a backward after it through the same graph."""
    run_on_ranks(2, other_gradients_leave_nothing, sizes=(1, 2, 1, 1))


def a_forgotten_collective_is_named(folder: Path) -> None:
    def forget(mesh: Mesh) -> None:
        mesh.depth.all_reduce(torch.ones(3), layer="mine")

    named = "all_reduce of mine over depth in forward; wait for"
    with opened((1, 2, 1, 1)) as session:
        step(session)
        with (
            pytest.raises(RuntimeError, match=f"under way after a microbatch: {named}"),
            session.microbatch(is_last=True),
        ):
            forget(session.parallel.mesh)
        for moment in (
            lambda: save(session, folder),
            lambda: session.restoring(Saved(shapes={}, numbers={})).__enter__(),
            lambda: session.update(1.0),
            lambda: session.parallel.clip(1.0),
            lambda: dict(session.parallel.published()),
        ):
            finish_under_way()
            forget(session.parallel.mesh)
            with pytest.raises(RuntimeError, match=named):
                moment()
    assert not under_way()  # the session's end saw to it


def test_a_collective_that_nobody_waits_for_is_named(tmp_path: Path) -> None:
    run_on_ranks(2, a_forgotten_collective_is_named, folder=tmp_path)


class Operators(TorchDispatchMode):
    """The functional operators that are called, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        del types
        name = str(func)
        if name.startswith("_c10d_functional"):
            self.names.append(name.split(".")[1])
        assert callable(func)
        return func(*args, **(kwargs or {}))  # pyright: ignore[reportCallIssue]


def operators_are_waited_for_at_once(sizes: Sizes) -> None:
    with opened(sizes) as session:
        step(session)
        watch = Operators()
        with watch, session.microbatch(is_last=True):
            nats(session)
            assert not under_way()
        starts, waits = watch.names[::2], watch.names[1::2]
        assert starts
        assert "wait_tensor" not in starts
        assert set(waits) == {"wait_tensor"}


def test_under_a_dispatch_mode_never_two_collectives_are_under_way() -> None:
    for sizes in ((1, 2, 1, 1), (1, 1, 1, 2)):
        run_on_ranks(2, operators_are_waited_for_at_once, sizes=sizes)


def eager_steps_call_plain_collectives(sizes: Sizes) -> set[str]:
    with opened(sizes, shards_optimizer=sizes[0] > 1) as session:
        step(session)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            step(session)
    names = {event.key for event in seen.key_averages()}
    return {name for name in names if name.startswith(("c10d::", "_c10d_functional"))}


def test_a_step_in_eager_mode_calls_no_functional_operator() -> None:
    """The coalesced all-gather of gloo, to which they lead, corrupts memory.

    Nor gloo's reduce-scatter, an all-reduce and a copy: the terms are exchanged, which moves half as much.
    """
    plain = {"c10d::allreduce_", "c10d::_allgather_base_", "c10d::alltoall_base_"}
    seen: set[str] = set()
    for sizes in ((1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2), (2, 1, 1, 1)):
        for names in run_on_ranks(2, eager_steps_call_plain_collectives, sizes=sizes):
            assert names <= plain
            seen |= names
    assert seen == plain


def gathers_of_a_step(*, keeps_tiles: bool) -> tuple[int, float]:
    """All-gathers of the second step, and its loss."""
    with opened((1, 2, 1, 1), keeps_tiles=keeps_tiles) as session:
        step(session)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            step(session)
        loss = float(nats(session))
    counts = {event.key: event.count for event in seen.key_averages()}
    return counts["c10d::_allgather_base_"], loss


def test_kept_tiles_are_gathered_once() -> None:
    """But the embedding's, in each of two microbatches, which is gathered once in any case."""
    (again, loss), _ = run_on_ranks(2, gathers_of_a_step, keeps_tiles=False)
    (once, kept_loss), _ = run_on_ranks(2, gathers_of_a_step, keeps_tiles=True)
    assert again - once == once - 2
    assert kept_loss == loss


def test_sizes_of_a_grid_are_one_where_they_are_not_given() -> None:
    assert Fourfold(depth=2) == Fourfold(data=1, depth=2, row=1, col=1)
    assert Fourfold(row=2, col=2) == Fourfold(data=1, depth=1, row=2, col=2)
    assert Fourfold() == Fourfold(data=1, depth=1, row=1, col=1)
