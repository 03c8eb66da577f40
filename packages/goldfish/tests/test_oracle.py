"""The mask against a slow twin, written in loops over Python integers from the definition."""

import numpy as np
import pytest
import torch

from fourfold_goldfish import Goldfish, rouge_l
from fourfold_goldfish.memorization import longest_common_subsequence

WORD = 1 << 64


def table() -> np.ndarray:
    """The published table by its recipe: MT19937 seeded 2971215073, 24 low bits of each draw."""
    draws = np.frombuffer(np.random.RandomState(2971215073).bytes(4 * 1_000_003), dtype="<u4")
    return draws & 0xFFFFFF


TABLE = table()


def slow_reference(ids: list[int], k: int, context: int, *, inclusive: bool) -> list[bool]:
    dropped = []
    for target in range(len(ids)):
        window = ids[max(0, target + inclusive - context) : target + inclusive]
        product = 1
        for token in window:
            product = product * token % WORD
        signed = product - WORD if product >= WORD // 2 else product
        below = int(TABLE[signed % 1_000_003]) < -(-(1 << 24) // k)
        dropped.append(len(window) == context and below)
    return dropped


def splitmix(word: int) -> int:
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % WORD
    return word ^ (word >> 31)


def slow_ordered(ids: list[int], k: int, context: int, *, inclusive: bool, key: int) -> list[bool]:
    base = 0x2545F4914F6CDD1D
    dropped = []
    for target in range(len(ids)):
        window = ids[max(0, target + inclusive - context) : target + inclusive]
        polynomial = 0
        for token in window:
            mixed = splitmix(((token + 1) * 0x9E3779B97F4A7C15 + key * base) % WORD)
            polynomial = (polynomial * base + mixed) % WORD
        below = splitmix(polynomial) >> 32 < (1 << 32) // k
        dropped.append(len(window) == context and below)
    return dropped


@pytest.mark.parametrize("inclusive", [False, True])
def test_masks_equal_the_slow_twins(inclusive: bool) -> None:
    """Both families, on 500 random rows of random length, context, k, vocabulary and key."""
    random = np.random.default_rng(7)
    window = "inclusive" if inclusive else "exclusive"
    for _ in range(500):
        context = int(random.integers(1, 60))
        ids = random.integers(
            0, random.choice([2, 300, 200_000]), context + int(random.integers(1, 40))
        )
        k, key = int(random.integers(2, 130)), int(random.integers(0, 1 << 40))
        row = torch.from_numpy(ids)[None]
        ordered = Goldfish(k=k, context=context, window=window, key=key)
        assert ordered.drop(row)[0].tolist() == slow_ordered(
            ids.tolist(), k, context, inclusive=inclusive, key=key
        )
        reference = Goldfish(k=k, context=context, window=window, hash="reference")
        assert reference.drop(row)[0].tolist() == slow_reference(
            ids.tolist(), k, context, inclusive=inclusive
        )


def slow_subsequence(a: list[int], b: list[int]) -> int:
    lengths = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            lengths[i + 1][j + 1] = (
                lengths[i][j] + 1 if x == y else max(lengths[i][j + 1], lengths[i + 1][j])
            )
    return lengths[-1][-1]


def test_subsequences_equal_the_textbook_table() -> None:
    """On 500 random pairs over small alphabets, where long matches are common."""
    random = np.random.default_rng(3)
    for _ in range(500):
        a = random.integers(0, random.integers(1, 8), random.integers(1, 40)).tolist()
        b = random.integers(0, random.integers(1, 8), random.integers(1, 40)).tolist()
        assert longest_common_subsequence(a, b) == slow_subsequence(a, b)
        assert rouge_l(a, b) == pytest.approx(2 * slow_subsequence(a, b) / (len(a) + len(b)))
