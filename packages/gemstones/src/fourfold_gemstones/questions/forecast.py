"""Forecasts that are written down before the run, and scored after it.

A ledger is a file of JSON lines to which lines are added and never changed. A line says which law was fitted
to which data (their SHA-256), the loss it expects of a run that is not yet done, an interval, and the date; a
later line says the loss that was measured. Each line names the SHA-256 of the line before it, so that a line
that is altered, moved or taken out is noticed. Over many forecasts the share of intervals that held is their
calibration (`history`).

The interval is that of a run, not of the law: to each refit over resampled runs is added the error of a run
that the fit did not see.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import binomtest

from fourfold_gemstones.runs import RunTable, StrPath
from fourfold_gemstones.uncertainty import Fit, Interval, Law, bootstrap, percentile_interval

LEVEL = 0.9
"""Of an interval, unless another is asked for."""
FEWEST_RUNS = 5
"""Runs below which the error of a run that was not seen has no distribution to draw from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A loss that was foretold, and the law and data that foretold it."""

    name: str
    """Of the run, as the ledger knows it."""
    registered: str
    """Date and time in UTC, ISO 8601."""
    law: str
    settings: Mapping[str, Any]
    """Of the estimator."""
    source: str
    """File of the runs."""
    data_sha256: str
    """Of the rows that were fitted (`digest`)."""
    runs: int
    rows: int
    inputs: Mapping[str, float]
    """Variables of the run that was forecast, by the name of their column."""
    loss_nats: float
    low: float
    high: float
    level: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The loss that a run reached, beside its forecast."""

    name: str
    scored: str
    """Date and time in UTC, ISO 8601."""
    measured_nats: float


Entry = Forecast | Score
_KINDS: Mapping[str, type[Entry]] = MappingProxyType({"forecast": Forecast, "score": Score})


def digest(table: RunTable) -> str:
    """SHA-256 of the names and numbers of a table, whatever file they came from."""
    total = hashlib.sha256("\n".join(table.run).encode())
    for name in sorted(table.columns):
        total.update(name.encode())
        total.update(np.ascontiguousarray(table.columns[name], dtype="<f8").tobytes())
    return total.hexdigest()


def now() -> str:
    """The present moment in UTC, to the second."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def unseen_errors(fit: Fit) -> Float[np.ndarray, " run"]:
    """Log of the last loss of each run over what the law fitted to all other runs expects there.

    Raises:
        ValueError: There are fewer than `FEWEST_RUNS` runs.
    """
    table = fit.table
    names, index = table.groups("run")
    if len(names) < FEWEST_RUNS:
        raise ValueError(
            f"{table.source} has {len(names)} runs, and the error of a run that a law has not seen needs "
            f"{FEWEST_RUNS}; add runs"
        )
    weights = (index[None] != np.arange(len(names))[:, None]).astype(np.float64)
    without = fit.law.refits(fit, table, weights)
    errors = np.empty(len(names))
    for run, estimate in enumerate(without):
        last = table.where(np.arange(len(table)) == np.flatnonzero(index == run)[-1])
        errors[run] = np.log(last.column("loss_nats")[0] / _expected(fit, estimate, last)[0])
    return errors


def _expected(fit: Any, estimate: Any, table: RunTable) -> Float[np.ndarray, " row"]:
    """Losses that another estimate of the fit's law expects."""
    return replace(fit, estimate=estimate).predict(table)


def foretell(
    fit: Fit,
    run: RunTable,
    *,
    draws: int,
    generator: np.random.Generator,
    level: float = LEVEL,
) -> tuple[Interval, ...]:
    """The interval of the loss of each row of `run`, whose own losses are not looked at."""
    errors = unseen_errors(fit)
    drawn = bootstrap(fit, draws=draws, generator=generator)
    expected = np.stack([_expected(fit, estimate, run) for estimate in drawn.estimates])
    told = expected * np.exp(generator.choice(errors, size=expected.shape))
    return tuple(percentile_interval(column, level) for column in told.T)


def planned(runs: Mapping[str, Mapping[str, float]], like: RunTable) -> RunTable:
    """Runs that are not done yet, a row each.

    A table must have losses, so theirs are the median of `like`; no law reads them.

    Raises:
        ValueError: A variable is not positive, or a run lacks one that another has.
    """
    keys = list(next(iter(runs.values())))
    for name, inputs in runs.items():
        if set(inputs) != set(keys):
            raise ValueError(
                f"the planned run {name} has {sorted(inputs)}, others have {sorted(keys)}"
            )
    unread = float(np.median(like.column("loss_nats")))
    return RunTable.from_columns(
        {
            "run": list(runs),
            **{key: [inputs[key] for inputs in runs.values()] for key in keys},
            "loss_nats": [unread] * len(runs),
        },
        architecture=like.architecture,
        source="the planned runs",
    )


