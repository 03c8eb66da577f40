"""The recital report as a page: the finding, curves, longest recitals, and every text as a heat map."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from fourfold_goldfish.memorization.personal import KINDS, chance_bits
from fourfold_goldfish.memorization.recital import TRIES, Reading
from fourfold_goldfish.memorization.report import EVEN, NEAR, REFERENCES, SIDES, Report, percent
from fourfold_parallel.common.files import write_text
from fourfold_parallel.reproduce.claims import Interval
from fourfold_parallel.reproduce.figures import CONTROL, METHOD, style, svg
from fourfold_parallel.reproduce.page import inline, render

TEMPLATE = Path(__file__).with_name("report.html.jinja")
LEVELS = (1_000_000, 1_000, 10, 1)
"""Samples after which a stretch has come out, more likely than not: the levels of heat, 1 to 4."""
SEGMENTS = 60
"""Parts of the strip that shows a text at a glance."""
SHOWN = 200
"""Texts shown token by token, the likeliest to be recited first."""
WHOLE = 3000
"""Tokens up to which a text is shown whole; of a longer one the warm parts are, and what is around them."""
AROUND = 60


@dataclass(frozen=True, slots=True)
class Span:
    """Characters of one heat."""

    level: int
    """0 to 4; -1 for a prompt, which nobody asks for."""
    characters: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A text as a heat map."""

    name: str
    tokens: int
    tries: str
    """Samples for its likeliest stretch."""
    level: int
    strip: tuple[tuple[int, int], ...]
    """(level, parts) of the strip, from left to right."""
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recital:
    """A stretch that greedy decoding recites."""

    name: str
    tokens: int
    before: str
    characters: str


def write_page(report: Report, path: Path) -> None:
    """Write the page."""
    with style():
        drawn = inline(svg(curves(report)), prefix="curves-")
    texts = sorted(
        report.readings["texts"],
        key=lambda reading: (_best(reading, report.suffix), reading.longest()[1]),
        reverse=True,
    )
    page = render(
        TEMPLATE,
        report=report,
        attacker=report.inquiry.attacker,
        drawn=drawn,
        sides=SIDES,
        even=EVEN,
        near=NEAR,
        levels=[f"{samples:,}" for samples in LEVELS],
        tries=[1, 1000, TRIES[-1]],
        percent=percent,
        recitals=[*recitals(report)][:10],
        personal=[*personal(report)],
        chance=chance_bits(REFERENCES),
        most_bits=math.log2(REFERENCES + 1),
        shown=[shown(reading, report) for reading in texts[:SHOWN]],
        hidden=max(0, len(texts) - SHOWN),
    )
    write_text(path, page)


def curves(report: Report) -> Figure:
    """Share of stretches by samples drawn: at even odds with its interval, and at odds of 1 and 9 in 10."""
    figure = Figure(figsize=(8.2, 3.4))
    axes = figure.subplots()
    colors = {"texts": (METHOD, "your texts"), "control": (CONTROL, "control")}
    for side in SIDES:
        color, label = colors[side]
        for p, curve in report.curves[side].items():
            percents = [100 * share.value for share in curve.shares]
            if p == EVEN:
                axes.plot(TRIES, percents, color=color, label=label, marker="o", markersize=3.5)
                low, high = (
                    [100 * getattr(s, end) for s in curve.shares] for end in ("low", "high")
                )
                axes.fill_between(TRIES, low, high, color=color, alpha=0.15, linewidth=0)
            else:
                axes.plot(TRIES, percents, color=color, linewidth=1, linestyle=":")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("samples drawn")
    axes.set_ylabel("stretches that come out (%)")
    axes.legend(loc="upper left")
    return figure


def recitals(report: Report) -> Iterator[Recital]:
    """The longest recital of each text that has one of half a stretch or more, longest first."""
    prompt = report.inquiry.attacker.prompt
    for reading, first, tokens in report.longest:
        if 2 * tokens >= report.suffix:
            pieces = report.pieces[reading.name]
            begin = prompt + first
            yield Recital(
                name=reading.name,
                tokens=tokens,
                before="".join(pieces[max(0, begin - 15) : begin]),
                characters="".join(pieces[begin : begin + tokens]),
            )


def personal(report: Report) -> Iterator[tuple[str, Sequence[tuple[int, Interval | None]]]]:
    """Each kind of personal data with its number and mean exposure, in the texts and in the control."""
    for kind in KINDS:
        both = [report.bits(side, kind) for side in SIDES]
        if any(count for count, _ in both):
            yield kind, both


def shown(reading: Reading, report: Report) -> Shown:
    """A text with the heat of each token."""
    prompt = report.inquiry.attacker.prompt
    levels = np.concatenate([np.full(prompt, -1), levels_of(reading.heat(report.suffix))])
    best = _best(reading, report.suffix)
    return Shown(
        name=reading.name,
        tokens=len(levels),
        tries=tries_of(best),
        level=int(levels.max()),
        strip=tuple(_strip(levels)),
        spans=tuple(_spans(levels, report.pieces[reading.name])),
    )


def levels_of(log_chances: Float[np.ndarray, " token"]) -> Int[np.ndarray, " token"]:
    """0 for more than a million samples, up to 4 for one."""
    least = [math.log(-math.expm1(math.log1p(-EVEN) / samples)) for samples in LEVELS]
    return np.searchsorted(least, log_chances, side="right")


def tries_of(log_chance: float) -> str:
    """Samples that a stretch takes, more likely than not, as a person says it."""
    if log_chance >= math.log(EVEN):
        return "1 try"
    exponent = (math.log(math.log(2)) - log_chance) / math.log(10)
    if exponent > 12:
        return "never"
    return f"{10**exponent:,.0f} tries" if exponent < 6 else f"10^{exponent:.0f} tries"


def _best(reading: Reading, suffix: int) -> float:
    return float(reading.stretches(suffix).max())


def _strip(levels: Int[np.ndarray, " token"]) -> Iterator[tuple[int, int]]:
    parts = [int(part.max()) for part in np.array_split(levels, min(SEGMENTS, len(levels)))]
    for level, run in itertools.groupby(parts):
        yield level, len([*run])


def _spans(levels: Int[np.ndarray, " token"], pieces: Sequence[str]) -> Iterator[Span]:
    keep = np.ones(len(levels), dtype=bool)
    if len(levels) > WHOLE:
        warm = np.convolve(levels > 0, np.ones(2 * AROUND + 1), "same") > 0
        keep = warm if warm.any() else np.arange(len(levels)) < WHOLE
    first = 0
    for (level, is_kept), run in itertools.groupby(
        zip(levels.tolist(), keep.tolist(), strict=True)
    ):
        end = first + len([*run])
        if is_kept:
            yield Span(level, "".join(pieces[first:end]))
        elif first == 0 or keep[first - 1]:
            gap = int((~keep[first:]).argmin()) if keep[first:].any() else len(keep) - first
            yield Span(-2, f" [{gap:,} tokens] ")
        first = end
