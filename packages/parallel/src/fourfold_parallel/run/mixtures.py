"""Mixtures of sources: exact shares that change at known steps, without any state.

Row `m` of a mixture is of the part that is furthest behind its share, by the rule of Tijdeman (*The chairman
assignment problem*, Discrete Mathematics 32, 1980): for k parts every prefix of every stage holds each part's
share to within `1 - 1 / (2k - 2)` of a row, the best that is possible. Weights are decimals, so the pattern
repeats, and the part and the number of any row are looked up: a batch is a function of (source, seed, step).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache, partial

import numpy as np
import torch
from jaxtyping import Int

from fourfold_parallel.common.records import Material
from fourfold_parallel.run.data import (
    Batch,
    RowParts,
    Stream,
    TokenFile,
    TokenSource,
    TokenStream,
    share_of,
)

_DIGITS = 6
"""Digits of a weight behind the point: the pattern repeats after at most a million rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MixturePart:
    """A source in a mixture."""

    name: str
    """Lower case; its losses are recorded under it."""
    source: TokenSource
    weight: float
    """Its share of the rows; 0 for a part that is only validated on."""
    first_row: int = 0
    """Rows of its order that an earlier run has read: this one goes on behind them."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ValueError(
                f"name={self.name!r} of a part is used in records; use lower-case letters, digits and _"
            )
        if not 0 <= self.weight <= 1 or round(self.weight, _DIGITS) != self.weight:
            raise ValueError(
                f"weight={self.weight} of part {self.name!r} is no share; use 0 to 1 with at most {_DIGITS} "
                "digits behind the point, such as 0.05"
            )
        if self.first_row < 0:
            raise ValueError(
                f"first_row={self.first_row} of part {self.name!r} is negative; use 0 or more"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed:
    """Several sources in fixed shares."""

    parts: tuple[MixturePart, ...]

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if len(set(names)) != len(names):
            raise ValueError(f"parts {names} share a name; give each its own")
        total = sum(_decimal(part.weight) for part in self.parts)
        if total != 1:
            weights = {part.name: part.weight for part in self.parts}
            raise ValueError(f"weights={weights} sum to {total}; make them sum to 1")

    def open(self, *, sequence: int, seed: int) -> "MixedStream":
        """Rows of all parts, each part in its own order.

        Raises:
            ValueError: A part cannot be read, or the parts' tokenizers differ.
        """
        return _opened((MixtureStage(mixture=self, steps=1),), sequence, seed)

    def validation(self, *, sequence: int) -> "JoinedStream":
        """The held-out rows of each part, those of weight 0 among them.

        Raises:
            ValueError: A part holds no rows out.
        """
        return _joined((MixtureStage(mixture=self, steps=1),), sequence)


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureStage:
    """A mixture, and the steps that it lasts."""

    mixture: Mixed
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} of a stage; use 1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """Mixtures one after another. A part that goes on in the next stage is read on from where it was.

    Stages of the same shares that follow one another are one. A run is refused that is longer than all.
    """

    stages: tuple[MixtureStage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages=() hold nothing; name a MixtureStage")
        known: dict[str, MixturePart] = {}
        for stage in self.stages:
            for part in stage.mixture.parts:
                first = known.setdefault(part.name, part)
                if (first.source, first.first_row) != (part.source, part.first_row):
                    raise ValueError(
                        f"part {part.name!r} has another source or first_row in a later stage; rename it"
                    )

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def open(self, *, sequence: int, seed: int) -> "MixedStream":
        """See `Mixed.open`."""
        return _opened(self.stages, sequence, seed)

    def validation(self, *, sequence: int) -> "JoinedStream":
        """See `Mixed.validation`: of the parts of all stages."""
        return _joined(self.stages, sequence)


@dataclass(frozen=True, slots=True)
class _Pattern:
    """The part of row m, and how many rows of it came before, for one period of the rows."""

    weights: tuple[int, ...]
    """Rows of each part in one period."""
    part: Int[np.ndarray, " period"]
    before: Int[np.ndarray, " period"]
    """Rows of the same part before it in its period."""

    def at(
        self, rows: Int[np.ndarray, " row"]
    ) -> tuple[Int[np.ndarray, " row"], Int[np.ndarray, " row"]]:
        """The part of some rows (0-based), and their number within it."""
        periods, places = np.divmod(rows, len(self.part))
        parts = self.part[places]
        return parts, periods * np.asarray(self.weights)[parts] + self.before[places]

    def counts(self, rows: int) -> Int[np.ndarray, " part"]:
        """Rows of each part among the first so many."""
        periods, places = divmod(rows, len(self.part))
        first = np.bincount(self.part[:places], minlength=len(self.weights))
        return periods * np.asarray(self.weights) + first


def _decimal(weight: float) -> Decimal:
    return Decimal(repr(float(weight)))


@lru_cache(maxsize=32)
def pattern(weights: tuple[float, ...]) -> _Pattern:
    """The parts of a mixture's rows: one period of them, by Tijdeman's rule in whole numbers.

    Args:
        weights: of the parts; their sum is 1.
    """
    scaled = [int(_decimal(weight).scaleb(_DIGITS)) for weight in weights]
    unit = int(np.gcd.reduce(scaled))
    shares = [share // unit for share in scaled]
    period = sum(shares)
    reading = [index for index, share in enumerate(shares) if share]
    slack = 2 * len(reading) - 2 or 1
    counts = [0] * len(shares)
    parts = np.empty(period, dtype=np.int64)
    before = np.empty(period, dtype=np.int64)
    for row in range(period):
        # A part may be read once it is 1 / slack of a row behind; of these the one that would first be more
        # than 1 - 1 / slack behind is: `late / share` is how soon that is.
        chosen, soonest = -1, 0
        for index in reading:
            behind = slack * (shares[index] * (row + 1) - period * counts[index])
            late = (slack - 1) * period - behind
            if behind >= period and (chosen < 0 or late * shares[chosen] < soonest * shares[index]):
                chosen, soonest = index, late
        assert chosen >= 0
        parts[row], before[row] = chosen, counts[chosen]
        counts[chosen] += 1
    return _Pattern(tuple(shares), parts, before)


@lru_cache(maxsize=64)
def _counts(weights: tuple[float, ...], rows: int) -> Int[np.ndarray, " part"]:
    """Rows of each part in a finished stage."""
    return pattern(weights).counts(rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedStream:
    """Rows of several streams, in shares by the step."""

    streams: Mapping[str, TokenStream]
    """Of the parts, by their names."""
    first_rows: tuple[int, ...]
    stages: tuple[tuple[tuple[float, ...], int], ...]
    """Weights of all parts, and steps."""
    seed: int

    @property
    def file(self) -> TokenFile:
        """See `Stream`."""
        return next(iter(self.streams.values())).file

    @property
    def materials(self) -> tuple[Material, ...]:
        """See `Stream`."""
        return _materials(self.streams)

    @property
    def rows(self) -> int:
        """See `Stream`."""
        return sum(stream.rows for stream in self.streams.values())

    @property
    def weights(self) -> Mapping[str, float]:
        """The shares over all stages."""
        return _overall(self.streams, self.stages)

    def numbers(
        self, step: int, *, batch: int
    ) -> tuple[Int[np.ndarray, " batch"], Int[np.ndarray, " batch"]]:
        """The part of each row of a step's global batch, and how many of that part were read before it.

        The parts lie in a drawn order, so that no rank gets one part only; the rows of each stand in its own.
        """
        done = np.asarray(self.first_rows)
        first = 0
        for weights, steps in self.stages[:-1]:
            if step < first + steps:
                break
            done = done + _counts(weights, steps * batch)
            first += steps
        else:
            weights, _ = self.stages[-1]
        rows = np.arange((step - first) * batch, (step - first + 1) * batch)
        parts, numbers = pattern(weights).at(rows)
        numbers = numbers + done[parts]
        drawn = np.random.default_rng((self.seed, step)).permutation(batch)
        placed = parts[drawn]
        placed_numbers = np.empty_like(numbers)
        placed_numbers[placed.argsort(kind="stable")] = numbers[parts.argsort(kind="stable")]
        return placed, placed_numbers

    def batch(self, step: int, *, batch: int, rank: int = 0, ranks: int = 1) -> Batch:
        """See `Stream`."""
        share = share_of(batch, ranks)
        mine = slice(rank * share, (rank + 1) * share)
        parts, numbers = self.numbers(step, batch=batch)
        return _gathered(self.streams, parts[mine], numbers[mine], step)


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedStream:
    """The rows of several streams, one stream after another: held-out rows of each part."""

    streams: Mapping[str, TokenStream]
    weights: Mapping[str, float]
    """See `Stream`."""

    @property
    def file(self) -> TokenFile:
        """See `Stream`."""
        return next(iter(self.streams.values())).file

    @property
    def materials(self) -> tuple[Material, ...]:
        """See `Stream`."""
        return _materials(self.streams)

    @property
    def rows(self) -> int:
        """See `Stream`."""
        return sum(stream.rows for stream in self.streams.values())

    def batch(self, step: int, *, batch: int, rank: int = 0, ranks: int = 1) -> Batch:
        """See `Stream`. After the last row comes the first again."""
        share = share_of(batch, ranks)
        first = step * batch + rank * share
        rows = np.arange(first, first + share) % self.rows
        stops = np.cumsum([stream.rows for stream in self.streams.values()])
        parts = np.searchsorted(stops, rows, side="right")
        starts = np.concatenate([[0], stops[:-1]])
        return _gathered(self.streams, parts, rows - starts[parts], step)


def _gathered(
    streams: Mapping[str, TokenStream],
    parts: Int[np.ndarray, " row"],
    positions: Int[np.ndarray, " row"],
    step: int,
) -> Batch:
    """Rows by their part and their position in its order, as one batch."""
    order = parts.argsort(kind="stable")
    stops = np.bincount(parts, minlength=len(streams)).cumsum()[:-1]
    read = [
        stream.read(positions[places], step)
        for stream, places in zip(streams.values(), np.split(order, stops), strict=True)
        if len(places)
    ]
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    addresses = [address for rows in read for address in rows.addresses]
    return Batch(
        tokens=torch.cat([rows.tokens for rows in read])[back],
        document_ids=torch.cat([rows.document_ids for rows in read])[back],
        addresses=tuple(addresses[place] for place in back),
        number=step,
        parts=RowParts(names=tuple(streams), of_rows=tuple(parts.tolist())),
    )


def _materials(streams: Mapping[str, TokenStream]) -> tuple[Material, ...]:
    """Each once."""
    return tuple(
        dict.fromkeys(material for stream in streams.values() for material in stream.materials)
    )


def _parts(stages: Sequence[MixtureStage]) -> dict[str, MixturePart]:
    """The parts of all stages, in the order in which they are first named; their weights are a stage's."""
    return {part.name: part for stage in stages for part in stage.mixture.parts}


