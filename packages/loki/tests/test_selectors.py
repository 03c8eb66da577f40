"""Selectors apart from models: what they rank at lengths and settings at which they could go wrong."""

import pytest
import torch

from fourfold_loki.budget import Budget, Count
from fourfold_loki.selectors import Candidates, Quest, SparQ, Streaming


def candidates(tokens: int, dtype: torch.dtype) -> Candidates:
    """One query of two heads over random keys of width 16."""
    generator = torch.Generator().manual_seed(0)
    return Candidates(
        queries=torch.randn(1, 2, 1, 16, generator=generator).to(dtype),
        keys=torch.randn(1, 2, tokens, 16, generator=generator).to(dtype),
        visible=torch.ones(1, 1, 1, tokens, dtype=torch.bool),
        scaling=1.0,
        layer=0,
        turned=False,
        past_mass=torch.zeros(1, 2, tokens),
        allowance=torch.full((1, 1, 1), tokens),
    )


def test_recency_counts_in_bfloat16_too() -> None:
    """Numbers of 8 bits tell no neighbours apart above 256."""
    among = candidates(8192, torch.bfloat16)
    budget = Budget(amount=Count(keys=16), selection="per head")
    scores = Streaming(sinks=2).scores(among)
    keep = budget.keep(scores, among.visible, kv_heads=2, layer=0)
    for head in range(2):
        assert keep[0, head, 0].nonzero().flatten().tolist() == [0, 1, *range(8178, 8192)]


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="sinks=-1"):
        Streaming(sinks=-1)
    with pytest.raises(ValueError, match="page=0"):
        Quest(page=0)
    with pytest.raises(ValueError, match="channels=0"):
        SparQ(channels=0)
    with pytest.raises(ValueError, match="channels=17 of a head of 16"):
        SparQ(channels=17).scores(candidates(20, torch.float32))
