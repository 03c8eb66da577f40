"""Updates on the host, behind backward: the numbers are plain data parallelism's to the bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from fourfold_parallel.common.records import read_record
from fourfold_parallel.run.engines import DDP, Engine, Session, Single
from fourfold_parallel.run.hosted import HostUpdate, groups_of
from fourfold_parallel.run.outofcore import Decisions, OutOfCore
from fourfold_parallel.run.recipe import Run
from fourfold_parallel.run.stores import Disk, Host, Throttled
from fourfold_parallel.run.train import train
from fourfold_parallel.testing.ranks import run_on_ranks

VOCABULARY, ROWS, LENGTH = 61, 6, 16
SLOW_WAY = Throttled(store=Host(), bytes_per_s=2e7, latency_s=1e-4)
BY_LAYER = HostUpdate(exchange_bytes=1, store=SLOW_WAY)


def build(*, tied: bool = True) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, use_cache=False,
        intermediate_size=48, vocab_size=VOCABULARY, max_position_embeddings=32, attention_dropout=0.1,
        tie_word_embeddings=tied, attn_implementation="eager",
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).train()


@contextmanager
def opened(engine: Engine, *, precision: Any = "fp32", tied: bool = True) -> Iterator[Session]:
    model = build(tied=tied)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with engine.open(model, optimizer, precision=precision, batch=ROWS, microbatch=ROWS) as session:
        yield session


def step_of(session: Session, step: int, microbatches: int = 1) -> list[Tensor]:
    """Losses of a step's microbatches, and the norm of the gradients."""
    tokens = torch.randint(
        0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step)
    )
    torch.manual_seed(100 + step)  # dropout
    values: list[Tensor] = []
    for index, rows in enumerate(tokens.chunk(session.ranks)[session.rank].chunk(microbatches)):
        with session.microbatch(is_last=index == microbatches - 1):
            loss = session.model(input_ids=rows, labels=rows).loss
            session.backward(loss / microbatches)
        values.append(loss.detach())
    return [*values, torch.tensor(session.update(0.5))]


def told(engine: Engine, precision: str, microbatches: int, steps: int) -> list[Tensor]:
    """All losses and norms, and the weights and moments at the end."""
    with opened(engine, precision=precision) as session:
        values = [v for step in range(steps) for v in step_of(session, step, microbatches)]
        state = session.state()
        held = {**state.weights, **state.moments}
        return values + [held[name].parts[0].values.clone() for name in sorted(held)]


def same(these: list[Tensor], those: list[Tensor]) -> bool:
    return len(these) == len(those) and all(map(torch.equal, these, those))


@pytest.mark.parametrize(("precision", "microbatches"), [("fp32", 1), ("fp32", 3), ("bf16", 2)])
def test_one_process_takes_the_plain_steps(precision: str, microbatches: int) -> None:
    plain = told(Single(), precision, microbatches, 6)
    for engine in (HostUpdate(), BY_LAYER, replace(BY_LAYER, pipelined=False)):
        assert same(plain, told(engine, precision, microbatches, 6)), engine


def test_twenty_steps_out_of_core_are_the_plain_ones() -> None:
    """The whole of KARMA: layers kept, swapped and recomputed, gradients leaving, updates on the host."""
    engine = OutOfCore(inner=BY_LAYER, budget=Decisions(letters="SRSK"))
    assert same(told(Single(), "fp32", 2, 20), told(engine, "fp32", 2, 20))


def law_of_data_parallelism() -> None:
    plain = told(DDP(), "fp32", 2, 4)
    latent = replace(BY_LAYER, exchange_latency_s=0.002)
    for engine in (latent, replace(latent, pipelined=False), OutOfCore(inner=latent, budget=2**40)):
        mine = told(engine, "fp32", 2, 4)
        assert same(plain, mine), engine


def test_two_ranks_take_the_steps_of_ddp() -> None:
    """Pipelined or not: two shares have one sum."""
    run_on_ranks(2, law_of_data_parallelism)


