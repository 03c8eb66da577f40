"""What prescriptions must satisfy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fourfold_gemstones.architecture import GEMSTONES
from fourfold_gemstones.laws import CHINCHILLA, WIDTH_DEPTH, PowerLaw
from fourfold_gemstones.parametric import LawWarning, ParametricFit, ParametricLaw
from fourfold_gemstones.questions.allocation import (
    Aspect,
    Band,
    Compute,
    Cost,
    DeviceHours,
    Free,
    Lattice,
    MeasuredThroughput,
    Planner,
    Shapes,
    SixNT,
    allocate,
    doubts_of_shape,
)
from fourfold_gemstones.questions.comparison import Split, compare, corrected_aic, mean_error
from fourfold_gemstones.questions.next_run import suggest_next
from fourfold_gemstones.questions.simulate import sample
from fourfold_gemstones.runs import RunTable
from fourfold_gemstones.uncertainty import Interval, bootstrap

SHAPED = PowerLaw(
    variables=WIDTH_DEPTH,
    log_coefficients=(1.082, -0.2187, 6.0902, 10.472),
    exponents=(0.2196, 0.4759, 0.3636, 0.4935),
    log_floor=0.4282,
)


COMPUTE, FREE = Compute(), Free()


def planner(cost: Cost = COMPUTE, shapes: Shapes = FREE) -> Planner:
    return Planner(architecture=GEMSTONES, cost=cost, shapes=shapes)


def test_the_search_finds_the_closed_form(truth: PowerLaw) -> None:
    """A law in N and T under 6 N T has an optimum in closed form."""
    for budget in (1e19, 1e21, 1e23):
        best = planner(SixNT(), Aspect(ratio=40.0)).allocate(truth, budget)
        parameters, tokens = truth.optimum(budget)
        assert best.parameters == pytest.approx(parameters, rel=1e-3)
        assert best.tokens == pytest.approx(tokens, rel=1e-3)
        assert not best.at_edge


def test_the_budget_is_spent() -> None:
    best = planner().allocate(SHAPED, 1e21)
    spent = best.tokens * GEMSTONES.flops_per_token(
        np.asarray([best.width]), np.asarray([best.depth])
    )
    assert spent == pytest.approx(1e21)


def test_no_neighbour_is_better() -> None:
    plan = planner()
    best = plan.allocate(SHAPED, 1e21)
    for factor in (0.97, 1.03):
        for width, depth in ((best.width * factor, best.depth), (best.width, best.depth * factor)):
            other = plan._at(SHAPED, 1e21, width, depth, at_edge=False)
            assert other.loss_nats > best.loss_nats


def test_a_shape_that_can_be_built_costs_a_little() -> None:
    free = planner().allocate(SHAPED, 1e21)
    built = planner(shapes=Lattice(head_width=128, heads_multiple=4)).allocate(SHAPED, 1e21)
    assert built.width % 512 == 0
    assert built.depth == round(built.depth)
    assert free.loss_nats <= built.loss_nats < free.loss_nats + 0.01


def test_near_optimal_shapes_are_within_their_promise() -> None:
    plan = planner(shapes=Lattice())
    near = plan.near(SHAPED, 1e20, within_nats=0.003)
    assert len(near) > 3
    assert near[-1].loss_nats <= near[0].loss_nats + 0.003
    assert [plan.loss_nats for plan in near] == sorted(plan.loss_nats for plan in near)


def test_overtraining_costs_and_its_ratio_is_as_asked() -> None:
    plan = planner()
    best = plan.allocate(SHAPED, 1e22)
    some = plan.overtrained(SHAPED, 1e22, [1 / 16, 1 / 4, 1.0, 4.0, 16.0])
    loss = [plan.loss_nats - best.loss_nats for plan in some]
    # The dossier's published law: .061 .014 .0 .012 .048.
    assert loss == pytest.approx([0.061, 0.014, 0.0, 0.012, 0.048], abs=1.5e-3)
    assert [plan.tokens / best.tokens for plan in some] == pytest.approx([1 / 4, 1 / 2, 1, 2, 4])


def test_an_aspect_is_kept_when_overtraining(truth: PowerLaw) -> None:
    plan = planner(SixNT(), Aspect(ratio=40.0))
    (twice,) = plan.overtrained(truth, 1e21, [4.0])
    assert twice.aspect == pytest.approx(40, rel=1e-2)
    assert twice.tokens_per_parameter == pytest.approx(
        4 * plan.allocate(truth, 1e21).tokens_per_parameter, rel=1e-2
    )


def test_time_prefers_wider_shapes_where_width_is_faster() -> None:
    def faster_when_wide(width: np.ndarray, depth: np.ndarray) -> np.ndarray:
        return 1e13 * width**0.4 / GEMSTONES.flops_per_token(width, depth)

    by_time = planner(DeviceHours(throughput=faster_when_wide)).allocate(SHAPED, 1e4)
    hours = by_time.tokens * GEMSTONES.flops_per_token(
        np.asarray([by_time.width]), np.asarray([by_time.depth])
    )
    by_flops = planner().allocate(SHAPED, float(hours[0]))
    assert by_time.aspect > by_flops.aspect


def test_measured_throughput_is_recovered(suite: RunTable) -> None:
    width, depth = suite.column("width"), suite.column("depth")
    rate = 2e13 * width**0.3 / depth**0.1
    timed = RunTable.from_columns(
        {"run": suite.run, **suite.columns, "gpu_hours": suite.flops() / rate / 3600},
        architecture=GEMSTONES,
    )
    throughput = MeasuredThroughput.of(timed)
    assert (throughput.width_exponent, throughput.depth_exponent) == pytest.approx((0.3, -0.1))
    assert throughput.residual_sd == pytest.approx(0, abs=1e-9)
    assert throughput(width, depth) == pytest.approx(
        rate / (suite.flops() / suite.column("tokens"))
    )


def test_a_blind_law_chooses_no_shape(truth: PowerLaw) -> None:
    with pytest.raises(ValueError, match="cannot tell shapes of one size apart"):
        planner().allocate(truth, 1e20)
    with pytest.raises(ValueError, match="budget=-1"):
        planner().allocate(SHAPED, -1.0)


def test_bands_hold_the_best_and_warn_when_far(suite: RunTable) -> None:
    fit = ParametricLaw(delta=1e-3).fit(suite)
    draws = bootstrap(fit, draws=60, generator=np.random.default_rng(0))
    plan = planner(Compute(), Aspect(ratio=40.0))
    band = allocate(fit, draws, plan, 1e21)
    assert band.parameters.contains(band.best.parameters)
    assert band.share_at_edge == 0
    with pytest.warns(LawWarning, match="times that of the largest run"):
        far = allocate(fit, draws, plan, 1e26)
    assert far.parameters.high / far.parameters.low > band.parameters.high / band.parameters.low


def test_a_suggested_run_teaches_more_the_less_it_errs(suite: RunTable) -> None:
    fit = ParametricLaw(delta=1e-3).fit(suite)
    draws = bootstrap(fit, draws=80, generator=np.random.default_rng(0))
    plan = planner(Compute(), Aspect(ratio=40.0))

    def wanted(law: PowerLaw) -> float:
        return float(np.log(law.optimum(1e22)[0]))

    exact, noisy = (
        suggest_next(fit, draws, plan, wanted, 1e22, run_sd=sd)[0] for sd in (1e-4, 1e-2)
    )
    assert exact.sd_after <= noisy.sd_after < noisy.sd_before
    assert 0 < noisy.shrinks < 1


def test_the_true_form_extrapolates_better(suite: RunTable) -> None:
    """On losses of a law in N and T, that law beats one in width, depth and T out of sample."""
    split = Split(
        name="small to large",
        fit=lambda table: table.column("parameters") < 6e8,
        judge=lambda table: table.column("parameters") > 9e8,
    )
    right, wrong = ParametricLaw(delta=1e-3), ParametricLaw(variables=("tokens", "width"))
    comparison = compare(right, wrong, suite, [split], draws=30, generator=np.random.default_rng(0))
    assert comparison.wins == 1
    assert comparison.corrected_aic[0] < comparison.corrected_aic[1]
    assert comparison.errors["small to large"][0] == mean_error(right, suite, split)
    assert corrected_aic(right.fit(suite)) == comparison.corrected_aic[0]


def test_a_split_that_overlaps_is_refused(suite: RunTable) -> None:
    everything = Split(
        name="all",
        fit=lambda table: table.column("tokens") > 0,
        judge=lambda table: table.column("tokens") > 0,
    )
    with pytest.raises(ValueError, match="'all' of synthetic suite"):
        mean_error(ParametricLaw(variables=CHINCHILLA), suite, everything)


@pytest.fixture(scope="module")
def told() -> tuple[ParametricFit, Band]:
    """A fit and a band whose shape may be read."""
    fit = ParametricLaw(variables=WIDTH_DEPTH, delta=1e-3).fit(sample())
    draws = bootstrap(fit, draws=40, generator=np.random.default_rng(0))
    return fit, allocate(fit, draws, planner(), 1e21)


def test_a_shape_that_the_runs_tell_raises_no_doubt(told: tuple[ParametricFit, Band]) -> None:
    assert doubts_of_shape(*told) == ()


@pytest.mark.parametrize(
    ("certificate", "band", "doubt"),
    [
        ({"agreeing": 2}, {}, "only 2 of"),
        ({"relative_gradient": 7.8e-3}, {}, "does not rest: its relative gradient is 7.8e-03"),
        ({"at_bound": ("floor", "exponent of depth")}, {}, "at its bound: exponent of depth"),
        ({}, {"share_at_edge": 0.06}, "edge of the shapes searched in 6% of the draws"),
        ({}, {"aspect": Interval(low=9.9, high=100.0, level=0.95)}, "9.9 to 100, spans more than"),
    ],
)
def test_each_doubt_is_enough(
    told: tuple[ParametricFit, Band], certificate: dict, band: dict, doubt: str
) -> None:
    fit = replace(told[0], certificate=replace(told[0].certificate, **certificate))
    [reason] = doubts_of_shape(fit, replace(told[1], **band))
    assert doubt in reason


def test_an_optimum_at_the_edge_is_doubted(told: tuple[ParametricFit, Band]) -> None:
    fit, band = told
    [reason] = doubts_of_shape(fit, replace(band, best=replace(band.best, at_edge=True)))
    assert "and in the fit" in reason


def test_terms_without_shape_may_vanish(told: tuple[ParametricFit, Band]) -> None:
    fit, band = told
    certificate = replace(fit.certificate, at_bound=("floor", "exponent of parameters"))
    assert doubts_of_shape(replace(fit, certificate=certificate), band) == ()
