"""Two hundred steps in bfloat16: a grid rounds elsewhere than one process, and learns the same."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from fourfold_parallel.grid.engine import Fourfold
from fourfold_parallel.run.objective import token_nats
from fourfold_parallel.testing.ranks import run_on_ranks

STEPS, ROWS, SEQUENCE = 200, 8, 32
ANY_STEP, AT_THE_END = 0.02, 0.01
"""Largest relative difference of the loss, averaged over ten steps."""
GRIDS: list[tuple[int, int, int, int]] = [(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)]


def model_and_optimizer() -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=64, vocab_size=128, max_position_embeddings=SEQUENCE, use_cache=False,
        )
    )  # fmt: skip
    return model, torch.optim.AdamW(model.parameters(), lr=3e-3)


def characters(step: int) -> Tensor:
    """Rows of a program's text, as code points."""
    text = torch.tensor([min(ord(c), 127) for c in inspect.getsource(argparse)])
    starts = torch.randint(
        len(text) - SEQUENCE, (ROWS,), generator=torch.Generator().manual_seed(step)
    )
    return torch.stack([text[start : start + SEQUENCE] for start in starts.tolist()])


def nats(model: nn.Module, rows: Tensor) -> Tensor:
    logits = model(input_ids=rows[:, :-1]).logits
    return token_nats(logits, rows[:, 1:], model).sum()


def alone() -> list[float]:
    model, optimizer = model_and_optimizer()
    losses = []
    for step in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            loss = nats(model, characters(step)) / (ROWS * (SEQUENCE - 1))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def on_a_grid(sizes: tuple[int, int, int, int]) -> list[float]:
    model, optimizer = model_and_optimizer()
    data, depth, row, col = sizes
    engine = Fourfold(data=data, depth=depth, row=row, col=col)
    losses = []
    with engine.open(model, optimizer, precision="bf16", batch=ROWS, microbatch=ROWS) as session:
        for step in range(STEPS):
            rows = characters(step).chunk(session.ranks)[session.rank]
            with session.microbatch(is_last=True):
                loss = nats(session.model, rows) / (ROWS * (SEQUENCE - 1))
                session.backward(loss)
            session.update(1.0)
            losses.append(session.sum(loss.detach()).item())
    return losses


@pytest.fixture(scope="module")
def serial() -> Tensor:
    return by_tens(alone())


def by_tens(losses: list[float]) -> Tensor:
    return torch.tensor(losses).view(-1, 10).mean(1)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", GRIDS)
def test_a_grid_learns_in_bfloat16_as_one_process_does(
    sizes: tuple[int, int, int, int], serial: Tensor
) -> None:
    assert serial[-1] < 0.8 * serial[0]
    apart = (by_tens(run_on_ranks(2, on_a_grid, sizes=sizes)[0]) / serial - 1).abs()
    assert apart.max() < ANY_STEP
    assert apart[-1] < AT_THE_END
