"""The speed-up of a recipe over another, with an interval.

Recipe B is s times as fast as A where it reaches with T tokens the loss that A reaches with s T, at every
size. Both recipes are fitted at once by one law, of which B has its own s; whether they approach one floor is
a choice, `shared`, because a floor of its own can hide a speed-up and the reverse.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from fourfold_gemstones.form import (
    Amplitudes,
    Form,
    FormEstimate,
    FormLaw,
    Logs,
    Shape,
    Shapes,
    Terms,
)
from fourfold_gemstones.runs import RunTable
from fourfold_gemstones.uncertainty import Interval, bootstrap

MOST = 8.0
"""Log of the largest speed-up, or slow-down, that is looked for."""
_BASE = (
    Shape(name="alpha", meaning="exponent of size", low=0, high=5, seeds=(0.1, 0.9)),
    Shape(name="beta", meaning="exponent of data", low=0, high=5, seeds=(0.1, 0.9)),
    Shape(
        name="log_speed",
        meaning="log of the speed-up in tokens",
        low=-MOST,
        high=MOST,
        seeds=(-1, 1),
    ),
)


def _shared(s: Shapes, x: Logs, c: Amplitudes) -> Terms:
    del c
    return (
        -s["alpha"] * x["parameters"],
        -s["beta"] * (x["tokens"] + s["log_speed"] * x["loops"]),
    )


def _apart(s: Shapes, x: Logs, c: Amplitudes) -> Terms:
    # The floor of A is a term that B has none of, and the other way round; the common floor is what is least.
    size, data = _shared(s, x, c)
    return size, data, s["floor_ratio"] * x["loops"]


_EXAMPLE = {"size": -0.6, "data": -0.6, "alpha": 0.33, "beta": 0.36, "log_speed": 0.4, "floor": 0.6}
SHARED = Form(
    variables=("parameters", "tokens", "loops"),
    terms=("size", "data"),
    shapes=_BASE,
    log_terms=_shared,
    example=MappingProxyType(_EXAMPLE),
)
"""One floor. The recipe stands in `loops`, a pure number: 1 for A, e for B."""
APART = Form(
    variables=("parameters", "tokens", "loops"),
    terms=("size", "data", "own floor"),
    shapes=(
        *_BASE,
        Shape(
            name="floor_ratio",
            meaning="log of B's over A's own floor",
            low=-3,
            high=3,
            seeds=(-0.3, 0.3),
        ),
    ),
    log_terms=_apart,
    example=MappingProxyType({**_EXAMPLE, "own floor": 0.0, "floor_ratio": 0.1, "floor": -30.0}),
)
"""A floor for each recipe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeedUp:
    """Tokens that recipe A needs over those that B needs, for one loss at one size."""

    ratio: float
    interval: Interval
    shared: bool
    floors: tuple[float, float]
    """Nats of A and of B."""
    objective: float

    def __str__(self) -> str:
        floors = (
            f"one floor of {self.floors[0]:.4f} nats"
            if self.shared
            else f"floors of {self.floors[0]:.4f} and {self.floors[1]:.4f} nats"
        )
        level = f"{100 * self.interval.level:g} %"
        beyond = "" if self.interval.contains(1.0) else "; the interval leaves 1 out"
        return (
            f"B needs 1/{self.ratio:.3f} of A's tokens ({level}: 1/{self.interval.low:.3f} to "
            f"1/{self.interval.high:.3f}), {floors}{beyond}"
        )


def both(first: RunTable, second: RunTable) -> RunTable:
    """The runs of two recipes in one table, with names of their own and the recipe as a column."""
    tables = []
    for name, code, table in (("A", 1.0, first), ("B", float(np.e), second)):
        columns = {key: table.column(key) for key in ("parameters", "tokens", "loss_nats")} | {
            "loops": np.full(len(table), code)
        }
        tables.append(
            replace(
                table,
                run=np.asarray([f"{name}: {run}" for run in table.run]),
                columns=MappingProxyType(columns),
            )
        )
    return tables[0].beside(tables[1])


def speed_up(
    first: RunTable,
    second: RunTable,
    *,
    shared: bool = True,
    delta: float = 1e-3,
    draws: int,
    generator: np.random.Generator,
    level: float = 0.95,
) -> SpeedUp:
    """The speed-up of the second recipe over the first, with the interval over runs of both.

    Raises:
        ValueError: Rows are too few, or sizes or tokens do not vary.
    """
    law = FormLaw(form=SHARED if shared else APART, delta=delta)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = law.fit(both(first, second))
    drawn = bootstrap(fit, draws=draws, generator=generator)

    def log_speed(estimate: FormEstimate) -> float:
        return estimate.named()["log_speed"]

    interval = drawn.interval(log_speed, level=level)
    named = fit.estimate.named()
    own = named.get("own floor", 0.0)
    return SpeedUp(
        ratio=float(np.exp(named["log_speed"])),
        interval=Interval(
            low=float(np.exp(interval.low)), high=float(np.exp(interval.high)), level=level
        ),
        shared=shared,
        floors=(
            named["floor"] + own,
            named["floor"] + own * float(np.exp(named.get("floor_ratio", 0.0))),
        ),
        objective=fit.objective,
    )
