"""The loss that computes no logits for what is left out, against plain cross-entropy."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold_goldfish import Goldfish, goldfish_cross_entropy
from fourfold_goldfish.cross_entropy import PLAIN, Split, Tail, dropped_nats
from fourfold_goldfish.objective import CompactedNextToken
from fourfold_parallel.grid.mesh import Mesh
from fourfold_parallel.run.data import Batch
from fourfold_parallel.run.models import Llama
from fourfold_parallel.run.objective import KeepAll, NextToken
from fourfold_parallel.testing.ranks import run_on_ranks

VOCABULARY = 37


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, targets with ignored ones, and a goldfish mask."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(3, 50, 16, generator=generator, dtype=dtype).requires_grad_()
    head = torch.randn(VOCABULARY, 16, generator=generator, dtype=dtype).requires_grad_()
    tokens = torch.randint(0, VOCABULARY, (3, 51), generator=generator)
    drop = Goldfish(k=2, context=4).drop(tokens)[:, 1:]
    targets = tokens[:, 1:].clone()
    targets[:, :7] = -100
    return hidden, head, targets, drop


def masked_by_hand(
    hidden: Tensor, head: Tensor, targets: Tensor, drop: Tensor, tail: Tail = PLAIN
) -> Tensor:
    labels = targets.masked_fill(drop, -100)
    logits = tail(hidden @ head.T)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


TAILS = (PLAIN, Tail(scale=0.25), Tail(cap=3.0), Tail(scale=2.0, cap=5.0))


@pytest.mark.parametrize("chunk", [1, 7, 1024])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tail", TAILS, ids=str)
def test_loss_and_gradients_equal_manual_masking(chunk: int, reduction: str, tail: Tail) -> None:
    hidden, head, targets, drop = problem()
    kept = int((~drop & (targets != -100)).sum())
    expected = masked_by_hand(hidden, head, targets, drop, tail)
    expected /= kept if reduction == "mean" else 1
    ours = goldfish_cross_entropy(
        hidden,
        head,
        targets,
        drop,
        chunk=chunk,
        reduction=reduction,  # type: ignore[arg-type]
        tail=tail,
    )
    torch.testing.assert_close(ours, expected)
    theirs = torch.autograd.grad(3 * expected, (hidden, head))
    for mine, other in zip(torch.autograd.grad(3 * ours, (hidden, head)), theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_backend_that_is_none_is_refused() -> None:
    """By name, instead of torch's in its place."""
    hidden, head, targets, drop = problem()
    with pytest.raises(ValueError, match="backend='liger' is none of"):
        goldfish_cross_entropy(hidden, head, targets, drop, backend="liger")  # type: ignore[arg-type]


def test_what_is_left_out_has_no_gradient_at_all() -> None:
    """Exactly zero, not nearly."""
    hidden, head, targets, drop = problem()
    goldfish_cross_entropy(hidden, head, targets, drop).backward()
    assert hidden.grad is not None
    ignored = drop | (targets == -100)
    assert not hidden.grad[ignored].any()
    assert hidden.grad[~ignored].abs().sum(-1).min() > 0


def test_without_gaps_it_is_cross_entropy_bit_for_bit() -> None:
    """k to infinity: the mask is empty, and masked labels are the labels."""
    hidden, head, targets, _ = problem(torch.float32)
    never = Goldfish(k=1 << 62, context=4).drop(targets.clamp(min=0))
    assert not never.any()
    plain = F.cross_entropy((hidden @ head.T).flatten(0, 1), targets.flatten())
    masked = F.cross_entropy(
        (hidden @ head.T).flatten(0, 1), targets.masked_fill(never, -100).flatten()
    )
    assert torch.equal(plain, masked)
    # The chunked sum is another order of the same float32 additions.
    torch.testing.assert_close(goldfish_cross_entropy(hidden, head, targets, never), plain)


