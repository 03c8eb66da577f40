"""The mask and the metrics against slow twins, written from the definitions with numpy and loops."""

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from fourfold_goldfish import Goldfish, rouge_l
from fourfold_goldfish.memorization.extraction import compare, longest_common_substring

WORD = 1 << 64
PRIME = 1_000_003
BASE = 0x2545F4914F6CDD1D
SPREAD = 0x9E3779B97F4A7C15


def table() -> np.ndarray:
    """The published table by its recipe: MT19937 seeded 2971215073, 24 low bits of each draw."""
    draws = np.frombuffer(np.random.RandomState(2971215073).bytes(4 * PRIME), dtype="<u4")
    return draws & 0xFFFFFF


TABLE = table()


def below_in_table(keys: np.ndarray, k: int) -> np.ndarray:
    return TABLE[keys.view(np.int64) % PRIME] < -(-(1 << 24) // k)


def numpy_product(windows: np.ndarray, k: int, key: int) -> np.ndarray:
    return below_in_table(np.multiply.reduce(windows, axis=-1), k)


def numpy_dot(windows: np.ndarray, k: int, key: int) -> np.ndarray:
    """With Apertus 2's coefficients, which torch's generator draws."""
    context = windows.shape[-1]
    generator = torch.Generator().manual_seed(2971215073 + context)
    drawn = torch.randint(0, 2**62, (context,), dtype=torch.int64, generator=generator) | 1
    return below_in_table((windows * drawn.numpy().view(np.uint64)).sum(-1, dtype=np.uint64), k)


def mixed(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    return (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)


def key_word(key: int) -> int:
    word = int(mixed(np.asarray([key * SPREAD % WORD], dtype=np.uint64))[0])
    return word ^ (word >> 31)


def numpy_ordered(windows: np.ndarray, k: int, key: int) -> np.ndarray:
    polynomial = np.zeros(windows.shape[:-1], dtype=np.uint64)
    for place in range(windows.shape[-1]):
        polynomial = polynomial * np.uint64(BASE) + windows[..., place] + np.uint64(1)
    words = mixed(polynomial * np.uint64(SPREAD) + np.uint64(key_word(key)))
    # Below 1/k of the range, counted from the most negative int64.
    return (words ^ np.uint64(1 << 63)) < np.uint64(WORD // k)


FAMILIES = {"ordered": numpy_ordered, "reference": numpy_product, "apertus2": numpy_dot}


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_equal_the_numpy_twin_on_10_000_rows(family: str) -> None:
    """1,000 settings of context, k, window, vocabulary, key and integer type, 10 random rows each."""
    random = np.random.default_rng(7)
    for _ in range(1000):
        context, k = int(random.integers(1, 60)), int(random.choice([2, 3, 4, 8, 32, 50, 128]))
        inclusive = bool(random.integers(2))
        key = int(random.integers(0, 1 << 40)) if family == "ordered" else 0
        length = context + int(random.integers(1, 40))
        ids = random.integers(0, random.choice([2, 300, 200_000]), (10, length))
        first = context - inclusive
        windows = sliding_window_view(ids.astype(np.uint64), context, axis=1)
        expected = np.zeros(ids.shape, dtype=bool)
        expected[:, first:] = FAMILIES[family](windows[:, : length - first], k, key)
        goldfish = Goldfish(
            k=k,
            context=context,
            hash=family,  # type: ignore[arg-type]
            window="inclusive" if inclusive else "exclusive",
            key=key,
        )
        rows = torch.from_numpy(ids.astype(random.choice(["i4", "i8"])))
        assert np.array_equal(goldfish.drop(rows).numpy(), expected)


def test_short_windows_equal_the_twin() -> None:
    """Under `prefix` each target is decided by what its document holds of its window, however packed."""
    random = np.random.default_rng(11)
    for _ in range(100):
        context, k = int(random.integers(1, 20)), int(random.integers(2, 9))
        inclusive = bool(random.integers(2))
        lengths = random.integers(1, 30, 4)
        ids = random.integers(0, 300, lengths.sum())
        expected = []
        for document in np.split(ids, np.cumsum(lengths)[:-1]):
            for target in range(len(document)):
                stop = target + inclusive
                window = document[max(0, stop - context) : stop].astype(np.uint64)
                expected.append(len(window) > 0 and bool(numpy_ordered(window[None], k, 0)[0]))
        goldfish = Goldfish(
            k=k,
            context=context,
            window="inclusive" if inclusive else "exclusive",
            boundary="prefix",
        )
        documents = torch.from_numpy(np.repeat(np.arange(4), lengths))[None]
        assert goldfish.drop(torch.from_numpy(ids)[None], documents)[0].tolist() == expected


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
        assert rouge_l(a, b) == 2 * slow_subsequence(a, b) / (len(a) + len(b))


def slow_substring(a: list[int], b: list[int]) -> int:
    lengths = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            lengths[i + 1][j + 1] = lengths[i][j] + 1 if x == y else 0
    return max(map(max, lengths))


def slow_edits(a: list[int], b: list[int]) -> int:
    costs = [[i + j for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            replaced = costs[i][j] + (x != y)
            costs[i + 1][j + 1] = min(replaced, costs[i][j + 1] + 1, costs[i + 1][j] + 1)
    return costs[-1][-1]


def test_substrings_and_edits_equal_the_textbook_tables() -> None:
    """On 500 random pairs, longer than a machine word and shorter, and padded with -1 as early ends are."""
    random = np.random.default_rng(4)
    for _ in range(500):
        letters = random.integers(1, 8)
        length = int(random.integers(1, 90))
        a = random.integers(0, letters, random.integers(0, length)).tolist()
        a += [-1] * (length - len(a))
        b = random.integers(0, letters, length).tolist()
        [compared] = compare(torch.tensor([a]), torch.tensor([b]))
        assert compared.longest_run == slow_substring(a, b)
        assert compared.edit_similarity == 1 - slow_edits(a, b) / length
        assert longest_common_substring(a, []) == 0