def law_of_ranks_that_accelerate_does_not_see() -> None:
    hidden = {name: os.environ.pop(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    try:
        with pytest.raises(ValueError, match="train each by itself"), opened(DDP()):
            pass
    finally:
        os.environ.update(hidden)


def test_a_process_group_without_a_launch_does_not_train_replicas_apart() -> None:
    run_on_ranks(2, law_of_ranks_that_accelerate_does_not_see)


def test_a_forward_that_does_not_wait_for_its_weights_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The broken twin of the law above: old weights give other losses."""
    plain = told(Single(), "fp32", 1, 3)
    slow = replace(BY_LAYER, store=Throttled(store=Host(), bytes_per_s=2e7, latency_s=0.05))
    assert same(plain, told(slow, "fp32", 1, 3))
    from fourfold_parallel.run import hosted

    monkeypatch.setattr(hosted._HostSession, "_await_weights", lambda *_: None)
    assert not same(plain[:6], told(slow, "fp32", 1, 3)[:6])


def test_gradients_leave_while_backward_runs() -> None:
    """Before the embedding has its gradient, every layer's has left, and the device has forgotten it."""
    with opened(BY_LAYER, tied=False) as session:
        hosted: Any = session
        embedding = session.model.get_input_embeddings().weight
        seen: list[tuple[int, int]] = []

        def look(gradient: Tensor) -> None:
            del gradient
            held = sum(p.grad is not None for p in session.model.parameters())
            seen.append((hosted._left, held))

        embedding.register_hook(look)
        step_of(session, 0)
        groups = groups_of(build(tied=False), session.model, 1)
        assert len(groups) == 4 + 3  # layers, head, last norm, embedding
        assert seen == [(6, 0)]


class Sometimes(nn.Module):
    """A second map that only some ranks use, and a third that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.never = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor, *, uses: bool) -> Tensor:
        x = self.always(x)
        return self.sometimes(x) if uses else x


def weights_with(engine: Engine, uses: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Sometimes()
    # Weight decay moves whatever is stepped, with a gradient of zero too.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    with engine.open(model, optimizer, precision="fp32", batch=2, microbatch=1) as session:
        for _ in range(3):
            with session.microbatch(is_last=True):
                session.backward(session.model(torch.ones(1, 3), uses=uses).square().sum())
            session.update(1e9)
        return {
            name: held.parts[0].values.clone() for name, held in session.state().weights.items()
        }


def law_of_what_is_not_used(engine: HostUpdate) -> None:
    from fourfold_parallel.launch import Ranks

    before = {name: value.detach() for name, value in _fresh().named_parameters()}
    mine = weights_with(engine, uses=Ranks().rank == 1)
    assert torch.equal(mine["never.weight"], before["never.weight"])
    assert not torch.equal(mine["sometimes.weight"], before["sometimes.weight"])
    first, second = Ranks().gather(mine)
    assert all(torch.equal(first[name], second[name]) for name in first)


def _fresh() -> nn.Module:
    torch.manual_seed(0)
    return Sometimes()


def test_what_no_rank_uses_is_not_stepped_and_what_some_use_is_on_all() -> None:
    for engine in (HostUpdate(exchange_bytes=1), HostUpdate(pipelined=False)):
        run_on_ranks(2, law_of_what_is_not_used, engine=engine)


class StoppedError(Exception):
    """A run that its progress ended."""


def stop_after_two(done: int, total: int, what: str) -> None:
    del total, what
    if done == 2:
        raise StoppedError


def test_a_run_resumes_under_another_engine(tmp_path: Path, small_run: Run) -> None:
    """Two steps on the host and the rest plain, or the other way, are the plain run."""
    run = replace(small_run, checkpoint_every=1)
    losses = {}
    for name, first, then in (
        ("plain", Single(), Single()),
        ("to", Single(), BY_LAYER),
        ("from", BY_LAYER, Single()),
    ):
        record, checkpoints = tmp_path / f"{name}.jsonl", tmp_path / name
        with pytest.raises(StoppedError):
            train(
                replace(run, engine=first),
                record=record,
                checkpoints=checkpoints,
                progress=stop_after_two,
            )
        train(replace(run, engine=then), record=record, checkpoints=checkpoints)
        losses[name] = [event.number("loss_nats") for event in read_record(record).of("step")]
    assert losses["plain"] == losses["to"] == losses["from"]


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="no memory that the host computes in"):
        HostUpdate(store=Throttled(store=Disk(), bytes_per_s=1.0))
    with pytest.raises(ValueError, match="exchange_bytes=0"):
        HostUpdate(exchange_bytes=0)
    rows = torch.randint(0, VOCABULARY, (2, LENGTH))
    with opened(BY_LAYER) as session:
        with session.microbatch(is_last=True):
            loss = session.model(input_ids=rows, labels=rows).loss
            session.backward(loss)
        with (
            pytest.raises(RuntimeError, match="call update before"),
            session.microbatch(is_last=True),
        ):
            pass
    with opened(BY_LAYER) as session, session.microbatch(is_last=True):
        loss = session.model(input_ids=rows, labels=rows).loss
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="second gradient"):
            loss.backward()
