"""What people ask of their runs: is it identified, which law, how much faster, what next."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fourfold_gemstones import registry
from fourfold_gemstones.laws import PowerLaw
from fourfold_gemstones.parametric import ParametricLaw
from fourfold_gemstones.questions.comparison import Split, quantile_errors
from fourfold_gemstones.questions.identification import identify, said
from fourfold_gemstones.questions.rivals import contest, power, turned
from fourfold_gemstones.questions.simulate import noise_free, noisy
from fourfold_gemstones.questions.speedup import APART, SHARED, both, speed_up
from fourfold_gemstones.runs import RunTable

LAW = ParametricLaw(delta=1e-3)


def six(tokens: tuple[float, ...], truth: PowerLaw) -> RunTable:
    """Six sizes of one ladder, as people have them, evaluated at some token counts."""
    rows = [(size, count) for size in (26e6, 40e6, 104e6, 145e6, 2e8, 3e8) for count in tokens]
    table = RunTable.from_columns(
        {
            "run": [f"{size:g}" for size, _ in rows],
            "parameters": [size for size, _ in rows],
            "tokens": [count for _, count in rows],
            "loss_nats": [3.0] * len(rows),
        },
        source="six runs",
    )
    return noisy(table, truth, run_sd=0.003, correlation=0.9, generator=np.random.default_rng(0))


def test_one_token_count_is_not_identified_and_the_way_out_is_said(truth: PowerLaw) -> None:
    identification = identify(LAW, six((2e9,), truth), draws=40, generator=np.random.default_rng(0))
    assert not identification.identified
    first, second, *_ = said(identification)
    assert first == "NOT IDENTIFIED by these runs:"
    assert "tokens is 2e+09 in all rows" in second
    assert "a run at 5e+08 and one at 8e+09 would tell" in second


def test_a_narrow_ladder_says_so_before_any_number_and_names_a_run(truth: PowerLaw) -> None:
    identification = identify(
        LAW, six((1e9, 1.5e9, 2e9), truth), draws=60, generator=np.random.default_rng(0)
    )
    sentences = list(said(identification))
    assert sentences[0] == "NOT IDENTIFIED by these runs:"
    assert any("tokens varies by a factor of 2 only" in text for text in sentences)
    numbers = next(row for row, text in enumerate(sentences) if "exponent of tokens: " in text)
    assert numbers > sum("  " in text and "varies" in text for text in sentences)
    assert len(identification.next_runs) >= 3
    costs = [run.cost for run in identification.next_runs]
    assert costs == sorted(costs)
    assert max(run.shrinks for run in identification.next_runs) > 0.2


def test_a_suggested_run_narrows_what_it_says(truth: PowerLaw) -> None:
    """Done for real, the best suggestion narrows the exponent that was told worst."""
    table = six((1e9, 1.5e9, 2e9, 4e9), truth)
    before = identify(LAW, table, draws=60, generator=np.random.default_rng(0))
    best = max(before.next_runs, key=lambda run: run.shrinks)
    added = RunTable.from_columns(
        {"run": ["new"], "loss_nats": [3.0], **{k: [v] for k, v in best.inputs.items()}}
    )
    more = table.beside(noise_free(added, truth))
    after = identify(LAW, more, draws=60, generator=np.random.default_rng(0))
    widths = [
        next(
            told.interval.high - told.interval.low
            for told in asked.told
            if told.name == before.worst
        )
        for asked in (before, after)
    ]
    assert widths[1] < widths[0]


def test_runs_of_a_wide_design_are_identified(suite: RunTable, truth: PowerLaw) -> None:
    table = noisy(suite, truth, run_sd=0.001, correlation=0.9, generator=np.random.default_rng(0))
    identification = identify(LAW, table, draws=60, generator=np.random.default_rng(0))
    assert identification.identified, identification.reasons
    assert next(iter(said(identification))) == "these runs tell the law's exponents:"


def coupled(table: RunTable, gamma: float) -> RunTable:
    """Losses of Skaling's law; a coupling of one is Chinchilla's."""
    law = registry.law("skaling")
    form = law.form  # pyright: ignore[reportAttributeAccessIssue]
    from fourfold_gemstones.form import FormEstimate

    values = {**form.example, "gamma": gamma, "alpha": 0.3 / gamma, "beta": 0.35 / gamma}
    estimate = FormEstimate(
        form=form,
        values=tuple(values[name] for name in form.names),
        references=law.references(table),  # pyright: ignore[reportAttributeAccessIssue]
    )
    return table.with_losses(estimate.loss(law.inputs(table)))


def with_run_errors(table: RunTable, sd: float, seed: int) -> RunTable:
    names, index = table.groups("run")
    errors = np.random.default_rng(seed).normal(0, sd, len(names))[index]
    return table.with_losses(table.column("loss_nats") * np.exp(errors))


def test_a_law_is_refused_for_a_rival_that_is_true_and_kept_where_it_is(suite: RunTable) -> None:
    laws = LAW, dataclasses.replace(registry.law("skaling"), starts=8)
    p_values = []
    for gamma in (0.35, 1.0):
        table = with_run_errors(coupled(suite, gamma), 0.002, 3)
        test = contest(*laws, table, draws=39, generator=np.random.default_rng(0))
        p_values.append(test.p_value)
    assert p_values[0] <= 0.05 < p_values[1]
    with pytest.raises(ValueError, match="a test over runs needs 6; add runs"):
        contest(*laws, six((1e9,), coupled_truth()).where(np.arange(6) < 5), draws=9,
                generator=np.random.default_rng(0))  # fmt: skip


def coupled_truth() -> PowerLaw:
    return PowerLaw(
        variables=("parameters", "tokens"),
        log_coefficients=(5.0, 12.0),
        exponents=(0.27, 0.55),
        log_floor=0.65,
    )


def test_turned_errors_keep_their_size_and_turn_by_whole_runs(suite: RunTable) -> None:
    fit = LAW.fit(suite)
    errors = np.log(suite.column("loss_nats") / fit.predict(suite))
    made = turned(fit, suite, draws=16, generator=np.random.default_rng(0))
    apart = made - np.log(fit.predict(suite))
    assert np.abs(apart) == pytest.approx(np.tile(np.abs(errors), (16, 1)))
    names, index = suite.groups("run")
    for run in range(len(names)):
        signs = np.sign(apart[:, index == run] * errors[index == run])
        assert (signs == signs[:, :1]).all()


@pytest.mark.slow
def test_a_true_law_is_refused_one_time_in_twenty(suite: RunTable) -> None:
    """Sixty tables of the first law: refused in at most eight, at a level of .05."""
    laws = LAW, dataclasses.replace(registry.law("skaling"), starts=6)
    refused = 0
    for seed in range(60):
        table = with_run_errors(coupled(suite, 1.0), 0.005, seed)
        test = contest(*laws, table, draws=39, generator=np.random.default_rng(seed))
        refused += test.p_value <= 0.05
    assert refused <= 8


def test_power_is_high_for_a_strong_coupling_and_low_without_one(suite: RunTable) -> None:
    """And runs yet to be done are counted, with their cost."""
    laws = LAW, dataclasses.replace(registry.law("skaling"), starts=8)
    rows = np.arange(len(suite)) % 12 % 4 == 0
    errors = np.random.default_rng(1).normal(0, 0.01, len(suite))

    def table(gamma: float) -> RunTable:
        losses = coupled(suite, gamma).column("loss_nats") * np.exp(errors)
        return suite.with_losses(losses).where(rows)

    def chance(gamma: float, run_sd: float) -> float:
        generator = np.random.default_rng(0)
        return power(*laws, table(gamma), {}, run_sd=run_sd, draws=16, generator=generator).power

    assert chance(0.4, 0.001) > 0.9
    assert chance(1.0, 0.001) < 0.6
    more = {"far": {"parameters": 2e10, "tokens": 4e9, "width": 1.0, "depth": 1.0}}
    able = power(*laws, table(0.4), more, run_sd=0.01, draws=4, generator=np.random.default_rng(0))
    assert able.runs == 13
    assert able.cost == pytest.approx(6 * 2e10 * 4e9)
    with pytest.raises(ValueError, match="run_sd=0 must be positive"):
        power(*laws, table(0.4), {}, run_sd=0, draws=9, generator=np.random.default_rng(0))


def test_a_recipe_of_half_more_speed_is_found_with_its_interval(
    suite: RunTable, truth: PowerLaw
) -> None:
    clean = noise_free(suite, truth)
    faster = suite.with_losses(
        truth.loss(
            {"parameters": suite.column("parameters"), "tokens": 1.5 * suite.column("tokens")}
        )
    )
    first, second = with_run_errors(clean, 0.002, 1), with_run_errors(faster, 0.002, 2)
    for shared in (True, False):
        ratio = speed_up(first, second, shared=shared, draws=60, generator=np.random.default_rng(0))
        assert ratio.interval.contains(1.5), ratio
        assert not ratio.interval.contains(1.0)
        assert ratio.interval.high / ratio.interval.low < 1.3
        assert "the interval leaves 1 out" in str(ratio)
    same = speed_up(
        first, with_run_errors(clean, 0.002, 3), draws=60, generator=np.random.default_rng(0)
    )
    assert same.interval.contains(1.0)


def test_recipes_keep_their_runs_apart(suite: RunTable) -> None:
    table = both(suite, suite)
    assert len(set(table.run)) == 2 * len(set(suite.run))
    assert len(APART.names) == len(SHARED.names) + 2


def test_a_frontier_is_not_lifted_by_runs_that_were_tuned_badly(
    suite: RunTable, truth: PowerLaw
) -> None:
    """A third of the runs lie up to 5 % above; on tuned dear runs the frontier errs less than the middle."""
    names, index = suite.groups("run")
    generator = np.random.default_rng(5)
    worse = np.where(
        generator.random(len(names)) < 0.34, generator.uniform(0.01, 0.05, len(names)), 0
    )
    size = suite.column("parameters")
    held_out = size > np.quantile(size, 0.7)
    clean = noise_free(suite, truth)
    table = clean.with_losses(
        clean.column("loss_nats") * np.exp(np.where(held_out, 0.0, worse[index]))
    )
    limit = float(np.quantile(size, 0.7))
    split = Split(
        name="to larger sizes",
        fit=lambda runs: runs.column("parameters") <= limit,
        judge=lambda runs: runs.column("parameters") > limit,
    )
    errors = quantile_errors(LAW, table, split)
    assert errors[0.1] < errors[0.5]
    with pytest.raises(ValueError, match=r"quantile=0.9 must be above 0 and at most .5"):
        quantile_errors(LAW, table, split, (0.9,))
    with pytest.raises(ValueError, match=r"overestimate=0.5 must be at least 1"):
        dataclasses.replace(LAW, overestimate=0.5)


def test_the_quantile_of_an_overestimate_lies_below_that_share(suite: RunTable) -> None:
    table = with_run_errors(suite, 0.02, 9)
    fit = dataclasses.replace(LAW, delta=1e-5, overestimate=9.0).fit(table)
    below = float((table.column("loss_nats") < fit.predict(table)).mean())
    assert below == pytest.approx(0.1, abs=0.06)
