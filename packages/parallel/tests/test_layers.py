"""The other layers of a transformer on the grid: loss, norms, embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fourfold_parallel.grid.collectives import Trace
from fourfold_parallel.grid.layers import (
    IGNORED,
    RESIDUAL,
    VOCABULARY,
    Embedding,
    LayerNorm,
    vocabulary_cross_entropy,
)
from fourfold_parallel.grid.schedule import Overlaps, Schedule
from fourfold_parallel.testing.grids import Sizes, close, generator, mesh_of, piece_of
from fourfold_parallel.testing.ranks import run_on_ranks


def cross_entropy_is_torchs(sizes: Sizes, vocabulary: int, scale: float) -> None:
    mesh = mesh_of(sizes)
    random = generator(2)
    logits = scale * torch.randn(5, 7, vocabulary, dtype=torch.float64, generator=random)
    targets = torch.randint(0, vocabulary, (5, 7), generator=random)
    targets[0, :] = IGNORED
    targets[1, :] = torch.arange(7) * (vocabulary - 1) // 6  # a target in every part
    weights = torch.randn(5, 7, dtype=torch.float64, generator=random)
    serial = logits.clone().requires_grad_()
    nats = F.cross_entropy(serial.flatten(0, 1), targets.flatten(), reduction="none").view(5, 7)
    (nats * weights).sum().backward()

    start, stop = mesh.row.bounds(vocabulary)
    mine = logits[..., start:stop].clone().requires_grad_()
    ours = vocabulary_cross_entropy(mine, targets, row=mesh.row, vocabulary=vocabulary)
    (ours * weights).sum().backward()
    assert ours.isfinite().all()
    # One part in 10^10 of the largest logit: cross-entropy is a difference of logits.
    close(ours, nats, what="nats", tolerance=1e-10 * max(1.0, scale))
    assert serial.grad is not None
    assert mine.grad is not None
    close(mine.grad, serial.grad[..., start:stop], what="d logits")


def test_the_vocabularys_parts_give_torchs_cross_entropy() -> None:
    """Targets in every part, ignored ones, unequal and empty parts, logits of 10^4."""
    for vocabulary in (9, 67):
        for scale in (1.0, 1e4):
            run_on_ranks(
                4, cross_entropy_is_torchs, sizes=(1, 1, 4, 1), vocabulary=vocabulary, scale=scale
            )


def nothing_of_the_vocabularys_size_is_sent(sizes: Sizes) -> None:
    trace = Trace()
    mesh = mesh_of(sizes).observed(trace)
    logits = torch.randn(3, 1000, requires_grad=True)
    targets = torch.tensor([0, 1500, IGNORED])
    vocabulary_cross_entropy(logits, targets, row=mesh.row, vocabulary=4000).sum().backward()
    sent = [event.payload_bytes for event in trace.events if event.moment == "start"]
    assert sent == [3 * 4, 2 * 3 * 4]  # float32: the largest logit; partition and target


def test_the_loss_sends_three_numbers_per_token() -> None:
    run_on_ranks(4, nothing_of_the_vocabularys_size_is_sent, sizes=(1, 1, 4, 1))


def embedding_is_torchs(sizes: Sizes) -> None:
    mesh = mesh_of(sizes)
    table = torch.randn(9, 10, dtype=torch.float64, generator=generator(0))
    tokens = torch.randint(0, 9, (4, 6), generator=generator(1))
    serial = table.clone().requires_grad_()
    out = F.embedding(tokens, serial, padding_idx=3)
    out.square().sum().backward()
    parameter = nn.Parameter(mesh.distribute(table, VOCABULARY))
    layer = Embedding(
        parameter, mesh=mesh, name="embedding", schedule=Schedule(Overlaps()), padding_token=3
    )
    rows = tokens.chunk(mesh.batch_size())[mesh.batch_rank()]
    ours = layer(rows)
    start, stop = mesh.col.bounds(10)
    expected = out.chunk(mesh.batch_size())[mesh.batch_rank()][..., start:stop]
    close(ours, expected, what="embeddings")
    ours.square().sum().backward()
    assert serial.grad is not None
    gradient = parameter.grad.to_local() if parameter.grad is not None else torch.zeros(0)
    close(gradient, piece_of(serial.grad, parameter, mesh), what="d table")


def test_an_embedding_with_its_vocabulary_cut_is_torchs() -> None:
    """With a padding token, and with more parts than some rows of the table fill."""
    for sizes in ((1, 1, 4, 1), (1, 2, 2, 1), (1, 2, 1, 2)):
        run_on_ranks(4, embedding_is_torchs, sizes=sizes)


def layer_norm_is_torchs(sizes: Sizes, shift: float) -> None:
    mesh = mesh_of(sizes)
    random = generator(4)
    x = shift + torch.randn(6, 10, dtype=torch.float64, generator=random)
    gain, bias, dy = (torch.randn(10, dtype=torch.float64, generator=random) for _ in range(3))
    serial = [
        x.clone().requires_grad_(),
        gain.clone().requires_grad_(),
        bias.clone().requires_grad_(),
    ]
    out = F.layer_norm(serial[0], (10,), serial[1], serial[2], 1e-5)
    (out * dy).sum().backward()
    parameters = [nn.Parameter(mesh.distribute(one, RESIDUAL)) for one in (gain, bias)]
    norm = LayerNorm(
        *parameters,
        axis=mesh.col,
        epsilon=1e-5,
        summed=[mesh.depth],
        mesh=mesh,
        name="norm",
        schedule=Schedule(Overlaps()),
    )
    start, stop = mesh.col.bounds(10)
    mine = x[:, start:stop].clone().requires_grad_()
    ours = norm(mine)
    (ours * dy[start:stop]).sum().backward()
    close(ours, out[:, start:stop], what="y", tolerance=1e-8)
    pairs: list[tuple[Tensor | None, Tensor | None]] = [
        (mine.grad, serial[0].grad),
        (parameters[0].grad, serial[1].grad),
        (parameters[1].grad, serial[2].grad),
    ]
    for part, whole in pairs:
        assert part is not None
        assert whole is not None
        close(
            getattr(part, "_local_tensor", part), whole[..., start:stop], what="d", tolerance=1e-8
        )


def test_a_layer_norm_with_its_width_cut_is_torchs() -> None:
    """Also where the mean is a thousand times the deviation, which a difference of squares loses."""
    for shift in (0.0, 1e3):
        run_on_ranks(4, layer_norm_is_torchs, sizes=(1, 1, 1, 4), shift=shift)
