"""Long runs on busy cores: the losses of one process, to the end, with memory flat.

Every run of these tests shares its cores with processes that do nothing but spin, at low priority, so
that ranks and gloo's threads are interrupted anywhere: what holds only by luck of timing falls here.
"""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from fourfold_parallel.grid.collectives import refuse_under_way
from fourfold_parallel.grid.engine import Fourfold, GridSession
from fourfold_parallel.grid.schedule import Overlaps
from fourfold_parallel.run.checkpoint import restore, save
from fourfold_parallel.run.objective import token_nats
from fourfold_parallel.testing.grids import Sizes, factorisations, in_float64, mesh_of
from fourfold_parallel.testing.ranks import close_ranks, run_on_ranks

DRIFT = 1e-9
"""Nats. Float64 sums in another order differ by about 1e-15 of a loss; three hundred steps of AdamW
carry such differences on and multiply them. A gradient that is wrong once shows at 1e-4 and more."""
EVERY, ROWS, VOCABULARY = 10, 4, 61
LLAMA = LlamaConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=20, vocab_size=VOCABULARY, max_position_embeddings=16, use_cache=False,
    tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def busy_cores() -> Iterator[None]:
    """As many processes that spin as there are cores."""
    spinning = [
        subprocess.Popen(["nice", sys.executable, "-c", "while True: pass"])
        for _ in range(os.cpu_count() or 1)
    ]
    yield
    for process in spinning:
        process.kill()
        process.wait()


Losses = tuple[list[float], list[float]]
"""Nats of a token: of the training batches, and of the validations."""


def build() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LLAMA).to(torch.float64).train()


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-6)


def batch_of(step: int) -> Tensor:
    """Six batches in turn, and another (`-1`) that is never trained on."""
    return torch.randint(
        0,
        VOCABULARY,
        (ROWS, 9),
        generator=torch.Generator().manual_seed(step % 6 if step >= 0 else 6),
    )


