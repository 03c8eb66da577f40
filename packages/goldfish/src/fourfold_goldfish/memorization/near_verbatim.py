"""The chance that a model emits a text nearly: within an edit distance, bounded from both sides.

All continuations within an edit distance of the true one form a tree of prefixes. A search expands its
likeliest nodes first and adds up the chances of the leaves that it reaches: a lower bound, certified,
whatever it has not looked at. The chances of the nodes that it has left open are all that can still be added:
with them, the sum is an upper bound. Where the tree is searched through, both are the chance itself.

One pass of the model over a continuation opens all nodes along it, so the cost is counted in passes. A number
of edits is one of tokens: substitutions, insertions and deletions (Levenshtein) of a continuation that has as
many tokens as the true one.
"""

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from fourfold_goldfish.memorization.extraction import Sampling

Row = tuple[int, ...]
"""Edit distances of a prefix to each prefix of the true continuation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The chance that one sampled continuation is within `distance` edits of the true one."""

    distance: int
    exact: float
    """Chance of the true continuation itself."""
    lower: float
    upper: float
    passes: int
    """Continuations that the model read; each costs prompt and suffix in tokens."""

    @property
    def is_closed(self) -> bool:
        """True where the whole tree was searched: both bounds are the chance, up to rounding."""
        return self.upper - self.lower <= ROUNDING


ROUNDING = 1e-9
"""Sums of float32 chances are no closer than this."""
BUNDLE = 256
"""Next tokens of a prefix that may be looked into; the chance of the others stays open."""


@dataclass(frozen=True, slots=True, order=True)
class _Open:
    """A prefix, or a bundle of its next tokens, that has not been looked into."""

    negative_chance: float
    number: int
    """Breaks ties by age."""
    prefix: tuple[int, ...]
    row: Row
    tokens: tuple[int, ...] = ()
    """Next tokens that are alike to the distance, likeliest first; none for a single prefix."""
    chances: tuple[float, ...] = ()
    """Of the tokens, with that of the prefix."""


def near_verbatim(
    model: PreTrainedModel,
    passage: Int[Tensor, " row"],
    *,
    suffix: int,
    distance: int,
    sampling: Sampling,
    passes: int = 256,
    batch: int = 32,
    gap: float = 0.0,
) -> Bounds:
    """Bound the chance that the passage's last `suffix` tokens come out with at most `distance` edits.

    Args:
        model: in evaluation mode.
        passage: ids; all but the last `suffix` are the prompt.
        suffix: tokens to be recited.
        distance: edits allowed.
        sampling: the draws; a small `top_k` closes the gap sooner, since what is never drawn adds nothing.
        passes: continuations that the model may read.
        batch: continuations read at a time.
        gap: end the search where the bounds are this near.

    Raises:
        ValueError: where no token is left to prompt with, or the distance allows any continuation.
    """
    length = len(passage)
    if not 0 < suffix < length:
        raise ValueError(
            f"suffix={suffix} of a passage of {length} tokens leaves no prompt; use 1 to {length - 1}"
        )
    if not 0 <= distance < suffix:
        raise ValueError(
            f"distance={distance} of {suffix} tokens is none or allows every continuation; "
            f"use 0 to {suffix - 1}"
        )
    search = _Search(tuple(passage[-suffix:].tolist()), distance)
    prompt = passage[:-suffix].to(model.device)
    used = 0
    while search.open and used < passes and search.left > max(gap, ROUNDING):
        nodes = search.take(min(batch, passes - used))
        if not nodes:
            break
        paths = [search.path(node) for node in nodes]
        rows = torch.cat(
            [prompt.expand(len(paths), -1), torch.tensor(paths, device=model.device)], dim=1
        )
        used += len(paths)
        for node, path, drawn in zip(
            nodes, paths, _draws(model, rows, suffix, sampling), strict=True
        ):
            search.expand(node, path, drawn)
    lower = math.fsum(search.leaves)
    return Bounds(
        distance=distance,
        exact=search.exact,
        lower=min(1.0, lower),
        upper=min(1.0, lower + search.left),
        passes=used,
    )