def entries(path: StrPath) -> tuple[Entry, ...]:
    """All lines of a ledger, in order.

    Raises:
        ValueError: A line is not one of a ledger, or does not follow from the line before it.
    """
    path = Path(path)
    if not path.is_file():
        return ()
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
    read: list[Entry] = []
    before = ""
    for number, line in enumerate(lines, start=1):
        try:
            fields = json.loads(line)
            kind, after = _KINDS[fields.pop("event")], fields.pop("after")
            entry = kind(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"line {number} of {path.name} is no line of a ledger of forecasts ({error}); take the "
                "file from where it was last whole"
            ) from error
        if after != _sha256(before):
            raise ValueError(
                f"line {number} of {path.name} does not follow from the line before it: one of them was "
                "changed, moved or taken out after it was registered. Take the file from where it was whole"
            )
        before = line
        read.append(entry)
    return tuple(read)


def _sha256(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()


def _append(path: StrPath, entry: Entry) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = [line for line in text.split("\n") if line]
    kind = next(name for name, of in _KINDS.items() if isinstance(entry, of))
    fields = {"event": kind, "after": _sha256(lines[-1] if lines else ""), **asdict(entry)}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(fields) + "\n")


def register(path: StrPath, forecast: Forecast) -> None:
    """Add a forecast to a ledger.

    Raises:
        ValueError: The ledger has a forecast of that name, or is broken.
    """
    names = {entry.name for entry in entries(path) if isinstance(entry, Forecast)}
    if forecast.name in names:
        raise ValueError(
            f"{Path(path).name} has a forecast named {forecast.name!r}; a forecast is never changed. "
            "Choose another name: both will be scored"
        )
    _append(path, forecast)


