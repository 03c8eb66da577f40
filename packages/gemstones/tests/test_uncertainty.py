"""What bootstraps, profiles and simulations must satisfy."""

from __future__ import annotations

import numpy as np
import pytest

from fourfold_gemstones.envelope import EnvelopeLaw
from fourfold_gemstones.laws import PowerLaw
from fourfold_gemstones.parametric import LawWarning, ParametricLaw
from fourfold_gemstones.published import published_frame
from fourfold_gemstones.questions.profiles import profile
from fourfold_gemstones.questions.simulate import coverage, design_null, noise_free
from fourfold_gemstones.runs import RunTable
from fourfold_gemstones.uncertainty import (
    bootstrap,
    difference,
    group_counts,
    leave_one_out,
    paired_bootstrap,
    percentile_interval,
    shared_groups,
    slope,
)


def test_counts_keep_the_number_of_groups() -> None:
    counts = group_counts(7, 50, np.random.default_rng(0))
    assert (counts.sum(axis=1) == 7).all()


def test_a_difference_with_itself_is_zero(suite: RunTable) -> None:
    fit = ParametricLaw().fit(suite)
    draws = paired_bootstrap([fit, fit], draws=40, generator=np.random.default_rng(0))
    same = difference((fit, fit), (draws[0], draws[1]), slope)
    assert same.estimate == 0
    assert (same.interval.low, same.interval.high) == (0, 0)
    assert not same.excludes_zero


def test_pairing_needs_the_same_groups(suite: RunTable) -> None:
    fewer = suite.where(suite.run != "512x6")
    fits = ParametricLaw().fit(suite), ParametricLaw().fit(fewer)
    with pytest.raises(ValueError, match=r"differ in the groups \['512x6'\]"):
        paired_bootstrap(fits, draws=30, generator=np.random.default_rng(0))
    shared = shared_groups([suite, fewer])
    assert [len(table) for table in shared] == [len(fewer)] * 2


def test_runs_are_surer_to_differ_than_rows(suite: RunTable) -> None:
    """Where the error belongs to runs, drawing rows understates it."""
    fit = ParametricLaw(delta=1e-3).fit(suite)
    widths = {}
    for groups in ("run", "row"):
        draws = bootstrap(fit, draws=200, generator=np.random.default_rng(0), groups=groups)
        interval = draws.interval(slope)
        widths[groups] = interval.high - interval.low
    assert widths["run"] > 1.5 * widths["row"]


def test_leaving_a_run_out_is_fitting_without_it(suite: RunTable) -> None:
    fit = ParametricLaw().fit(suite)
    left = leave_one_out(fit, slope)
    without = ParametricLaw().fit(suite.where(suite.run != "768x4")).estimate.slope
    assert left["768x4"] == pytest.approx(without, abs=1e-6)
    assert len(left) == 12


def test_the_profile_bounds_the_objective_from_below(suite: RunTable) -> None:
    """No parameters with that slope have a lower objective than the profile says."""
    fit = ParametricLaw(delta=1e-2).fit(suite)
    draws = bootstrap(fit, draws=100, generator=np.random.default_rng(0))
    curve = profile(fit, slope, draws, points=9)
    assert curve.interval.low < fit.estimate.slope < curve.interval.high
    assert curve.excess.argmin() == np.abs(curve.values - fit.estimate.slope).argmin()
    left, right = np.split(curve.excess, [int(curve.excess.argmin())])
    assert (np.diff(left) < 0).all()
    assert (np.diff(right) > 0).all()
    by_draws = draws.interval(slope)
    assert curve.interval.low == pytest.approx(by_draws.low, abs=0.05)
    assert curve.interval.high == pytest.approx(by_draws.high, abs=0.05)


def test_few_groups_are_warned_about(suite: RunTable) -> None:
    few = suite.where(np.isin(suite.run, sorted(set(suite.run))[:6]))
    with pytest.warns(LawWarning, match="6 groups"):
        bootstrap(ParametricLaw().fit(few), draws=30, generator=np.random.default_rng(0))


def test_an_interval_needs_draws() -> None:
    with pytest.raises(ValueError, match="5 of 30 draws"):
        percentile_interval(np.r_[np.arange(5.0), np.full(25, np.nan)], 0.95)


def test_the_law_has_no_bias_on_its_own_design(suite: RunTable, truth: PowerLaw) -> None:
    (null,) = design_null(suite, ParametricLaw(), (truth,))
    assert null.bias == pytest.approx(0, abs=1e-6)


def test_equal_tokens_make_a_hull_blind_to_the_law(suite: RunTable, truth: PowerLaw) -> None:
    """At one token count FLOPs follow N, so that any law gives the hull the same line."""
    last = suite.where(suite.column("tokens") > 2.9e11)
    law = EnvelopeLaw(resource="flops_6nt")
    steep = PowerLaw(
        variables=truth.variables,
        log_coefficients=(6.0, 8.0),
        exponents=(0.5, 0.3),
        log_floor=0.1,
    )
    slopes = [bias.estimated_slope for bias in design_null(last, law, (truth, steep))]
    assert slopes == pytest.approx([1.0, 1.0], abs=1e-9)
    assert abs(truth.slope - steep.slope) > 0.2


def test_noise_free_losses_are_the_laws(suite: RunTable, truth: PowerLaw) -> None:
    clean = noise_free(suite, truth)
    inputs = {"parameters": suite.column("parameters"), "tokens": suite.column("tokens")}
    assert clean.column("loss_nats").tolist() == truth.loss(inputs).tolist()


@pytest.mark.slow
def test_intervals_over_runs_cover_and_over_rows_do_not() -> None:
    """Forty simulated suites with errors that persist along a run (AR .95), nominal 95 %."""
    table = published_frame("hot_100b+")
    truth = ParametricLaw().fit(table).estimate
    runs, rows = coverage(
        table,
        ParametricLaw(delta=1e-3, starts=4),
        truth,
        suites=40,
        draws=200,
        run_sd=0.01,
        correlation=0.95,
        groups=("run", "row"),
        seed=0,
    )
    assert 0.9 <= runs.share <= 0.99
    assert rows.share < 0.7
