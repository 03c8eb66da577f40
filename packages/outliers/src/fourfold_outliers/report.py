"""A model's outliers in one value: which they are, their part, their link to frequency, their worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourfold_outliers.disabling import biases_of, gains_of, norms_of, random_sets, silenced
from fourfold_outliers.effects import (
    Behaviour,
    attending_eagerly,
    behaviour,
    delimiters_of,
)
from fourfold_outliers.frequency import Occurrences, counted, frequency, linked
from fourfold_outliers.geometry import (
    Sums,
    by_parameter,
    by_share,
    by_variance,
    lasting,
    partition_isotropy,
    top_share,
)
from fourfold_outliers.resampling import halves, interval
from fourfold_outliers.stream import (
    Documents,
    First,
    Sample,
    documents,
    layers_of,
    measure,
    vocabulary_of,
    width_of,
)
from fourfold_parallel.common.progress import Progress, silent
from fourfold_parallel.reproduce.claims import Interval
from fourfold_parallel.run.tokenizers import encoded

OTHERS = 64
"""Other coordinates whose links to frequency are measured beside."""
SETS = 5
"""Random sets that are disabled beside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReport:
    """The states that leave a layer; those of 0 enter the first one."""

    layer: int
    outliers: tuple[int, ...]
    """By share."""
    shares: dict[str, float]
    """Share of tokens in which a coordinate is far away; of those that are outliers somewhere."""
    varying: tuple[int, ...]
    """By variance."""
    cosine: float
    contributions: dict[str, float]
    """Of the outliers that last, to the mean cosine."""
    top_share: float
    """Of the three largest contributions."""
    without: float
    """Mean cosine without the outliers that last."""
    centred: float
    standardised: float
    isotropy: float
    """By partition functions, of up to 512 tokens."""
    isotropy_without: float
    norm: float
    first_norm: float
    """Mean length of the state at position 0."""
    first_held: float
    """Share of its squared length that the outliers hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkReport:
    """An outlier's rank correlation with frequency over token ids, mean over inner layers."""

    coordinate: int
    size: Interval
    """Of `|h|`."""
    given_position: float
    signed: float
    """Of `h` itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EffectReport:
    """A model with some coordinates disabled in every norm."""

    coordinates: tuple[int, ...]
    loss_nats: float
    rise: Interval
    """Of the loss, over documents; without width for the model as it is."""
    distinct: int
    """Token ids that it predicts somewhere."""
    to_first: float
    """Mean attention to position 0."""
    to_delimiters: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All of it."""

    model: str
    corpus: str
    parameters: int
    width: int
    documents: int
    tokens: int
    """Without position 0 of each window."""
    outliers: tuple[int, ...]
    """Outliers by share in at least half of the inner layers."""
    by_gain: tuple[int, ...]
    by_bias: tuple[int, ...]
    layers: tuple[LayerReport, ...]
    links: tuple[LinkReport, ...]
    others_p95: float
    """95 % point of the size of other coordinates' links."""
    as_it_is: EffectReport
    effects: tuple[EffectReport, ...]
    """All outliers that last, then each alone; none where there are none."""
    random: tuple[EffectReport, ...]
    """As many other coordinates, drawn."""

    @property
    def sentence(self) -> str:
        """The finding as a person says it."""
        if not self.outliers:
            return f"No coordinate of {self.model} is an outlier in half of its inner layers."
        inner = self.layers[1:-1]
        kept = np.mean([layer.without for layer in inner]) / np.mean(
            [layer.cosine for layer in inner]
        )
        linked = [
            link.coordinate
            for link in self.links
            if abs(link.size.value) > self.others_p95 and link.size.low * link.size.high > 0
        ]
        who, whom = ("is", "it") if len(self.outliers) == 1 else ("are", "them")
        spared = np.median([each.rise.value for each in self.random])
        return (
            f"Of {self.width} coordinates, {_named(self.outliers)} {who} far from the others in most "
            f"tokens and layers. Without {whom} {100 * kept:.0f} % of the mean cosine is left, and the "
            f"loss rises by {self.effects[0].rise.value:.2g} nats (as many others: {spared:.2g}). Linked "
            "to token frequency more than 95 % of the others: "
            f"{_named(linked) if linked else 'none'}."
        )


def _named(coordinates: Sequence[int]) -> str:
    *others, last = map(str, coordinates)
    return f"{', '.join(others)} and {last}" if others else last


