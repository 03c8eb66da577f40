"""Goldfish loss: leave about one target in `k` out of the loss, the same ones wherever a passage recurs.

A model that never learns one token in `k` cannot recite a passage: at each left-out token it must guess,
and after a wrong guess it is on another path. Which targets are left out is decided by a hash of the
`context` tokens before them (Hans et al. 2024, section 3), so every copy of a passage has the same gaps
and no number of repetitions fills them. Inputs and attention are untouched; only targets are masked.

    loss = mean of -log p(x_i | x_<i) over the i that `Goldfish.drop` does not drop
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Hash = Literal["ordered", "reference"]
"""`ordered` is ours; `reference` is the published hash table, bit for bit."""

_TABLE_SIZE = 1_000_003
_TABLE_SEED = 2_971_215_073
"""Size and seed of the published table: a prime above a million, and the 47th Fibonacci number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goldfish:
    """Which targets the loss leaves out: a pure function of token ids.

    The same for every sharding, device, process count and data-loader worker; no random state is used.
    Defaults follow the paper's formula. What its code does, and what its checkpoints were trained with,
    is `Goldfish(k=4, context=13, hash="reference", window="inclusive", boundary="straddle")`.
    """

    k: int
    """One target in `k` is left out, on average."""
    context: int
    """Tokens hashed per decision (h in the paper; 13 there)."""
    hash: Hash = "ordered"
    window: Literal["exclusive", "inclusive"] = "exclusive"
    """`exclusive` hashes the `context` tokens before the target, as the paper's formula says.
    `inclusive` hashes the `context` tokens that end with the target, as the published code does; then
    whether a token is supervised depends on the token itself, which biases what the model learns."""
    boundary: Literal["reset", "straddle"] = "reset"
    """`reset`: a window never reaches into the document before, so a document's gaps do not depend on
    its neighbours. `straddle`: it does, as in the published code. Either way the first `context`
    targets of a row are all supervised."""
    key: int = 0
    """Secret that the `ordered` hash is mixed with; without it nobody can tell which targets are left out."""

    def __post_init__(self) -> None:
        if self.k < 2:
            raise ValueError(f"k={self.k} would leave out every target; use 2 or more")
        if self.context < 1:
            raise ValueError(
                f"context={self.context} hashes nothing; use 1 or more (13 in the paper)"
            )
        if self.key and self.hash == "reference":
            raise ValueError(f"key={self.key}: the reference hash takes none; use hash='ordered'")

    def drop(
        self, tokens: Int[Tensor, "batch row"], document_ids: Int[Tensor, "batch row"] | None = None
    ) -> Bool[Tensor, "batch row"]:
        """True where `tokens[b, i]`, as a target, is left out of the loss.

        Args:
            tokens: ids, of any integer type; rows long enough for one window.
            document_ids: which document each token belongs to; None where a row is one document.

        Raises:
            ValueError: for ids that are not integers or are negative, or rows shorter than a window.
        """
        first = self.context if self.window == "exclusive" else self.context - 1
        self._check(tokens, document_ids, first)
        fold = _fold_ordered if self.hash == "ordered" else _fold_product
        values = _mix(tokens.long(), self.key) if self.hash == "ordered" else tokens.long()
        # [batch, row - context + 1], by the window's first token
        windows = fold(values, self.context)
        decided = windows[:, : tokens.shape[1] - first]
        hit = _below(decided, self.k) if self.hash == "ordered" else _in_table(decided, self.k)
        if document_ids is not None and self.boundary == "reset":
            hit &= document_ids[:, first:] == document_ids[:, : tokens.shape[1] - first]
        dropped = torch.zeros_like(tokens, dtype=torch.bool)
        dropped[:, first:] = hit
        return dropped

    def _check(self, tokens: Tensor, document_ids: Tensor | None, first: int) -> None:
        if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise ValueError(
                f"tokens are {tokens.dtype} of shape {tuple(tokens.shape)}; pass integer ids [batch, row]"
            )
        if document_ids is not None and document_ids.shape != tokens.shape:
            raise ValueError(
                f"document_ids of shape {tuple(document_ids.shape)} do not match tokens of shape "
                f"{tuple(tokens.shape)}; give one document id per token"
            )
        if tokens.shape[1] <= first:
            raise ValueError(
                f"rows of {tokens.shape[1]} tokens hold no {self.window} window of context={self.context}; "
                f"use a context of at most {tokens.shape[1] - first + self.context - 1}, or longer rows"
            )
        # The published code hashes its ignored targets (-100) like any id; ours would hide a mistake.
        if self.hash == "ordered" and tokens.numel() and int(tokens.min()) < 0:
            raise ValueError(
                f"tokens hold {int(tokens.min())}; hash the input ids, before any label is set to -100"
            )


