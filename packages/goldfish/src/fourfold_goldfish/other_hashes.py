"""Hashes that others publish and deploy, bit for bit; the reasons not to use them are in `Goldfish.hash`.

Each function of `OF_WINDOWS` decides for every window of `context` ids that lies in a row: [batch, row -
context + 1], by the window's first id. All but `avalanche` look a word up in a table of uniform draws.
"""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from jaxtyping import Bool, Int
from torch import Tensor

_TABLE_SIZE = 1_000_003
_TABLE_SEED = 2_971_215_073
"""Size and seed of the published table: a prime above a million, and the 47th Fibonacci number."""


def product_hits(
    tokens: Int[Tensor, "batch row"], k: int, context: int
) -> Bool[Tensor, "batch window"]:
    """`hash-table` of Hans et al. 2024: the product of the ids modulo 2^64, as a signed word."""
    return _in_table(_products(tokens, context), k)


def apertus_hits(
    tokens: Int[Tensor, "batch row"], k: int, context: int
) -> Bool[Tensor, "batch window"]:
    """Apertus (2025): the same product, after ids below 0, its padding, became 0."""
    return product_hits(tokens.clamp(min=0), k, context)


def apertus2_hits(
    tokens: Int[Tensor, "batch row"], k: int, context: int
) -> Bool[Tensor, "batch window"]:
    """Apertus 2 (2026): a dot product with fixed odd coefficients instead of the product."""
    windows = tokens.shape[1] - context + 1
    total = torch.zeros_like(tokens[:, :windows])
    for place, coefficient in enumerate(_coefficients(context)):
        total.add_(tokens[:, place : place + windows], alpha=coefficient)
    return _in_table(total, k)


def avalanche_hits(
    tokens: Int[Tensor, "batch row"], k: int, context: int
) -> Bool[Tensor, "batch window"]:
    """`hash-avalanche` of Hans et al. 2024's code: mixed low halves of the products, no table.

    The published comparison of an integer with (2^32 - 1)/k rounds both to float32; so does this one.
    """
    mixed = mix_low_half(_products(tokens, context))
    return mixed.to(torch.float32) < torch.tensor((2**32 - 1) / k, dtype=torch.float32)


def static_hits(tokens: Int[Tensor, "batch row"], k: int, start: int) -> Bool[Tensor, "batch row"]:
    """`static`: every k-th place of a row from `start` on, whatever stands there."""
    places = torch.arange(tokens.shape[1], device=tokens.device) - start
    return ((places >= 0) & (places % k == 0)).expand(tokens.shape).clone()


def random_hits(tokens: Int[Tensor, "batch row"], k: int, seed: int) -> Bool[Tensor, "batch row"]:
    """`seeded_random` as meant: one place in k at random, from a generator of its own.

    The published code indexes rows with these draws instead of masking places, so that rows 0 and 1 of a
    batch are lost and the others untouched.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    draws = torch.randint(1, k + 1, tokens.shape, generator=generator)
    return (draws == k).to(tokens.device)


def mix_low_half(words: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """The published 32-bit avalanche, in int64: Wang's hash with three of its lines applied twice."""
    low = 0xFFFFFFFF
    words = (~words + (words << 21)) & low
    words = (words << 21) - words - 1
    words = words ^ ((words >> 24) & ((1 << 40) - 1))
    words = (words + (words << 3) + (words << 8)) & low
    words = words * 265
    words = words ^ (words >> 14)
    words = (words + (words << 2) + (words << 4)) & low
    words = words * 21
    words = words ^ (words >> 28)
    return (words + (words << 31)) & low


def _products(tokens: Int[Tensor, "batch row"], length: int) -> Int[Tensor, "batch window"]:
    """Product of every window modulo 2^64, in about 2 log2(length) passes.

    A window of 2n ids is two windows of n side by side; others are put together from powers of two.
    Exact, since multiplication modulo 2^64 is associative.
    """
    windows = tokens.shape[1] - length + 1
    power, size, done = tokens, 1, 0
    product: Tensor | None = None
    while True:
        if length & size:
            part = power[:, done : done + windows]
            product = part if product is None else product * part
            done += size
        if size * 2 > length:
            break
        power = power[:, :-size] * power[:, size:]
        size *= 2
    assert product is not None
    return product


def _in_table(words: Int[Tensor, "batch window"], k: int) -> Bool[Tensor, "batch window"]:
    """True where the table's entry at (word mod 1,000,003) is below 1/k."""
    return _table(k, words.device)[words.remainder(_TABLE_SIZE)]


@lru_cache(maxsize=8)
def _table(k: int, device: torch.device) -> Bool[Tensor, " slot"]:
    """The published table as booleans, made on the CPU wherever it is used.

    torch draws float32 in [0, 1) as 24 random bits over 2^24, so `entry < 1/k` is a comparison of
    integers, the same in every precision. (The published code draws on the training device, which gives
    another table on a GPU.)
    """
    generator = torch.Generator("cpu").manual_seed(_TABLE_SEED)
    entries = (torch.rand(_TABLE_SIZE, generator=generator) * (1 << 24)).long()
    return (entries < math.ceil((1 << 24) / k)).to(device)


@lru_cache(maxsize=8)
def _coefficients(context: int) -> tuple[int, ...]:
    """Apertus 2's coefficients: 62 random bits each, made odd."""
    generator = torch.Generator("cpu").manual_seed(_TABLE_SEED + context)
    return tuple((torch.randint(0, 1 << 62, (context,), generator=generator) | 1).tolist())


Hits = Callable[[Int[Tensor, "batch row"], int, int], Bool[Tensor, "batch place"]]

OF_WINDOWS: Mapping[str, Hits] = {
    "reference": product_hits,
    "avalanche": avalanche_hits,
    "apertus": apertus_hits,
    "apertus2": apertus2_hits,
}
"""By name: ids, `k` and `context` to the decision of each window."""

OF_PLACES: Mapping[str, Hits] = {"static": static_hits, "random": random_hits}
"""Controls, which are no function of the ids: ids, `k` and `key` to the decision of each place of a row."""
