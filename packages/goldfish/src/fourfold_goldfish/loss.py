"""Goldfish loss: leave about one target in `k` out of the loss, the same ones wherever a passage recurs.

A model that never learns one token in `k` cannot recite a passage: at each left-out token it must guess,
and after a wrong guess it is on another path. Which targets are left out is decided by a hash of the
`context` tokens before them (Hans et al. 2024, section 3), so every copy of a passage has the same gaps
and no number of repetitions fills them. Inputs and attention are untouched; only targets are masked.

    loss = mean of -log p(x_i | x_<i) over the i that `Goldfish.drop` does not drop
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, overload

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from fourfold_goldfish import compiled_mask
from fourfold_goldfish.other_hashes import OF_PLACES, OF_WINDOWS

Hash = Literal["ordered", "reference", "avalanche", "apertus", "apertus2", "static", "random"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Goldfish:
    """A mask over targets, as a pure function of token ids: what it drops, the loss leaves out.

    It is the same for every sharding, device, process count and data-loader worker; no random state is used.
    Defaults follow the paper's formula. What its code does, and what its checkpoints were trained with,
    is `Goldfish(k=4, context=13, hash="reference", window="inclusive", boundary="straddle")`.
    """

    k: int
    """One target in `k` is left out, on average."""
    context: int
    """Tokens hashed per decision (h in the paper; 13 there)."""
    hash: Hash = "ordered"
    """`ordered` is ours. The others are for comparison, bit for bit as published or deployed:
    `reference` (the paper's hash table; a product, blind to order, decided by a single id 0, and from
    about 50 ids on mostly 0), `avalanche` (its second hash, which sees 32 bits of the product),
    `apertus` and `apertus2` (the two generations of that model), and two controls that are no function
    of the tokens: `static` (every k-th place from `key`) and `random` (places drawn under the seed
    `key`, anew for every place of a batch, so that repetition fills the gaps)."""
    window: Literal["exclusive", "inclusive"] = "exclusive"
    """`exclusive` hashes the `context` tokens before the target, as the paper's formula says.
    `inclusive` hashes the `context` tokens that end with the target, as the published code does; then
    whether a token is supervised depends on the token itself, which biases what the model learns."""
    boundary: Literal["reset", "prefix", "straddle"] = "reset"
    """`reset`: a window never reaches into the document before, so a document's gaps do not depend on
    its neighbours; its first `context` targets are all supervised. `prefix`: so it is, but those targets
    are decided by the shorter windows that there are, so that short documents are protected too.
    `straddle`: windows reach across, as in the published code."""
    exempt: tuple[int, ...] = ()
    """Ids that are never left out, such as those that end a turn or a text."""
    key: int = 0
    """Secret that the `ordered` hash is mixed with; without it nobody can tell which targets are left out."""

    def __post_init__(self) -> None:
        if self.k < 2:
            raise ValueError(f"k={self.k} would leave out every target; use 2 or more")
        if self.context < 1:
            raise ValueError(
                f"context={self.context} hashes nothing; use 1 or more (13 in the paper)"
            )
        if self.key and self.hash not in ("ordered", "static", "random"):
            raise ValueError(
                f"key={self.key}: the hash {self.hash!r} takes none; use hash='ordered'"
            )
        if self.key < 0:
            raise ValueError(f"key={self.key} is negative; use 0 (none) or more")
        if self.boundary == "prefix" and self.hash != "ordered":
            raise ValueError(
                f"boundary='prefix': the hash {self.hash!r} has no shorter windows; use hash='ordered'"
            )

    @overload
    def drop(
        self, tokens: Int[Tensor, "batch row"], document_ids: Int[Tensor, "batch row"] | None = None
    ) -> Bool[Tensor, "batch row"]: ...

    @overload
    def drop(
        self,
        tokens: Int[np.ndarray, "batch row"],
        document_ids: Int[np.ndarray, "batch row"] | None = None,
    ) -> Bool[np.ndarray, "batch row"]: ...

    def drop(self, tokens: Any, document_ids: Any = None) -> Any:
        """True where `tokens[b, i]`, as a target, is left out of the loss.

        Args:
            tokens: ids `[batch, row]`, a tensor or an array of any integer type; rows long enough for
                one window.
            document_ids: which document each token belongs to, alike; None where a row is one document.

        Returns:
            A mask `[batch, row]`, a tensor on the tokens' device or an array.

        Raises:
            ValueError: for ids that are not integers or are negative, or rows shorter than a window.
        """
        if isinstance(tokens, np.ndarray):
            documents = None if document_ids is None else torch.from_numpy(document_ids)
            ids = tokens.astype(np.int64) if tokens.dtype.kind in "iu" else tokens
            return self.drop(torch.from_numpy(ids), documents).numpy()
        self._check(tokens, document_ids)
        if self.hash == "ordered" and compiled_mask.takes(tokens):
            dropped = self._in_one_pass(tokens, document_ids)
        else:
            self._check_signs(tokens)
            dropped = self._by_operations(tokens.long(), document_ids)
        if self.exempt:
            dropped &= ~torch.isin(tokens.long(), torch.tensor(self.exempt, device=tokens.device))
        return dropped

    def _in_one_pass(
        self, tokens: Int[Tensor, "batch row"], document_ids: Int[Tensor, "batch row"] | None
    ) -> Bool[Tensor, "batch row"]:
        """`_by_operations` of the ordered hash, compiled."""
        dropped = compiled_mask.drop(
            tokens,
            document_ids,
            context=self.context,
            sees_target=self.window == "inclusive",
            is_prefix=self.boundary == "prefix",
            is_reset=self.boundary == "reset",
            key_word=_key_word(self.key) if self.key else 0,
            below=self._limit,
        )
        if dropped is None:
            self._check_signs(tokens)
            raise AssertionError("the compiled mask saw a negative id that is none")
        return dropped

    def _by_operations(
        self, words: Int[Tensor, "batch row"], document_ids: Int[Tensor, "batch row"] | None
    ) -> Bool[Tensor, "batch row"]:
        """The mask but for exempt ids, in torch's operations."""
        dropped = torch.zeros_like(words, dtype=torch.bool)
        if self.hash in OF_PLACES:
            dropped = OF_PLACES[self.hash](words, self.k, self.key)
        elif self.boundary == "prefix":
            # The window of target i is tokens[begins[i]:ends[i]]; an empty one decides nothing.
            ends = torch.arange(words.shape[1], device=words.device) + self._sees_target
            begins = torch.maximum(_document_begins(words, document_ids), ends - self.context)
            dropped = self.decide(words, begins, ends.expand_as(begins))
        else:
            decided = words.shape[1] - self._first_target
            hit = self._whole_windows(words)[:, :decided]
            if document_ids is not None and self.boundary == "reset":
                hit &= document_ids[:, self._first_target :] == document_ids[:, :decided]
            dropped[:, self._first_target :] = hit
        return dropped

    def decide(
        self,
        words: Int[Tensor, "batch word"],
        begins: Int[Tensor, "batch target"],
        ends: Int[Tensor, "batch target"],
    ) -> Bool[Tensor, "batch target"]:
        """The ordered hash of `words[begins:ends]` for each target; a window may be empty, then no."""
        sums, powers = _prefix_sums(words)
        parts = sums.gather(1, ends) - sums.gather(1, begins)
        return (begins < ends) & self._below(parts * powers[ends])

    @property
    def shortest(self) -> int:
        """Tokens of the shortest row that the mask takes; 0 where it takes any."""
        return 0 if self.boundary == "prefix" or self.hash in OF_PLACES else self._first_target + 1

    @property
    def _sees_target(self) -> int:
        return int(self.window == "inclusive")

    @property
    def _first_target(self) -> int:
        """Place of the first target whose window is whole."""
        return self.context - self._sees_target

    def _whole_windows(self, words: Int[Tensor, "batch row"]) -> Bool[Tensor, "batch window"]:
        """The decision of every whole window, by its first token."""
        if self.hash in OF_WINDOWS:
            return OF_WINDOWS[self.hash](words, self.k, self.context)
        hits = words.new_empty((len(words), words.shape[1] - self.context + 1), dtype=torch.bool)
        rows = max(1, _IN_CACHE // words.shape[1]) if words.is_cpu else len(words)
        for block, hit in zip(words.split(rows), hits.split(rows), strict=True):
            sums, powers = _prefix_sums(block)
            parts = sums[:, self.context :] - sums[:, : -self.context]
            hit.copy_(self._below(parts.mul_(powers[self.context :])))
        return hits

    def _below(self, words: Int[Tensor, "batch window"]) -> Bool[Tensor, "batch window"]:
        """True where a window's word, mixed in place, falls below a share 1/k of the int64 range.

        Mixed by the first two rounds of the splitmix64 finaliser (Steele, Lea and Flood 2014); its last
        would not touch the leading bits, which decide.
        """
        if self.key:
            words.add_(_signed(_key_word(self.key)))
        for bits, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            # torch shifts the sign in; the mask makes the shift a logical one.
            shifted = (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)
            words.bitwise_xor_(shifted).mul_(_signed(factor))
        return words < self._limit

    @property
    def _limit(self) -> int:
        """A mixed word below it leaves its target out: a share 1/k of the int64 range."""
        return (1 << 64) // self.k - (1 << 63)

    def _check(self, tokens: Tensor, document_ids: Tensor | None) -> None:
        if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise ValueError(
                f"tokens are {tokens.dtype} of shape {tuple(tokens.shape)}; pass integer ids [batch, row]"
            )
        if document_ids is not None and document_ids.shape != tokens.shape:
            raise ValueError(
                f"document_ids of shape {tuple(document_ids.shape)} do not match tokens of shape "
                f"{tuple(tokens.shape)}; give one document id per token"
            )
        if tokens.shape[1] < self.shortest:
            raise ValueError(
                f"rows of {tokens.shape[1]} tokens hold no {self.window} window of context={self.context}; "
                f"use a context of at most {max(1, tokens.shape[1] - 1 + self._sees_target)}, longer rows, "
                "or boundary='prefix', which decides by the shorter windows that there are"
            )

    def _check_signs(self, tokens: Tensor) -> None:
        # The published codes hash their ignored targets (-100) and pads (-1) like any id; ours would
        # hide a mistake.
        if self.hash == "ordered" and tokens.numel() and int(tokens.min()) < 0:
            raise ValueError(
                f"tokens hold {int(tokens.min())}; hash the input ids, before any label is set to -100"
            )


# The ordered hash of tokens[b:e] is the polynomial sum of (tokens[m] + 1) * _BASE^(e - 1 - m), modulo
# 2^64, mixed. Two windows with the same tokens in another order differ, no id is invisible or absorbing,
# and the threshold is an integer, so the rate is 1/k for any k, context and vocabulary. int64 wraps alike
# on every device. _BASE has an inverse, so any window is a difference of two prefix sums: the cost does
# not depend on `context`.
_BASE = 0x2545F4914F6CDD1D
"""Odd multiplier of the polynomial (Vigna's xorshift64* constant; any odd number of 62 random bits)."""
_IN_CACHE = 1 << 16
"""Tokens hashed at a time on a CPU: a dozen passes over half a megabyte stay in its caches."""
_SPREAD = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio: lifts short windows of small ids into the leading bits."""


def _prefix_sums(
    words: Int[Tensor, "batch row"],
) -> tuple[Int[Tensor, "batch row+1"], Int[Tensor, " row+1"]]:
    """Sums of (words[m] + 1) / _BASE^m over m < i, and _SPREAD * _BASE^(i - 1), for i = 0 to row."""
    row = words.shape[1]
    inverses, powers = _powers(1 << row.bit_length(), words.device)
    sums = words.new_zeros((words.shape[0], row + 1))
    torch.cumsum((words + 1).mul_(inverses[:row]), dim=1, out=sums[:, 1:])
    return sums, powers[: row + 1]


@lru_cache(maxsize=16)
def _powers(size: int, device: torch.device) -> tuple[Int[Tensor, " size"], Int[Tensor, " size"]]:
    """_BASE^-m and _SPREAD * _BASE^(m - 1) for m = 0 to size - 1."""
    inverse = pow(_BASE, -1, 1 << 64)
    factors = np.full((2, size), [[inverse], [_BASE]], dtype=np.uint64)
    factors[:, 0] = 1, _SPREAD * inverse % (1 << 64)
    inverses, powers = (torch.from_numpy(row) for row in factors.cumprod(axis=1).view(np.int64))
    return inverses.to(device), powers.to(device)


def _document_begins(
    words: Int[Tensor, "batch row"], document_ids: Int[Tensor, "batch row"] | None
) -> Int[Tensor, "batch row"]:
    """Place of the first token of each token's document."""
    begins = torch.zeros_like(words)
    if document_ids is not None:
        places = torch.arange(words.shape[1], device=words.device)
        is_new = document_ids[:, 1:] != document_ids[:, :-1]
        begins[:, 1:] = (is_new * places[1:]).cummax(dim=1).values
    return begins


def _key_word(key: int) -> int:
    """A key as a well-mixed 64-bit word (splitmix64's output for the state `key`)."""
    word = key * _SPREAD % (1 << 64)
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB % (1 << 64)
    return word ^ (word >> 31)


def _signed(word: int) -> int:
    """A 64-bit word as the int64 with the same bits."""
    return word - (1 << 64) if word >> 63 else word
