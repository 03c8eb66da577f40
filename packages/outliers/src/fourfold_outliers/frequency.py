"""The link of a coordinate's size to token frequency: by type, with an interval over documents.

Frequent tokens are many, so a correlation over tokens is one over a few of them. Here each token id counts
once, by the mean of its occurrences; and what is resampled is documents, since tokens of one are not
independent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import rankdata
from torch import Tensor

from fourfold_outliers.resampling import TIMES, halves


def counted(
    documents: Iterable[Int[np.ndarray, " token"]], vocabulary: int
) -> Int[np.ndarray, " id"]:
    """Occurrences of every id in documents."""
    counts = np.zeros(vocabulary, dtype=np.int64)
    for ids in documents:
        counts += np.bincount(np.asarray(ids, dtype=np.int64), minlength=vocabulary)
    return counts


def frequency(counts: Int[np.ndarray, " id"]) -> Float[np.ndarray, " id"]:
    """`log(1 + count)`."""
    return np.log1p(counts.astype(np.float64))


def spearman(
    values: Float[np.ndarray, "item series"], against: Float[np.ndarray, " item"]
) -> Float[np.ndarray, " series"]:
    """Rank correlation of each series with one; 0 where either is constant."""
    return _correlation(rankdata(values, axis=0), rankdata(against))


def _correlation(
    values: Float[np.ndarray, "item series"], against: Float[np.ndarray, " item"]
) -> Float[np.ndarray, " series"]:
    left, right = values - values.mean(0), against - against.mean()
    scale = np.sqrt((left**2).sum(0) * (right**2).sum())
    return np.divide(right @ left, scale, out=np.zeros_like(scale), where=scale > 0)


def partial(
    values: Float[np.ndarray, "item series"],
    against: Float[np.ndarray, " item"],
    given: Float[np.ndarray, " item"],
) -> Float[np.ndarray, " series"]:
    """Rank correlation that is left when that with a third quantity is taken out of both."""
    xy, xz = spearman(values, against), spearman(values, given)
    [yz] = spearman(against[:, None], given)
    scale = np.sqrt(np.maximum(1 - xz**2, 0) * max(1 - yz**2, 0))
    return np.divide(xy - xz * yz, scale, out=np.zeros_like(scale), where=scale > 1e-12)


@dataclass(frozen=True, slots=True, eq=False)
class Types:
    """Sums over the occurrences of each token id in each document."""

    ids: Int[np.ndarray, " type"]
    document: Int[np.ndarray, " cell"]
    """Of a cell: the occurrences of one type in one document."""
    type: Int[np.ndarray, " cell"]
    """Place of its id in `ids`."""
    count: Float[np.ndarray, " cell"]
    position: Float[np.ndarray, " cell"]
    total: Float[np.ndarray, "cell series"]

    @classmethod
    def of(
        cls,
        ids: Int[np.ndarray, " token"],
        document: Int[np.ndarray, " token"],
        position: Int[np.ndarray, " token"],
        values: Float[np.ndarray, "token series"],
    ) -> Types:
        """Of tokens, one row each."""
        unique, place = np.unique(ids, return_inverse=True)
        cells, cell = np.unique(document * len(unique) + place, return_inverse=True)
        order = np.argsort(cell, kind="stable")
        starts = np.searchsorted(cell[order], np.arange(len(cells)))
        return cls(
            ids=unique,
            document=cells // len(unique),
            type=cells % len(unique),
            count=np.bincount(cell).astype(np.float64),
            position=np.bincount(cell, weights=position),
            total=np.add.reduceat(values[order].astype(np.float64), starts),
        )

    def link(
        self,
        frequencies: Float[np.ndarray, " id"],
        weights: Float[np.ndarray, " document"] | None = None,
        *,
        given_position: bool = False,
    ) -> Float[np.ndarray, " series"]:
        """Rank correlation over types of each series' mean with frequency.

        Args:
            frequencies: of every id.
            weights: times that each document counts, for a resample.
            given_position: take the correlation with the mean position of a type out.
        """
        times = self.count if weights is None else self.count * weights[self.document]
        factor = np.ones_like(self.count) if weights is None else weights[self.document]
        counts = np.bincount(self.type, times, minlength=len(self.ids))
        seen = counts > 0
        order = np.argsort(self.type, kind="stable")
        starts = np.searchsorted(self.type[order], np.arange(len(self.ids)))
        totals = np.add.reduceat((self.total * factor[:, None])[order], starts)
        means = totals[seen] / counts[seen, None]
        against = frequencies[self.ids[seen]]
        if not given_position:
            return spearman(means, against)
        places = np.bincount(self.type, self.position * factor, minlength=len(self.ids))
        return partial(means, against, places[seen] / counts[seen])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Link:
    """Correlations with frequency: of each series, and of each series in halves of the documents."""

    value: Float[np.ndarray, " series"]
    resampled: Float[np.ndarray, "draw series"]


def linked(
    types: Types, frequencies: Float[np.ndarray, " id"], *, documents: int, times: int = TIMES
) -> Link:
    """The link of every series with frequency, and the same in halves of the documents."""
    return Link(
        value=types.link(frequencies),
        resampled=np.stack(
            [types.link(frequencies, weights) for weights in halves(documents, times=times)]
        ),
    )


class Occurrences:
    """Chosen coordinates in every layer at every token but the first, as a model's pass shows them."""

    def __init__(
        self,
        ids: Int[Tensor, "window token"],
        of: Sequence[int],
        *,
        layers: int,
        coordinates: Sequence[int],
    ) -> None:
        """For the windows of some documents."""
        self.coordinates: tuple[int, ...] = tuple(coordinates)
        self._chosen = torch.tensor(self.coordinates)
        windows, length = ids.shape
        self._ids = ids[:, 1:].reshape(-1).numpy()
        self._document = np.repeat(np.asarray(of), length - 1)
        self._position = np.tile(np.arange(1, length), windows)
        shape = (windows, length - 1, layers, len(self.coordinates))
        self._values = np.zeros(shape, dtype=np.float32)

    def take(
        self, layer: int, states: Float[Tensor, "batch token width"], windows: Sequence[int]
    ) -> None:
        """Keep what a layer's states have at the coordinates."""
        kept = states[:, 1:, self._chosen.to(states.device)].float().cpu().numpy()
        self._values[list(windows), :, layer] = kept

    def types(self, *, signed: bool = False, only: Sequence[int] | None = None) -> Types:
        """By token id; series are layers by coordinates, or by some. The size `|h_d|`, or `h_d` itself."""
        places = [self.coordinates.index(d) for d in (self.coordinates if only is None else only)]
        flat = self._values[..., places].reshape(len(self._ids), -1)
        return Types.of(self._ids, self._document, self._position, flat if signed else np.abs(flat))