@torch.no_grad()
def _draws(
    model: PreTrainedModel, rows: Int[Tensor, "path row"], suffix: int, sampling: Sampling
) -> Iterator[Float[Tensor, "suffix vocabulary"]]:
    """Chances of the next token at each place of the suffix, for each path."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits[:, -suffix:]
    for path in logits:
        yield sampling.log_probabilities(path).double().exp().cpu()


class _Search:
    """The open nodes of the tree, and the leaves within the distance."""

    def __init__(self, true: tuple[int, ...], distance: int) -> None:
        self.true, self.distance = true, distance
        self.exact = 0.0
        self.leaves: list[float] = []
        self._beyond: list[float] = []
        self._count = itertools.count()
        self.open: list[_Open] = []
        self._push(1.0, (), tuple(range(len(true) + 1)))

    @property
    def left(self) -> float:
        """The chance of all that has not been looked into."""
        return math.fsum([*self._beyond, *(-node.negative_chance for node in self.open)])

    def take(self, count: int) -> list[_Open]:
        """The likeliest prefixes; bundles on the way are opened a token at a time."""
        taken: list[_Open] = []
        while self.open and len(taken) < count:
            node = heapq.heappop(self.open)
            if not node.tokens:
                taken.append(node)
                continue
            self._push(node.chances[0], (*node.prefix, node.tokens[0]), node.row)
            self._push_bundle(node.prefix, node.row, node.tokens[1:], node.chances[1:])
        return taken

    def path(self, node: _Open) -> list[int]:
        """The prefix and the true tokens that go on from where it stands nearest to the true text."""
        at = min(
            range(len(node.row)), key=lambda place: (node.row[place], abs(place - len(node.prefix)))
        )
        missing = len(self.true) - len(node.prefix)
        ahead = self.true[at : at + missing]
        return [*node.prefix, *ahead, *[self.true[-1]] * (missing - len(ahead))]

    def expand(
        self, node: _Open, path: Sequence[int], drawn: Float[Tensor, "suffix vocabulary"]
    ) -> None:
        """Open the nodes along a path: at each place the path's own next token, and all others apart."""
        chance, row = -node.negative_chance, node.row
        for place in range(len(node.prefix), len(self.true)):
            prefix = tuple(path[:place])
            ahead = self._step(row, path[place], place)
            self._others(prefix, row, path[place], chance * drawn[place])
            chance *= float(drawn[place, path[place]])
            row = ahead
            if chance == 0 or not self._is_alive(row, place + 1):
                return
        self._leaf(chance)
        if tuple(path) == self.true:
            self.exact = chance

    def _others(
        self, prefix: tuple[int, ...], row: Row, own: int, chances: Float[Tensor, " vocabulary"]
    ) -> None:
        """Every other next token: those of the true text nearby one by one, the rest as a bundle."""
        place = len(prefix)
        near = self.true[max(0, place - self.distance) : place + self.distance + 1]
        for token in sorted(set(near) - {own}):
            ahead = self._step(row, token, place)
            if chances[token] > 0 and self._is_alive(ahead, place + 1):
                self._add(float(chances[token]), (*prefix, token), ahead)
        ahead = self._step(row, -1, place)
        if self._is_alive(ahead, place + 1):
            rest = chances.clone()
            rest[[*set(near), own]] = 0
            if place + 1 == len(self.true):
                self._leaf(float(rest.sum()))
                return
            best = rest.topk(min(BUNDLE, len(rest)))
            likely = int((best.values > 0).sum())
            tokens, bundled = best.indices[:likely].tolist(), best.values[:likely].tolist()
            self._push_bundle(prefix, ahead, tuple(tokens), tuple(bundled))
            self._beyond.append(max(0.0, float(rest.sum()) - math.fsum(bundled)))

    def _add(self, chance: float, prefix: tuple[int, ...], row: Row) -> None:
        if len(prefix) == len(self.true):
            self._leaf(chance)
        else:
            self._push(chance, prefix, row)

    def _leaf(self, chance: float) -> None:
        if chance > 0:
            self.leaves.append(chance)

    def _push(self, chance: float, prefix: tuple[int, ...], row: Row) -> None:
        heapq.heappush(self.open, _Open(-chance, next(self._count), prefix, row))

    def _push_bundle(
        self, prefix: tuple[int, ...], row: Row, tokens: tuple[int, ...], chances: tuple[float, ...]
    ) -> None:
        if tokens:
            total = math.fsum(chances)
            heapq.heappush(
                self.open, _Open(-total, next(self._count), prefix, row, tokens, chances)
            )

    def _step(self, row: Row, token: int, place: int) -> Row:
        """Edit distances after one more token; -1 is any that the true text does not have."""
        ahead = [place + 1]
        for index, true in enumerate(self.true):
            ahead.append(min(row[index] + (token != true), row[index + 1] + 1, ahead[-1] + 1))
        return tuple(ahead)

    def _is_alive(self, row: Row, place: int) -> bool:
        """Whether some continuation to full length ends within the distance."""
        left = len(self.true) - place
        return any(
            edits + abs(left - (len(self.true) - at)) <= self.distance
            for at, edits in enumerate(row)
        )