def outlier_report(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    name: str,
    corpus: str,
    tokens: int = 8192,
    context: int = 256,
    seed: int = 0,
    progress: Progress = silent,
) -> Report:
    """Measure a model's outliers on texts.

    Args:
        model: any decoder of transformers, in evaluation mode.
        tokenizer: its own.
        texts: what it reads; frequencies are counted in all of them.
        name: of the model.
        corpus: of the texts.
        tokens: that are read.
        context: of a window.
        seed: of what is drawn.
        progress: told after each pass.

    Raises:
        ValueError: no text fills a window, there are fewer than four windows, or the model has no decoder
            layers or no norms that are known.
    """
    read = documents(tokenizer, texts, tokens=tokens, context=context)
    if read.count < 4:
        raise ValueError(
            f"{read.count} windows of {context} tokens give no interval; give more text, or a smaller "
            "--context"
        )
    layers, width = len(layers_of(model)) + 1, width_of(model)
    norms = norms_of(model)
    sums = measure(model, read, progress=progress).sums
    outliers = lasting(by_share(sums)[1:-1])
    views = (sums.centred(), sums.standardised(), sums.without(outliers))
    free = np.setdiff1d(np.arange(width), outliers)
    drawn = np.random.default_rng(seed).choice(free, min(OTHERS, len(free)), replace=False)
    seen = Occurrences(
        read.ids, read.of, layers=layers, coordinates=(*outliers, *map(int, sorted(drawn)))
    )
    sample = Sample(layers)
    again = measure(model, read, views=views, also=(seen.take, sample.take), progress=progress)
    counts = counted((np.asarray(encoded(tokenizer, text)) for text in texts), vocabulary_of(model))
    links, p95 = _links(seen, outliers, frequency(counts), read, layers)
    biases = biases_of(norms)
    as_it_is, effects, random = _effects(model, tokenizer, read, outliers, width, seed, progress)
    return Report(
        model=name,
        corpus=corpus,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        width=width,
        documents=read.count,
        tokens=int(sums.tokens[:, 0].sum()),
        outliers=outliers,
        by_gain=_where(by_parameter(gains_of(norms))),
        by_bias=_where(by_parameter(biases)) if len(biases) else (),
        layers=_layers(sums, again.viewed, again.first(), sample, outliers),
        links=links,
        others_p95=p95,
        as_it_is=as_it_is,
        effects=effects,
        random=random,
    )


def _where(mask: torch.Tensor) -> tuple[int, ...]:
    return tuple(torch.nonzero(mask).flatten().tolist())


def _layers(
    sums: Sums, viewed: Sequence[Sums], first: First, sample: Sample, outliers: tuple[int, ...]
) -> tuple[LayerReport, ...]:
    whole, shares, variances = sums.pooled(), by_share(sums), by_variance(sums)
    [parts] = whole.contributions()
    centred, standardised, without = (each.pooled().cosines()[0] for each in viewed)
    view = sums.without(outliers)
    ever = _where(shares.any(0))
    return tuple(
        LayerReport(
            layer=layer,
            outliers=_where(shares[layer]),
            shares={str(d): float(whole.shares()[0, layer, d]) for d in ever},
            varying=_where(variances[layer]),
            cosine=float(whole.cosines()[0, layer]),
            contributions={str(d): float(parts[layer, d]) for d in outliers},
            top_share=float(top_share(parts[layer])),
            without=float(without[layer]),
            centred=float(centred[layer]),
            standardised=float(standardised[layer]),
            isotropy=partition_isotropy(sample.of(layer)),
            isotropy_without=partition_isotropy(view(layer, sample.of(layer))),
            norm=float(whole.norms()[0, layer]),
            first_norm=float(first.norm[layer]),
            first_held=float(first.held[layer, list(outliers)].sum()),
        )
        for layer in range(len(parts))
    )


def _links(
    seen: Occurrences,
    outliers: tuple[int, ...],
    frequencies: np.ndarray,
    read: Documents,
    layers: int,
) -> tuple[tuple[LinkReport, ...], float]:
    inner = slice(1, -1)
    sizes = seen.types()

    def averaged(values: np.ndarray) -> np.ndarray:
        return values.reshape(layers, -1)[inner].mean(0)

    value = averaged(sizes.link(frequencies))
    rest = np.abs(value[len(outliers) :])
    p95 = float(np.quantile(rest, 0.95)) if len(rest) else 0.0
    if not outliers:
        return (), p95
    given = averaged(sizes.link(frequencies, given_position=True))
    signed = averaged(seen.types(signed=True, only=outliers).link(frequencies))
    drawn = linked(seen.types(only=outliers), frequencies, documents=read.count).resampled
    resampled = drawn.reshape(len(drawn), layers, len(outliers))[:, inner].mean(1)
    links = tuple(
        LinkReport(
            coordinate=coordinate,
            size=interval(float(value[at]), resampled[:, at], read.count),
            given_position=float(given[at]),
            signed=float(signed[at]),
        )
        for at, coordinate in enumerate(outliers)
    )
    return links, p95


def _effects(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    read: Documents,
    outliers: tuple[int, ...],
    width: int,
    seed: int,
    progress: Progress,
) -> tuple[EffectReport, tuple[EffectReport, ...], tuple[EffectReport, ...]]:
    marks = delimiters_of(tokenizer, vocabulary_of(model))
    alone = [(d,) for d in outliers] if len(outliers) > 1 else []
    sets = (
        random_sets(width, len(outliers), besides=outliers, times=SETS, seed=seed)
        if outliers
        else []
    )
    asked = [(), *([outliers] if outliers else []), *alone, *sets]
    seen: list[Behaviour] = []
    for done, coordinates in enumerate(asked, start=1):
        with attending_eagerly(model), silenced(model, coordinates):
            seen.append(behaviour(model, read, delimiters=marks))
        progress(done, len(asked), "disabling")
    told = [_told(c, each, seen[0]) for c, each in zip(asked, seen, strict=True)]
    named = 1 + bool(outliers) + len(alone)
    return told[0], tuple(told[1:named]), tuple(told[named:])


def _told(coordinates: tuple[int, ...], seen: Behaviour, before: Behaviour) -> EffectReport:
    more = (seen.loss_nats - before.loss_nats).numpy()
    weights = halves(len(more))
    return EffectReport(
        coordinates=coordinates,
        loss_nats=float(seen.loss_nats.mean()),
        rise=interval(float(more.mean()), weights @ more / weights.sum(1), len(more)),
        distinct=seen.distinct,
        to_first=float(seen.to_first.mean()),
        to_delimiters=float(seen.to_delimiters.mean()),
    )
