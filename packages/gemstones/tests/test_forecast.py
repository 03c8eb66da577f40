"""Forecasts are written before the run, never changed, and their intervals hold as often as they say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from fourfold_gemstones.laws import PowerLaw
from fourfold_gemstones.parametric import ParametricLaw
from fourfold_gemstones.questions import forecast
from fourfold_gemstones.questions.simulate import noisy
from fourfold_gemstones.runs import RunTable
from fourfold_parallel.common.records import read_record

RESULTS = Path(__file__).parents[1] / "results"
LAW = ParametricLaw(delta=1e-3)


def told(name: str, low: float, high: float) -> forecast.Forecast:
    """A forecast of 3 nats with some interval."""
    return forecast.Forecast(
        name=name,
        registered="2026-01-01T00:00:00+00:00",
        law="parameters",
        settings={},
        source="runs.csv",
        data_sha256="0" * 64,
        runs=9,
        rows=90,
        inputs={"parameters": 1e9, "tokens": 2e10},
        loss_nats=3.0,
        low=low,
        high=high,
        level=0.9,
    )


def test_a_ledger_counts_the_intervals_that_held(tmp_path: Path) -> None:
    ledger = tmp_path / "forecasts.jsonl"
    assert forecast.history(ledger).scored == ()
    for number, loss in enumerate((2.95, 3.0, 3.2)):
        forecast.register(ledger, told(f"run {number}", 2.9, 3.1))
        forecast.score(ledger, f"run {number}", loss, when="2026-01-02T00:00:00+00:00")
    forecast.register(ledger, told("later", 2.9, 3.1))
    history = forecast.history(ledger)
    assert history.held == 2
    assert [open_one.name for open_one in history.open] == ["later"]
    # Clopper and Pearson for two of three.
    assert history.coverage().low == pytest.approx(0.0943, abs=1e-4)
    assert history.coverage().high == pytest.approx(0.9916, abs=1e-4)
    assert history.bias == pytest.approx(np.mean(np.log([2.95 / 3, 1.0, 3.2 / 3])))
    last = forecast.summary(history)[-1]
    assert "2 of 3 intervals of level 0.9 held: a share of 0.09 to 0.99" in last


def test_a_line_that_was_changed_moved_or_taken_out_is_noticed(tmp_path: Path) -> None:
    ledger = tmp_path / "forecasts.jsonl"
    for name in ("a", "b", "c"):
        forecast.register(ledger, told(name, 2.9, 3.1))
    lines = ledger.read_text().splitlines()
    altered = {**json.loads(lines[0]), "high": 9.9}
    for broken in (
        [json.dumps(altered), *lines[1:]],
        [lines[0], lines[2]],
        [lines[1], lines[0], lines[2]],
    ):
        ledger.write_text("\n".join(broken) + "\n")
        with pytest.raises(ValueError, match="does not follow from the line before it"):
            forecast.history(ledger)
    ledger.write_text("not JSON\n")
    with pytest.raises(ValueError, match=r"line 1 of forecasts.jsonl is no line of a ledger"):
        forecast.entries(ledger)


def test_forecasts_and_scores_are_never_changed(tmp_path: Path) -> None:
    ledger = tmp_path / "forecasts.jsonl"
    forecast.register(ledger, told("a", 2.9, 3.1))
    with pytest.raises(ValueError, match="a forecast is never changed"):
        forecast.register(ledger, told("a", 1.0, 9.0))
    with pytest.raises(ValueError, match="no forecast named 'b'; there are a"):
        forecast.score(ledger, "b", 3.0, when="")
    with pytest.raises(ValueError, match="must be positive and finite"):
        forecast.score(ledger, "a", float("nan"), when="")
    forecast.score(ledger, "a", 3.0, when="")
    with pytest.raises(ValueError, match="a score is never changed"):
        forecast.score(ledger, "a", 3.05, when="")


def test_a_forecast_names_law_data_and_interval(suite: RunTable) -> None:
    fit = LAW.fit(suite)
    runs = {
        name: {"width": 2048.0, "depth": 40.0, "tokens": tokens}
        for name, tokens in (("short", 3e11), ("long", 1e12))
    }
    short, long = forecast.written(fit, runs, law="parameters", draws=100, seed=0, when="now")
    assert short.low < short.loss_nats < short.high
    assert long.loss_nats < short.loss_nats
    assert short.data_sha256 == forecast.digest(suite)
    assert short.settings["delta"] == 1e-3
    other = suite.with_losses(suite.column("loss_nats") * 1.001)
    assert forecast.digest(other) != short.data_sha256
    with pytest.raises(ValueError, match=r"has \['width'\], others have"):
        forecast.planned({"a": runs["short"], "b": {"width": 1.0}}, suite)


def test_an_interval_grows_with_the_errors_of_runs(suite: RunTable, truth: PowerLaw) -> None:
    widths = []
    for run_sd in (0.002, 0.02):
        table = noisy(
            suite, truth, run_sd=run_sd, correlation=0.99, generator=np.random.default_rng(0)
        )
        (interval,) = forecast.foretell(
            LAW.fit(table),
            table.where(np.arange(len(table)) == 0),
            draws=200,
            generator=np.random.default_rng(1),
        )
        widths.append(interval.high - interval.low)
    assert widths[1] > 3 * widths[0]
    few = suite.where(np.isin(suite.run, sorted(set(suite.run))[:3]))
    with pytest.raises(ValueError, match="needs 5; add runs"):
        forecast.unseen_errors(dataclasses.replace(LAW.fit(suite), table=few))


def test_the_future_is_foretold_from_cheaper_runs_alone(suite: RunTable) -> None:
    outcomes = list(
        forecast.leave_future_out(suite, LAW, draws=60, generator=np.random.default_rng(0), first=9)
    )
    assert [outcome.runs for outcome in outcomes] == [9, 10, 11]
    costs = [outcome.cost for outcome in outcomes]
    assert costs == sorted(costs)
    names, index = suite.groups("run")
    last = suite.where(index == names.index(outcomes[-1].run))
    assert outcomes[-1].measured_nats == last.column("loss_nats")[-1]
    assert max(abs(outcome.error) for outcome in outcomes) < 0.05


@pytest.mark.slow
def test_intervals_of_nine_tenths_hold_nine_tenths_of_new_runs(
    suite: RunTable, truth: PowerLaw
) -> None:
    """Forty suites; each foretells a run of its own middle that it has not."""
    held = 0
    for number in range(40):
        generator = np.random.default_rng(number)
        table = noisy(suite, truth, run_sd=0.01, correlation=0.98, generator=generator)
        left_out = sorted(set(table.run))[number % 12]
        fit = LAW.fit(table.where(table.run != left_out))
        run = table.where(table.run == left_out)
        last = run.where(np.arange(len(run)) == len(run) - 1)
        (interval,) = forecast.foretell(fit, last, draws=200, generator=generator)
        held += interval.contains(float(last.column("loss_nats")[0]))
    assert 31 <= held <= 40


def test_the_committed_ledger_is_whole_and_came_before_its_runs() -> None:
    """Every forecast of our own suite was registered before the record that scores it began."""
    history = forecast.history(RESULTS / "forecasts" / "suite.jsonl")
    assert len(history.scored) + len(history.open) == 42
    fresh = RESULTS / "fresh.jsonl"
    if fresh.is_file():
        assert history.open == ()
        losses = {
            event.values["run"]: event.number("loss_nats")
            for event in read_record(fresh).of("point")
            if event.values["schedule"] == "constant"
        }
        for made, score in history.scored:
            assert made.registered < score.scored
            assert losses[made.name.partition(" by ")[0]] == score.measured_nats