def nats(model: nn.Module, tokens: Tensor) -> Tensor:
    """The sum over the tokens of a share of the batch, divided by those of the batch."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return token_nats(logits, tokens[:, 1:], model).sum() / (8 * ROWS)


@lru_cache
def losses_of_one_process(steps: int) -> Losses:
    """The serial twin."""
    model = in_float64(build())
    optimizer = optimizer_for(model)
    trained: list[float] = []
    validated: list[float] = []
    for step in range(steps):
        loss = nats(model, batch_of(step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        trained.append(loss.item())
        if (step + 1) % EVERY == 0:
            with torch.no_grad():
                validated.append(nats(model, batch_of(-1)).item())
    return trained, validated


@contextmanager
def opened(sizes: Sizes, **how: Any) -> Iterator[GridSession]:
    model = build()
    data, depth, row, col = sizes
    # More gathers ahead than anyone needs: what is tested here is how they share memory.
    overlaps = Overlaps(gathers_ahead=4)
    engine = Fourfold(data=data, depth=depth, row=row, col=col, overlaps=overlaps, **how)
    with engine.open(
        model, optimizer_for(model), precision="fp32", batch=ROWS, microbatch=1
    ) as session:
        yield session


@contextmanager
def unchecked_shapes() -> Iterator[None]:
    """Other tests check shapes, which takes longer than the steps."""
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", False)


def share_of(session: GridSession, step: int) -> Tensor:
    return batch_of(step).chunk(session.ranks)[session.rank]


def take_steps(session: GridSession, steps: int, folder: Path) -> Losses:
    """Steps; of every ten one has two microbatches and ends with a validation, a save and a load."""
    trained: list[float] = []
    validated: list[float] = []
    for step in range(steps):
        total = torch.zeros((), dtype=torch.float64)
        is_tenth = (step + 1) % EVERY == 0
        microbatches = share_of(session, step).chunk(2 if is_tenth else 1)
        for index, tokens in enumerate(microbatches):
            with session.microbatch(is_last=index == len(microbatches) - 1):
                loss = nats(session.model, tokens)
                session.backward(loss)
            total += loss.detach()
        session.update(1.0)
        trained.append(session.sum(total).item())
        if is_tenth:
            with torch.no_grad(), session.microbatch(is_last=True):
                loss = nats(session.model, share_of(session, -1))
            validated.append(session.sum(loss).item())
            restore(session, save(session, folder))
    refuse_under_way(when="after a run")
    return trained, validated


def losses_on_the_grid(sizes: Sizes, steps: int, folder: Path, **how: Any) -> Losses:
    with unchecked_shapes(), opened(sizes, **how) as session:
        return take_steps(session, steps, folder)


GRIDS: dict[str, tuple[Sizes, bool]] = {
    "depth": ((1, 2, 1, 1), False),
    "row": ((1, 1, 2, 1), False),
    "col": ((1, 1, 1, 2), False),
    "data": ((2, 1, 1, 1), False),
    "data, states cut": ((2, 1, 1, 1), True),
    "depth over 4": ((1, 4, 1, 1), False),
    "depth and row": ((1, 2, 2, 1), False),
    "data, states cut, and depth": ((2, 2, 1, 1), True),
}


@pytest.mark.usefixtures("busy_cores")
@pytest.mark.parametrize("name", list(GRIDS))
@pytest.mark.parametrize("steps", [80, pytest.param(300, marks=pytest.mark.slow)])
def test_a_long_run_on_busy_cores_has_the_losses_of_one_process(
    name: str, steps: int, tmp_path: Path
) -> None:
    sizes, shards_optimizer = GRIDS[name]
    trained, validated = losses_of_one_process(steps)
    assert trained[-1] < 0.75 * trained[0]
    for ours in run_on_ranks(
        math.prod(sizes), losses_on_the_grid, sizes=sizes, steps=steps, folder=tmp_path,
        shards_optimizer=shards_optimizer,
    ):  # fmt: skip
        assert ours[0] == pytest.approx(trained, abs=DRIFT)
        assert ours[1] == pytest.approx(validated, abs=DRIFT)


def results_are_whole(sizes: Sizes, rounds: int) -> None:
    axis = mesh_of(sizes).depth
    piece = torch.arange(64.0 * 64).view(64, 64)
    whole = piece.repeat(axis.size, 1)
    for _ in range(rounds):
        gathers = [axis.all_gather(piece + number, rows=len(whole)) for number in range(8)]
        sums = [axis.all_reduce(piece + number) for number in range(4)]
        spreads = [axis.reduce_scatter(whole + number) for number in range(4)]
        for number, gather in enumerate(gathers):
            assert torch.equal(gather.wait(), whole + number)
        for number, (added, spread) in enumerate(zip(sums, spreads, strict=True)):
            assert torch.equal(added.wait(), axis.size * (piece + number))
            assert torch.equal(spread.wait(), axis.size * (piece + number))


@pytest.mark.usefixtures("busy_cores")
def test_many_collectives_under_way_at_once_leave_memory_whole() -> None:
    """Sixteen at a time, of 16 KiB, three hundred times."""
    run_on_ranks(2, results_are_whole, sizes=(1, 2, 1, 1), rounds=300)


LEFT_BEHIND = 8 * 2**20
"""Bytes in 4,000 steps, 2 KiB a step: what an allocator may mislay. A step that keeps one of the tiles
that it gathers keeps more."""


def own_bytes(sizes: Sizes, steps: int, folder: Path) -> int:
    """Memory of this process alone after some steps in a session of their own."""
    with unchecked_shapes(), opened(sizes, shards_optimizer=sizes[0] > 1) as session:
        take_steps(session, steps, folder)
    gc.collect()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.usefixtures("busy_cores")
@pytest.mark.parametrize("sizes", factorisations(4), ids=str)
def test_five_thousand_steps_on_busy_cores_leave_no_memory_behind(
    sizes: Sizes, tmp_path: Path
) -> None:
    close_ranks(4)  # all of these runs are laws of the same processes
    ends = [run_on_ranks(4, own_bytes, sizes=sizes, steps=250, folder=tmp_path) for _ in range(20)]
    warm, last = ends[3], ends[-1]
    for before, after in zip(warm, last, strict=True):
        assert after - before < LEFT_BEHIND


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.usefixtures("busy_cores")
def test_a_hundred_starts_on_busy_cores_come_up_and_go_down(tmp_path: Path) -> None:
    """New processes and a new process group each time, a few steps, and an end without a signal."""
    program = Path(__file__).parent / "starts_on_ranks.py"
    started = subprocess.run(
        [sys.executable, str(program), str(tmp_path), "100"],
        capture_output=True,
        text=True,
        timeout=7000,
        check=False,
    )
    assert started.returncode == 0, started.stdout[-3000:] + started.stderr[-6000:]
    assert len([*tmp_path.glob("*/step-*/checkpoint.json")]) == 100
