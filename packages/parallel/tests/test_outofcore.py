"""Training out of core is the plain run to the bit, keeps its budget, and refuses what it cannot do."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.records import read_record
from fourfold_parallel.common.values import from_json, to_json
from fourfold_parallel.grid.engine import Fourfold
from fourfold_parallel.grid.gradients import local
from fourfold_parallel.plan.timeline import BudgetError
from fourfold_parallel.run.engines import DDP, FSDP2, Engine, Session, Single
from fourfold_parallel.run.outofcore import Decisions, OutOfCore
from fourfold_parallel.run.recipe import Run
from fourfold_parallel.run.stores import Disk, Host, StoreError, Throttled
from fourfold_parallel.run.train import train
from fourfold_parallel.testing.ranks import run_on_ranks

VOCABULARY, ROWS, LENGTH = 61, 6, 16
LLAMA = LlamaConfig(
    hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    intermediate_size=48, vocab_size=VOCABULARY, max_position_embeddings=32, attention_dropout=0.1,
    tie_word_embeddings=True, attn_implementation="eager",
)  # fmt: skip
GPT2 = GPT2Config(  # dropout of 0.1 in three places, tied, views of one projection
    n_embd=32, n_layer=4, n_head=4, vocab_size=VOCABULARY, n_positions=32, use_cache=False
)
MIXTURES = ("KKKK", "SSSS", "RRRR", "SRSK", "KSRS")


def build(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).train()


@contextmanager
def opened(engine: Engine, config: Any = LLAMA, *, precision: Any = "fp32") -> Iterator[Session]:
    model = build(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with engine.open(model, optimizer, precision=precision, batch=ROWS, microbatch=ROWS) as session:
        yield session


def backward_of(session: Session, step: int, microbatches: int = 1) -> list[Tensor]:
    """Losses of a step's microbatches, as the training loop computes them."""
    tokens = torch.randint(
        0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step)
    )
    torch.manual_seed(100 + step)  # dropout
    losses = []
    for index, rows in enumerate(tokens.chunk(session.ranks)[session.rank].chunk(microbatches)):
        with session.microbatch(is_last=index == microbatches - 1):
            loss = session.model(input_ids=rows, labels=rows).loss
            session.backward(loss / microbatches)
        losses.append(loss.detach())
    return losses


def told(engine: Engine, config: Any, precision: str, microbatches: int, steps: int) -> list[Tensor]:
    """Every loss, the gradients of the first two steps, and the weights after all steps."""
    values: list[Tensor] = []
    with opened(engine, config, precision=precision) as session:
        for step in range(steps):
            values += backward_of(session, step, microbatches)
            if step < 2:
                grads = [local(p.grad) for p in session.model.parameters() if p.grad is not None]
                values += [gradient.clone() for gradient in grads]
            session.update(1.0)
        values += [local(p.detach()).clone() for p in session.model.parameters()]
    return values


def same(these: list[Tensor], those: list[Tensor]) -> bool:
    return len(these) == len(those) and all(map(torch.equal, these, those))


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_losses_gradients_and_twenty_steps_are_the_plain_runs(
    config: Any, precision: str, microbatches: int
) -> None:
    """To the bit, for whatever is kept, swapped or recomputed, with dropout and a tied head."""
    plain = told(Single(), config, precision, microbatches, 20)
    for letters in MIXTURES:
        engine = OutOfCore(inner=Single(), budget=Decisions(letters=letters))
        assert same(plain, told(engine, config, precision, microbatches, 20)), letters