# The ordered hash: a polynomial over mixed ids in arithmetic modulo 2^64, and a final mix. Two windows
# with the same tokens in another order differ, no id is invisible or absorbing, and the threshold is an
# integer, so the rate is 1/k for any k, context and vocabulary. int64 wraps alike on every device.
_BASE = 0x2545F4914F6CDD1D
"""Odd multiplier of the polynomial (Vigna's xorshift64* constant; any odd number of 62 random bits)."""


def _signed(value: int) -> int:
    """A 64-bit word as the int64 with the same bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _splitmix(words: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """The splitmix64 finaliser (Steele, Lea and Flood 2014): a bijection that avalanches every bit."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words = (words ^ _shift_right(words, shift)) * _signed(factor)
    return words ^ _shift_right(words, 31)


def _shift_right(words: Int[Tensor, "..."], bits: int) -> Int[Tensor, "..."]:
    """Logical shift: torch shifts the sign in."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _mix(tokens: Int[Tensor, "batch row"], key: int) -> Int[Tensor, "batch row"]:
    """Ids as well-spread words: one step of the golden-ratio sequence per id, then mixed with the key."""
    return _splitmix((tokens + 1) * _signed(0x9E3779B97F4A7C15) + _signed(key * _BASE))


def _fold_ordered(values: Int[Tensor, "batch row"], length: int) -> Int[Tensor, "batch window"]:
    """Polynomial of every window: sum over i of values[j + i] * _BASE^(length - 1 - i), mod 2^64."""

    def join(left: Tensor, right: Tensor, right_length: int) -> Tensor:
        return left * _signed(pow(_BASE, right_length, 1 << 64)) + right

    return _fold(values, length, join)


def _fold_product(values: Int[Tensor, "batch row"], length: int) -> Int[Tensor, "batch window"]:
    """Product of every window, mod 2^64, as in the published code."""
    return _fold(values, length, lambda left, right, _: left * right)


def _fold(
    values: Int[Tensor, "batch row"], length: int, join: Callable[[Tensor, Tensor, int], Tensor]
) -> Int[Tensor, "batch window"]:
    """Join every window of `length` values, in order, in about 2 log2(length) passes.

    Windows of 2n values are two windows of n side by side; those of any length are put together from
    the powers of two in it. Exact, since joining modulo 2^64 is associative.
    """
    windows = values.shape[1] - length + 1
    power, size = values, 1
    joined: Tensor | None = None
    done = 0
    while True:
        if length & size:
            # `power[:, j]` spans values j..j+size-1; the part joined so far spans j..j+done-1.
            part = power[:, done : done + windows]
            joined = part if joined is None else join(joined, part, size)
            done += size
        if size * 2 > length:
            break
        power = join(power[:, :-size], power[:, size:], size)
        size *= 2
    assert joined is not None
    return joined


def _below(windows: Int[Tensor, "batch window"], k: int) -> Bool[Tensor, "batch window"]:
    """Whether the window's 32 leading bits fall below 2^32 / k."""
    return _shift_right(_splitmix(windows), 32) < (1 << 32) // k


def _in_table(windows: Int[Tensor, "batch window"], k: int) -> Bool[Tensor, "batch window"]:
    """Whether the published table's entry at (window mod 1,000,003) is below 1/k."""
    return _table(k, windows.device)[windows.remainder(_TABLE_SIZE)]


@lru_cache(maxsize=8)
def _table(k: int, device: torch.device) -> Bool[Tensor, " slot"]:
    """The published table as booleans, made on the CPU wherever it is used.

    torch draws float32 in [0, 1) as 24 random bits over 2^24, so `entry < 1/k` is a comparison of
    integers, the same in every precision.
    """
    generator = torch.Generator("cpu").manual_seed(_TABLE_SEED)
    entries = (torch.rand(_TABLE_SIZE, generator=generator) * (1 << 24)).long()
    return (entries < math.ceil((1 << 24) / k)).to(device)
