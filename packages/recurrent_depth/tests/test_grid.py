"""A recurrent model on the grid is the serial model: losses and gradients through random depths."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from fourfold_parallel.grid.gradients import local
from fourfold_parallel.grid.huggingface import parallelize
from fourfold_parallel.testing.grids import Sizes, close, mesh_of, piece_of
from fourfold_parallel.testing.ranks import run_on_ranks
from fourfold_recurrent_depth.causal_lm import RecurrentDepthForCausalLM
from fourfold_recurrent_depth.states import RowStates
from fourfold_recurrent_depth.training.models import RecurrentDepth

MODEL = 1e-9
"""Float64 through a dozen blocks; a missing term shows at 1e-3 and above."""
ROWS = 4
DEPTHS = ((2, 2), (0, 1), (1, 3))
"""(without gradient, with gradient), one after another: the order of layers differs from step to step."""


def build() -> RecurrentDepthForCausalLM:
    shape = RecurrentDepth(
        width=24, heads=2, prelude=1, core=2, coda=1, hidden=10, vocabulary=31, context=16,
        mean_recurrence=4, mean_backprop=2,
    )  # fmt: skip
    model = shape.build(seed=0)
    assert isinstance(model, RecurrentDepthForCausalLM)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # gains and biases must matter
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
    return model.to(torch.float64).train()


def batch() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 31, (ROWS, 7), generator=random)
    labels = tokens.masked_fill(torch.rand(ROWS, 7, generator=random) < 0.3, -100)
    labels[0] = -100
    return tokens, labels


@lru_cache
def serial(depth: tuple[int, int]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, loss and gradients of one process."""
    model = build()
    tokens, labels = batch()
    states = RowStates(tuple(range(ROWS)))
    logits = model(tokens, num_steps=depth, initial_state=states).logits
    assert logits is not None
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), loss.detach(), gradients


def model_is_serial(sizes: Sizes) -> None:
    mesh = mesh_of(sizes)
    tokens, labels = batch()
    share = ROWS // mesh.batch_size()
    mine = slice(mesh.batch_rank() * share, (mesh.batch_rank() + 1) * share)
    parallel = parallelize(build(), mesh)
    states = RowStates(tuple(range(ROWS))[mine])
    for depth in DEPTHS:
        logits, loss, gradients = serial(depth)
        parallel.model.zero_grad()
        out = parallel.model(
            tokens[mine], labels=labels[mine], num_steps=depth, initial_state=states
        )
        out.loss.backward()
        what = f"{sizes} {depth}"
        close(out.logits, logits[mine], what=f"{what}: logits", tolerance=MODEL)
        close(out.loss, loss, what=f"{what}: loss", tolerance=MODEL)
        ours = {name: p for name, p in parallel.model.named_parameters() if p.grad is not None}
        assert ours.keys() == gradients.keys()
        for name, parameter in ours.items():
            expected = piece_of(parallel.stored[name].keep(gradients[name]), parameter, mesh)
            assert parameter.grad is not None
            close(local(parameter.grad), expected, what=f"{what}: d{name}", tolerance=MODEL)
    whole = {name: p.detach() for name, p in build().named_parameters()}
    published = dict(parallel.published())
    assert whole.keys() == published.keys()
    assert all(torch.equal(published[name], whole[name]) for name in whole)


@pytest.mark.parametrize("sizes", [(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)])
def test_a_recurrent_model_on_two_ranks_is_serial(sizes: Sizes) -> None:
    """(data, depth, row, col): logits, loss, every gradient, and the published names and values."""
    run_on_ranks(2, model_is_serial, sizes=sizes)


def test_a_recurrent_model_on_a_square_is_serial() -> None:
    """Heads cut over row while the residual stream, states included, is cut over col."""
    run_on_ranks(4, model_is_serial, sizes=(1, 1, 2, 2))
