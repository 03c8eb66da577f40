"""Long runs on busy cores: the losses of one process, to the end, with memory flat.

Every run of these tests shares its cores with processes that do nothing but spin, so that ranks and
gloo's threads are interrupted at every place: whatever holds only by luck of timing does not hold here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from fourfold_parallel.grid.collectives import refuse_under_way
from fourfold_parallel.grid.engine import Fourfold, GridSession
from fourfold_parallel.grid.laws import Sizes, factorisations, in_float64
from fourfold_parallel.run.objective import token_nats
from fourfold_parallel.testing import run_on_ranks

DRIFT = 1e-9
"""Nats. Float64 sums in another order differ by about 1e-15 of a loss; three hundred steps of AdamW
carry such differences on and multiply them. A gradient that is wrong once shows at 1e-4 and more."""
STEPS, EVERY, ROWS, VOCABULARY = 300, 10, 4, 61
LLAMA = LlamaConfig(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=20, vocab_size=VOCABULARY, max_position_embeddings=16, use_cache=False,
    tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def busy_cores() -> Iterator[None]:
    """As many processes that spin as there are cores."""
    spinning = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(os.cpu_count() or 1)
    ]
    yield
    for process in spinning:
        process.kill()
        process.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Nats of a token, of the training batches and of the validations."""

    trained: list[float]
    validated: list[float]


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
def losses_of_one_process() -> Losses:
    """The serial twin."""
    model = in_float64(build())
    optimizer = optimizer_for(model)
    losses = Losses(trained=[], validated=[])
    for step in range(STEPS):
        loss = nats(model, batch_of(step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.trained.append(loss.item())
        if (step + 1) % EVERY == 0:
            with torch.no_grad():
                losses.validated.append(nats(model, batch_of(-1)).item())
    return losses


@contextmanager
def opened(sizes: Sizes, **how: Any) -> Iterator[GridSession]:
    model = build()
    data, depth, row, col = sizes
    engine = Fourfold(data=data, depth=depth, row=row, col=col, **how)
    with engine.open(
        model, optimizer_for(model), precision="fp32", batch=ROWS, microbatch=1
    ) as session:
        yield session


def share_of(session: GridSession, step: int) -> Tensor:
    return batch_of(step).chunk(session.ranks)[session.rank]


def take_steps(session: GridSession, steps: int, folder: Path) -> Losses:
    """Steps of one or two microbatches; every ten a validation and a checkpoint, which is loaded."""
    losses = Losses(trained=[], validated=[])
    for step in range(steps):
        total = torch.zeros((), dtype=torch.float64)
        microbatches = share_of(session, step).split(max(1, ROWS // session.ranks // 2))
        for index, tokens in enumerate(microbatches):
            with session.microbatch(is_last=index == len(microbatches) - 1):
                loss = nats(session.model, tokens)
                session.backward(loss)
            total += loss.detach()
        session.update(1.0)
        losses.trained.append(session.sum(total).item())
        if (step + 1) % EVERY == 0:
            with torch.no_grad(), session.microbatch(is_last=True):
                loss = nats(session.model, share_of(session, -1))
            losses.validated.append(session.sum(loss).item())
            session.save(folder)
            session.load(folder)
    refuse_under_way(when="after a run")
    return losses


def losses_on_the_grid(sizes: Sizes, folder: Path, **how: Any) -> Losses:
    with opened(sizes, **how) as session:
        return take_steps(session, STEPS, folder)


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
def test_three_hundred_steps_on_busy_cores_have_the_losses_of_one_process(
    name: str, tmp_path: Path
) -> None:
    sizes, shards_optimizer = GRIDS[name]
    serial = losses_of_one_process()
    assert serial.trained[-1] < 0.5 * serial.trained[0]
    for losses in run_on_ranks(
        torch.tensor(sizes).prod().item(), losses_on_the_grid, sizes=sizes, folder=tmp_path,
        shards_optimizer=shards_optimizer,
    ):  # fmt: skip
        assert losses.trained == pytest.approx(serial.trained, abs=DRIFT)
        assert losses.validated == pytest.approx(serial.validated, abs=DRIFT)
