"""Laws of `Goldfish` alone; those of every mask are in `test_mask_laws.py`."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fourfold_goldfish import Goldfish


def random_ids(rows: int, length: int, *, vocabulary: int = 32_000, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (rows, length), generator=generator)


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.uint32, np.int64])
def test_an_array_has_the_gaps_of_the_same_tensor(dtype: type) -> None:
    """As memory-mapped token files have them."""
    goldfish = Goldfish(k=3, context=5)
    ids = random_ids(4, 60)
    documents = ids.cumsum(1) // 400_000
    ours = goldfish.drop(ids.numpy().astype(dtype), documents.numpy())
    assert isinstance(ours, np.ndarray)
    assert np.array_equal(ours, goldfish.drop(ids, documents).numpy())


def test_an_array_that_holds_no_ids_is_refused() -> None:
    with pytest.raises(ValueError, match="pass integer ids"):
        Goldfish(k=3, context=5).drop(np.zeros((2, 20)))


@pytest.mark.parametrize(
    ("k", "context"), [(2, 1), (3, 4), (4, 13), (8, 50), (50, 50), (4, 100), (128, 2)]
)
@pytest.mark.parametrize("vocabulary", [2048, 128_256])
def test_one_target_in_k_is_left_out(k: int, context: int, vocabulary: int) -> None:
    """The ordered hash's rate is 1/k for every k and context, where windows do not repeat by chance."""
    ids = random_ids(64, 8192, vocabulary=vocabulary)
    eligible = Goldfish(k=k, context=context).drop(ids)[:, context:].float()
    distinct = min(eligible.numel(), vocabulary**context)
    # Five standard errors of a share over as many independent decisions as there are distinct windows.
    assert abs(eligible.mean().item() - 1 / k) < 5 * math.sqrt((1 / k) * (1 - 1 / k) / distinct)


def test_decisions_of_neighbours_are_independent() -> None:
    """The ordered hash leaves no autocorrelation at lag 1, nor at the lag of its window."""
    drops = Goldfish(k=4, context=13).drop(random_ids(32, 16_384)).float()[:, 13:] - 0.25
    for lag in (1, 2, 13):
        correlation = (drops[:, lag:] * drops[:, :-lag]).mean().item() / (0.25 * 0.75)
        assert abs(correlation) < 5 / math.sqrt(drops.numel())


def test_order_and_small_ids_count() -> None:
    """Unlike in a product: swapped tokens decide anew, ids 0 and 1 neither absorb nor vanish."""
    goldfish = Goldfish(k=2, context=8)
    ids = random_ids(512, 9)
    swapped = ids.clone()
    swapped[:, [2, 5]] = ids[:, [5, 2]]
    zero, unit = ids.clone(), ids.clone()
    zero[:, 3], unit[:, 3] = 0, 1
    for other in (swapped, zero, unit):
        differs = (goldfish.drop(ids)[:, 8] != goldfish.drop(other)[:, 8]).float().mean().item()
        assert 0.35 < differs < 0.65  # half of the decisions, within 6.8 standard errors
    dropped_after_zero = goldfish.drop(zero)[:, 8].float().mean().item()
    assert 0.35 < dropped_after_zero < 0.65


def test_short_documents_are_protected_under_prefix() -> None:
    """A document shorter than a window loses one target in k too, the same ones behind any neighbour."""
    prefix = Goldfish(k=4, context=50, boundary="prefix")
    ids = random_ids(4000, 20)
    share = prefix.drop(ids)[:, 2:].float().mean().item()
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / (4000 * 18))
    assert not prefix.drop(ids)[:, 0].any()
    packed = torch.cat([random_ids(4000, 9, seed=1), ids], dim=1)
    document_ids = (torch.arange(29) >= 9).long().expand(4000, 29)
    assert torch.equal(prefix.drop(packed, document_ids)[:, 9:], prefix.drop(ids))


