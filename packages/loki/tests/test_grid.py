"""Loki on the grid: heads split over the row axis, calibration over the data axis."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fourfold_loki import Budget, Count, Sparse, attending, fit
from fourfold_loki.calibration import calibrate_tokens
from fourfold_loki.selectors import Loki
from fourfold_parallel.grid.huggingface import parallelize
from fourfold_parallel.grid.mesh import Mesh
from fourfold_parallel.testing.ranks import run_on_ranks

FLOAT64 = 1e-6
"""The basis is float32; logits are of order one."""


def small_model() -> LlamaForCausalLM:
    """Random weights, in float64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=96,
        max_position_embeddings=64,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).double().eval()


def splitting_changes_nothing() -> None:
    """Each rank selects for its own heads, with its part of the basis."""
    model = small_model()
    ids = torch.randint(2, 96, (2, 48), generator=torch.Generator().manual_seed(1))
    basis = fit(calibrate_tokens(model, ids))
    budget = Budget(amount=Count(keys=12))

    def logits(model, basis) -> torch.Tensor:  # type: ignore[no-untyped-def]
        mode = Sparse(selector=Loki(basis=basis, widths=(4, 4)), budget=budget, reach="every query")
        with attending(model, mode), torch.no_grad():
            return model(ids, use_cache=False).logits

    expected = logits(model, basis)
    mesh = Mesh(row=2)
    split = parallelize(model, mesh).model
    rank = mesh.row.rank
    torch.testing.assert_close(
        logits(split, basis.heads(rank, rank + 1)), expected, atol=FLOAT64, rtol=0
    )


def test_a_model_split_over_two_ranks_selects_as_the_whole_model() -> None:
    run_on_ranks(2, splitting_changes_nothing)


def merging_is_calibrating_on_everything() -> None:
    """Two ranks with a window each end with the statistics of both windows, provenance included."""
    model = small_model()
    ids = torch.randint(2, 96, (2, 48), generator=torch.Generator().manual_seed(1))
    mesh = Mesh(data=2)
    rank = mesh.batch_rank()
    merged = calibrate_tokens(model, ids[rank : rank + 1]).over(mesh)
    parts = [calibrate_tokens(model, ids[row : row + 1]) for row in range(2)]
    expected = parts[0] + parts[1]
    assert merged.source == expected.source
    for name in ("keys", "queries", "keys_before", "queries_before"):
        for part in ("count", "total", "outer"):
            torch.testing.assert_close(
                getattr(getattr(merged, name), part), getattr(getattr(expected, name), part)
            )


def test_ranks_that_calibrate_apart_agree_on_the_whole() -> None:
    run_on_ranks(2, merging_is_calibrating_on_everything)
