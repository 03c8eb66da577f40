"""Every pair of grids: saved on one, read on the other, and the step after that is the serial one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from fourfold_parallel.grid.engine import Fourfold
from fourfold_parallel.grid.gradients import local
from fourfold_parallel.launch import Ranks
from fourfold_parallel.run.checkpoint import restore, save
from fourfold_parallel.run.objective import token_nats
from fourfold_parallel.testing.grids import Sizes, in_float64, piece_of

ROWS, VOCABULARY = 8, 64
LLAMA = LlamaConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8,
    intermediate_size=48, vocab_size=VOCABULARY, max_position_embeddings=16, use_cache=False,
    tie_word_embeddings=False,
)  # fmt: skip
"""Whose heads divide over every grid of eight ranks."""


def saved(sizes: Sizes, folder: Path) -> None:
    """Called on every rank: two steps on a grid, and a checkpoint."""
    with _opened(sizes) as session:
        for step in range(2):
            _step(session, step)
        save(session, folder)


def worst_difference(sources: list[Path], target: Sizes) -> float:
    """Called on every rank: load each checkpoint on a grid, and take the next step; in float64.

    Each load is checked against the checksums of what was saved, which is equality of every bit.

    Returns:
        The largest difference of any parameter after the step that follows, from that of one process.
    """
    serial = in_float64(_model())
    optimizer = _optimizer(serial)
    for step in range(3):
        optimizer.zero_grad()
        (_nats(serial, _batch(step)) / (8 * ROWS)).backward()
        nn.utils.clip_grad_norm_(serial.parameters(), 0.1)
        optimizer.step()
    expected = dict(serial.named_parameters())
    ranks, worst = Ranks(), 0.0
    with _opened(target) as session:
        parallel = session.parallel
        for path in sources:
            restore(session, path, ranks=ranks)
            _step(session, 2)
            for name, parameter in parallel.model.named_parameters():
                kept = parallel.stored[name].keep(expected[name].detach())
                piece = piece_of(kept, parameter, parallel.mesh)
                if piece.numel():
                    worst = max(worst, (local(parameter.detach()) - piece).abs().max().item())
    return worst


def _model() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LLAMA).to(torch.float64).train()


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    # A large epsilon: where a gradient is nearly zero, AdamW divides rounding by rounding.
    return torch.optim.AdamW(model.parameters(), lr=3e-3, eps=1e-3)


def _batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCABULARY, (ROWS, 9), generator=generator)


def _nats(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return token_nats(logits, tokens[:, 1:], model).sum()


def _opened(sizes: Sizes) -> Any:
    data, depth, row, col = sizes
    model = _model()
    return Fourfold(data=data, depth=depth, row=row, col=col).open(
        model, _optimizer(model), precision="fp32", batch=ROWS, microbatch=ROWS
    )


def _step(session: Any, step: int) -> None:
    mine = _batch(step).chunk(session.ranks)[session.rank]
    with session.microbatch(is_last=True):
        session.backward(_nats(session.model, mine) / (8 * ROWS))
    session.update(0.1)