def test_kept_and_dropped_targets_add_up_to_all() -> None:
    """The telemetry's loss on dropped targets, from the same hidden states."""
    hidden, head, targets, drop = problem()
    kept = goldfish_cross_entropy(hidden, head, targets, drop, reduction="sum")
    dropped, count = dropped_nats(hidden, head, targets, drop)
    everything = masked_by_hand(hidden, head, targets, torch.zeros_like(drop))
    torch.testing.assert_close(kept + dropped, everything)
    assert count == int((drop & (targets != -100)).sum())
    assert not dropped.requires_grad


def test_a_batch_without_targets_costs_nothing() -> None:
    hidden, head, targets, _ = problem()
    loss = goldfish_cross_entropy(hidden, head, targets, torch.ones_like(targets, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_bfloat16_heads_lose_no_more_than_their_rounding() -> None:
    hidden, head, targets, drop = problem(torch.float32)
    low = goldfish_cross_entropy(hidden.bfloat16(), head.bfloat16(), targets, drop)
    # bfloat16 keeps 8 bits; logits of standard deviation 4 are off by about 0.02.
    torch.testing.assert_close(
        low, goldfish_cross_entropy(hidden, head, targets, drop), atol=0.05, rtol=0.01
    )
    [gradient] = torch.autograd.grad(low, hidden)
    assert gradient.dtype == torch.float32


def split_equals_whole(tail: Tail) -> None:
    """On every rank: the loss, its part of the head's gradient and all of the hidden states'."""
    hidden, head, targets, drop = problem()
    mesh = Mesh(row=torch.distributed.get_world_size())
    start, stop = mesh.row.bounds(VOCABULARY)
    piece = head[start:stop].detach().requires_grad_()
    ours = goldfish_cross_entropy(
        hidden, piece, targets, drop, chunk=16, backend=Split(mesh.row, VOCABULARY), tail=tail
    )
    whole = goldfish_cross_entropy(hidden, head, targets, drop, tail=tail)
    torch.testing.assert_close(ours, whole)
    of_hidden, of_piece = torch.autograd.grad(ours, (hidden, piece))
    expected_hidden, expected_head = torch.autograd.grad(whole, (hidden, head))
    torch.testing.assert_close(of_hidden, expected_hidden)
    torch.testing.assert_close(of_piece, expected_head[start:stop])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("tail", TAILS[::3], ids=str)
def test_a_split_vocabulary_changes_nothing(ranks: int, tail: Tail) -> None:
    run_on_ranks(ranks, split_equals_whole, tail=tail)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_trains_alike_without_the_logits_of_what_is_left_out(tied: bool) -> None:
    """The runtime's loss and every gradient, with and without the head's unneeded rows."""
    model = Llama(
        width=16, depth=2, heads=2, kv_heads=1, hidden=32, vocabulary=64, context=64, tied=tied
    )
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        tokens=torch.randint(0, 64, (3, 40), generator=generator),
        document_ids=torch.zeros(3, 40, dtype=torch.long),
        addresses=(0, 1, 2),
    )
    mask = Goldfish(k=2, context=4)
    sums, gradients = [], []
    for objective in (NextToken(mask=mask), CompactedNextToken(mask=mask, chunk=7)):
        built = model.build(seed=0)
        loss = objective.loss(built, batch, objective.targets(batch))
        loss.nats_sum.backward()
        sums.append(loss)
        gradients.append([parameter.grad for parameter in built.parameters()])
    torch.testing.assert_close(sums[0].nats_sum, sums[1].nats_sum)
    assert sums[0].telemetry["dropped_targets"] == sums[1].telemetry["dropped_targets"]
    for theirs, ours in zip(*gradients, strict=True):
        # float32 sums of 60 rows in another order.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_head_that_is_more_than_a_matrix_is_refused() -> None:
    model = Llama(
        width=16, depth=1, heads=2, kv_heads=1, hidden=32, vocabulary=64, context=64, tied=False
    ).build(seed=0)
    model.set_output_embeddings(torch.nn.Linear(16, 64, bias=True))
    tokens = torch.ones(1, 8, dtype=torch.long)
    batch = Batch(tokens=tokens, document_ids=tokens, addresses=(0,))
    objective = CompactedNextToken(mask=KeepAll())
    with pytest.raises(ValueError, match="the head has a bias"):
        objective.loss(model, batch, objective.targets(batch))


KERNEL = """
import torch
import torch.nn.functional as F
from fourfold_goldfish.kernels import losses_and_slopes

generator = torch.Generator().manual_seed(0)
for rows, vocabulary in ((5, 37), (3, 5000), (2, 4096)):
    logits = 8 * torch.randn(rows, vocabulary, generator=generator)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    leaf = logits.clone().requires_grad_()
    expected = F.cross_entropy(leaf, targets, reduction="none")
    expected.sum().backward()
    nats = losses_and_slopes(logits, targets)
    torch.testing.assert_close(nats, expected)
    torch.testing.assert_close(logits, leaf.grad)

from fourfold_goldfish.cross_entropy import Tail, goldfish_cross_entropy

hidden = torch.randn(1, 9, 16, generator=generator, requires_grad=True)
head = torch.randn(37, 16, generator=generator, requires_grad=True)
targets = torch.randint(0, 37, (1, 9), generator=generator)
for tail in (Tail(scale=0.25), Tail(scale=2.0, cap=5.0)):
    results = []
    for backend in ("torch", "triton"):
        loss = goldfish_cross_entropy(
            hidden, head, targets, torch.zeros(1, 9, dtype=torch.bool), backend=backend, tail=tail
        )
        results.append((loss, *torch.autograd.grad(loss, (hidden, head))))
    torch.testing.assert_close(*results)
"""


def test_the_triton_kernel_agrees_under_its_interpreter() -> None:
    """Losses and slopes, for vocabularies below, at and above one block. Not run on a GPU."""
    pytest.importorskip("triton", reason="the extra [triton] is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KERNEL], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("vocabulary", [32_000, 128_256])
def test_machine_code_for_gpus(target: str, vocabulary: int) -> None:
    """No register goes to memory, shared memory fits, logits are read and written 16 bytes at a time."""
    pytest.importorskip("triton", reason="the extra [triton] is not installed")
    from fourfold_goldfish.kernels import losses_and_slopes
    from fourfold_parallel.testing import gpu_code

    with gpu_code.launches() as caught:
        losses_and_slopes(torch.zeros(8, vocabulary), torch.zeros(8, dtype=torch.long))
    [one] = caught
    assert one.grid == (8,)
    code = gpu_code.compiled(one, target)
    assert code.spilled_bytes == 0
    assert 0 < code.registers < 256
    assert code.shared_bytes <= gpu_code.SHARED_LIMITS[target]
    read, written = ("global_load_dwordx4", "global_store_dwordx4") if target == "gfx942" else (
        r"ld\.global\S*\.v4\.b32", r"st\.global\S*\.v4\.b32"
    )  # fmt: skip
    assert code.has(read)
    assert code.has(written)
    assert code.has(r"v_exp_f32" if target == "gfx942" else r"ex2\.approx")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h, w, t, d: (h, w, t[:, 1:], d), "(3, 49)"),
        (lambda h, w, t, d: (h, w, t, d[:, 1:]), "(3, 49)"),
        (lambda h, w, t, d: (h, w, t, d.long()), "torch.int64"),
        (lambda h, w, t, d: (h, w, t + 37 * (t == 5), d), "the head has 37"),
        (lambda h, w, t, d: (h, w, t.masked_fill(t == 5, -2), d), "ids -2"),
    ],
)
def test_what_does_not_match_is_refused(change: object, words: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        goldfish_cross_entropy(*change(*problem()))  # type: ignore[operator]
    assert words in str(caught.value)