def _weighed(stages: Sequence[MixtureStage]) -> tuple[tuple[tuple[float, ...], int], ...]:
    """Weights of all parts and steps of each stage, those of equal weights joined."""
    names = _parts(stages)
    weighed: list[tuple[tuple[float, ...], int]] = []
    for stage in stages:
        own = {part.name: part.weight for part in stage.mixture.parts}
        weights = tuple(own.get(name, 0.0) for name in names)
        if weighed and weighed[-1][0] == weights:
            weighed[-1] = (weights, weighed[-1][1] + stage.steps)
        else:
            weighed.append((weights, stage.steps))
    return tuple(weighed)


def _overall(
    names: Mapping[str, object], stages: Sequence[tuple[tuple[float, ...], int]]
) -> dict[str, float]:
    """Shares of the parts over all stages."""
    steps = sum(count for _, count in stages)
    shares = [sum(each[part] * count for each, count in stages) for part in range(len(names))]
    return {name: share / steps for name, share in zip(names, shares, strict=True)}


def _opened(stages: Sequence[MixtureStage], sequence: int, seed: int) -> MixedStream:
    streams = {
        name: _stream(part, partial(part.source.open, sequence=sequence, seed=seed))
        for name, part in _parts(stages).items()
    }
    check_one_tokenizer({name: stream.file for name, stream in streams.items()})
    return MixedStream(
        streams=streams,
        first_rows=tuple(part.first_row for part in _parts(stages).values()),
        stages=_weighed(stages),
        seed=seed,
    )