def test_prefix_and_reset_agree_where_windows_are_whole() -> None:
    ids = random_ids(8, 300)
    document_ids = (torch.arange(300) // 70).expand(8, 300)
    reset = Goldfish(k=4, context=13).drop(ids, document_ids)
    prefix = Goldfish(k=4, context=13, boundary="prefix").drop(ids, document_ids)
    whole = torch.arange(300) % 70 >= 13
    assert torch.equal(prefix[:, whole], reset[:, whole])
    assert not reset[:, ~whole].any()
    assert prefix[:, ~whole].any()


def test_a_random_mask_fills_the_gaps_that_a_hash_keeps() -> None:
    """After 16 copies in a batch, almost every target of a passage was supervised under `random`."""
    passage = random_ids(1, 400).expand(16, 400)
    filled = (~Goldfish(k=4, context=13, hash="random", key=1).drop(passage)).any(dim=0)
    assert filled.float().mean().item() > 0.999
    hashed = (~Goldfish(k=4, context=13).drop(passage)).any(dim=0)
    assert 0.6 < hashed.float().mean().item() < 0.9


def test_a_key_makes_other_gaps() -> None:
    """Masks under two keys agree as often as independent ones do."""
    ids = random_ids(64, 1024)
    first, second = (Goldfish(k=2, context=13, key=key) for key in (1, 2))
    agree = (first.drop(ids) == second.drop(ids))[:, 13:].float().mean().item()
    assert abs(agree - 0.5) < 5 * 0.5 / math.sqrt(64 * 1011)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Goldfish(k=1, context=13), "k=1"),
        (lambda: Goldfish(k=4, context=0), "context=0"),
        (lambda: Goldfish(k=4, context=13, hash="reference", key=7), "key=7"),
        (lambda: Goldfish(k=4, context=13, key=-1), "key=-1"),
        (lambda: Goldfish(k=4, context=13, hash="apertus2", boundary="prefix"), "apertus2"),
        (lambda: Goldfish(k=4, context=13).drop(random_ids(1, 13)), "context=13"),
        (lambda: Goldfish(k=4, context=13).drop(random_ids(1, 13)), "boundary='prefix'"),
        (lambda: Goldfish(k=4, context=13).drop(random_ids(1, 20).float()), "float32"),
        (lambda: Goldfish(k=4, context=13).drop(torch.full((1, 20), -100)), "-100"),
        (lambda: Goldfish(k=4, context=13).drop(random_ids(1, 20), random_ids(1, 19)), "(1, 19)"),
    ],
)
def test_bad_input_is_refused_with_its_value(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        make()  # type: ignore[operator]
    assert words in str(caught.value)


@pytest.mark.parametrize("hash_family", ["ordered", "reference"])
def test_a_window_that_sees_the_target_biases_what_is_learned(hash_family: str) -> None:
    """On a Markov source the loss's minimiser is the truth for an exclusive window, and far from it else.

    With a window of two tokens that ends at the target, (c, v) is left out or not as a pair, so the best
    model gives v the chance p(v|c) keep(c, v) over its sum: no amount of data shows it the rest. With the
    same window before the target, a context is supervised wholly or not at all.
    """
    size = 32
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(size, size, generator=generator).log().neg()
    truth /= truth.sum(dim=1, keepdim=True)
    contexts, values = (
        grid.flatten() + 2 for grid in torch.meshgrid(*[torch.arange(size)] * 2, indexing="ij")
    )
    shared = {"k": 4, "hash": hash_family, "boundary": "straddle"}
    inclusive = Goldfish(context=2, window="inclusive", **shared)  # type: ignore[arg-type]
    keep = ~inclusive.drop(torch.stack([contexts, values], dim=1))[:, 1].view(size, size)
    learned = truth * keep
    learned /= learned.sum(dim=1, keepdim=True)
    distance = (learned - truth).abs().sum(dim=1).mean().item() / 2
    assert 0.15 < distance < 0.3  # the share left out, 1/4, or near it
    never = ~keep[torch.arange(size), truth.argmax(dim=1)]
    assert 0 < never.float().mean().item() < 0.6  # the likeliest continuation is never seen
    exclusive = Goldfish(context=2, window="exclusive", **shared)  # type: ignore[arg-type]
    rows = torch.stack([contexts, values, values], dim=1)
    kept = ~exclusive.drop(rows)[:, 2]
    for target in range(size):
        rows[:, 2] = target
        # Whatever stands at the target the same contexts are kept: there the minimiser is the truth.
        assert torch.equal(~exclusive.drop(rows)[:, 2], kept)
    assert 0.6 < kept.float().mean().item() < 0.9