def score(path: StrPath, name: str, measured_nats: float, *, when: str) -> Forecast:
    """Add the measured loss of a run whose forecast stands in the ledger; the forecast.

    Raises:
        ValueError: There is no such forecast, it has been scored, or the loss is not a positive number.
    """
    read = entries(path)
    forecasts = {entry.name: entry for entry in read if isinstance(entry, Forecast)}
    if name not in forecasts:
        raise ValueError(
            f"{Path(path).name} has no forecast named {name!r}; there are {', '.join(forecasts) or 'none'}"
        )
    if any(isinstance(entry, Score) and entry.name == name for entry in read):
        raise ValueError(f"{name!r} has been scored in {Path(path).name}; a score is never changed")
    if not 0 < measured_nats < np.inf:
        raise ValueError(
            f"the measured loss of {name!r} is {measured_nats:g}, and must be positive and finite"
        )
    _append(path, Score(name=name, scored=when, measured_nats=measured_nats))
    return forecasts[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Forecasts of a ledger beside what was measured."""

    scored: tuple[tuple[Forecast, Score], ...]
    open: tuple[Forecast, ...]

    @property
    def held(self) -> int:
        """Intervals that hold the measured loss."""
        return sum(told.low <= score.measured_nats <= told.high for told, score in self.scored)

    def coverage(self) -> Interval:
        """The 95 % interval (Clopper and Pearson) of the share of intervals that hold.

        Raises:
            ValueError: Nothing has been scored.
        """
        if not self.scored:
            raise ValueError("nothing has been scored; score a forecast first")
        interval = binomtest(self.held, len(self.scored)).proportion_ci(0.95, method="exact")
        return Interval(low=float(interval.low), high=float(interval.high), level=0.95)

    @property
    def bias(self) -> float:
        """Mean of log measured over log expected; positive where runs end higher than foretold."""
        return float(
            np.mean([np.log(score.measured_nats / told.loss_nats) for told, score in self.scored])
        )


def history(path: StrPath) -> Calibration:
    """All forecasts of a ledger, those with a score and those without."""
    read = entries(path)
    scores = {entry.name: entry for entry in read if isinstance(entry, Score)}
    forecasts = [entry for entry in read if isinstance(entry, Forecast)]
    return Calibration(
        scored=tuple((told, scores[told.name]) for told in forecasts if told.name in scores),
        open=tuple(told for told in forecasts if told.name not in scores),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A run that cost more than all runs of the fit that foretold it."""

    run: str
    runs: int
    """Cheaper runs that were fitted."""
    cost: float
    """6 N T, or FLOPs where the table has them."""
    measured_nats: float
    loss_nats: float
    interval: Interval

    @property
    def error(self) -> float:
        """Log of measured over expected loss."""
        return float(np.log(self.measured_nats / self.loss_nats))

    @property
    def held(self) -> bool:
        """True where the interval holds the measured loss."""
        return self.interval.contains(self.measured_nats)


def leave_future_out(
    table: RunTable,
    law: Law,
    *,
    draws: int,
    generator: np.random.Generator,
    level: float = LEVEL,
    first: int = 0,
) -> Iterator[LeftOut]:
    """Each run foretold, at its end, by the law fitted to all cheaper runs.

    Args:
        table: runs, each with its checkpoints.
        law: estimator.
        draws: of each bootstrap.
        generator: of the draws.
        level: of the intervals.
        first: cheaper runs that the first forecast needs; 0 is half of them.

    Raises:
        ValueError: The first fit is refused: too few runs, or runs that do not identify the law.
    """
    names, index = table.groups("run")
    cost = (
        table.flops()
        if table.has("flops")
        else 6 * table.column("parameters") * table.column("tokens")
    )
    ends = np.asarray([np.flatnonzero(index == run)[-1] for run in range(len(names))])
    order = np.argsort(cost[ends], kind="stable")
    begin = first or max(FEWEST_RUNS, len(names) // 2)
    for position in range(begin, len(names)):
        run = order[position]
        cheaper = table.where(np.isin(index, order[:position]))
        last = table.where(np.arange(len(table)) == ends[run])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit = law.fit(cheaper)
            (interval,) = foretell(fit, last, draws=draws, generator=generator, level=level)
        yield LeftOut(
            run=names[run],
            runs=position,
            cost=float(cost[ends[run]]),
            measured_nats=float(last.column("loss_nats")[0]),
            loss_nats=float(fit.predict(last)[0]),
            interval=interval,
        )


def written(
    fit: Fit,
    runs: Mapping[str, Mapping[str, float]],
    *,
    law: str,
    draws: int,
    seed: int,
    when: str,
    level: float = LEVEL,
) -> tuple[Forecast, ...]:
    """Forecasts of runs that are not done yet, by name, with their variables by the name of the column."""
    table = planned(runs, fit.table)
    intervals = foretell(
        fit, table, draws=draws, generator=np.random.default_rng(seed), level=level
    )
    settings = {key: _plain(value) for key, value in fit.law.get_params().items()}
    return tuple(
        Forecast(
            name=name,
            registered=when,
            law=law,
            settings=settings,
            source=fit.table.source,
            data_sha256=digest(fit.table),
            runs=len(set(fit.table.run)),
            rows=len(fit.table),
            inputs=dict(inputs),
            loss_nats=float(expected),
            low=interval.low,
            high=interval.high,
            level=level,
        )
        for (name, inputs), expected, interval in zip(
            runs.items(), fit.predict(table), intervals, strict=True
        )
    )


def _plain(value: Any) -> Any:
    """A setting as JSON holds it."""
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, int | float | str | bool) else str(value)


def summary(calibration: Calibration) -> Sequence[str]:
    """Lines for a terminal: each forecast, and the share of intervals that held."""
    lines: list[str] = []
    for told, measured in calibration.scored:
        inside = told.low <= measured.measured_nats <= told.high
        lines.append(
            f"{told.name}: {told.loss_nats:.4f} ({told.low:.4f} to {told.high:.4f}) nats foretold on "
            f"{told.registered[:10]}, {measured.measured_nats:.4f} measured: {'held' if inside else 'MISSED'}"
        )
    lines += [
        f"{told.name}: {told.loss_nats:.4f} ({told.low:.4f} to {told.high:.4f}) nats foretold on "
        f"{told.registered[:10]}, not scored"
        for told in calibration.open
    ]
    if calibration.scored:
        of = calibration.coverage()
        levels = sorted({told.level for told, _ in calibration.scored})
        lines.append(
            f"{calibration.held} of {len(calibration.scored)} intervals of level "
            f"{', '.join(f'{level:g}' for level in levels)} held: a share of {of.low:.2f} to {of.high:.2f} "
            f"(95 %); runs end {100 * calibration.bias:+.2f} % from what was foretold on average"
        )
    return lines or ["no forecast is registered"]