def _joined(stages: Sequence[MixtureStage], sequence: int) -> JoinedStream:
    streams = {
        name: _stream(part, partial(part.source.validation, sequence=sequence))
        for name, part in _parts(stages).items()
    }
    return JoinedStream(streams=streams, weights=_overall(streams, _weighed(stages)))


def _stream(part: MixturePart, open_stream: Callable[[], Stream]) -> TokenStream:
    """The stream of a part; what is wrong with it is said with the part's name."""
    try:
        stream = open_stream()
    except ValueError as error:
        raise ValueError(f"part {part.name!r} of the mixture: {error}") from error
    if not isinstance(stream, TokenStream):
        raise ValueError(
            f"part {part.name!r} of the mixture is a mixture itself; name its parts beside the others"
        )
    return stream


def check_one_tokenizer(files: Mapping[str, TokenFile]) -> None:
    """Refuse to mix ids of several tokenizers.

    Args:
        files: the parts' ids by the parts' names.

    Raises:
        ValueError: Two parts have other tokenizers, or one has none that is known; the parts are named.
    """
    if len(files) < 2:
        return
    digests: dict[str, str] = {}
    for name, file in files.items():
        used = [material for material in file.materials if material.kind == "tokenizer"]
        if not used:
            raise ValueError(
                f"part {name!r} of the mixture does not say which tokenizer made its ids; use a source that "
                "tokenizes text, such as Packed"
            )
        digests[name] = used[0].sha256
        first = next(iter(digests))
        if digests[name] != digests[first]:
            raise ValueError(
                f"parts {first!r} and {name!r} of the mixture have different tokenizers "
                f"({digests[first][:12]} and {digests[name][:12]}), so an id means two things; give both one "
                "tokenizer: a published one, or SharedBytePairs trained on all of their texts"
            )
