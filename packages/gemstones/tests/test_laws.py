"""Equations that the laws and their fits must satisfy on any data."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest

from fourfold_gemstones import minimise
from fourfold_gemstones.architecture import GEMSTONES, Architecture, Embeddings
from fourfold_gemstones.envelope import Bins, EnvelopeLaw, IsoFlopLaw, frontier
from fourfold_gemstones.laws import SHAPE_ONLY, WIDTH_DEPTH, PowerLaw
from fourfold_gemstones.parametric import LawWarning, ParametricLaw
from fourfold_gemstones.questions.simulate import noise_free
from fourfold_gemstones.runs import RunTable

EXACT = 1e-6
"""Noise-free fits; what is left is the flatness of the valley in double precision."""
INVARIANT = 1e-7
"""Two routes to one optimum differ by the rounding of their inputs."""


def test_parameters_and_flops_of_published_shapes() -> None:
    """Counts of four shapes as the reference prints them; 384 has an odd number of heads."""
    width = np.asarray([256.0, 384.0, 768.0, 3072.0])
    depth = np.asarray([23.0, 13.0, 3.0, 12.0])
    assert GEMSTONES.parameters(width, depth).tolist() == [
        48_377_600,
        66_758_784,
        103_814_400,
        2_007_837_696,
    ]
    assert GEMSTONES.flops_per_token(width, depth).tolist() == [
        341_618_496,
        397_535_904,
        441_425_088,
        11_925_116_928,
    ]


def test_conventions_of_embeddings_differ_by_tables() -> None:
    width, depth = np.asarray([512.0]), np.asarray([12.0])
    both, single, none = (GEMSTONES.parameters(width, depth, kind) for kind in Embeddings)
    table = GEMSTONES.vocabulary * width
    assert both - single == table
    assert single - none == table
    assert none == replace(GEMSTONES, vocabulary=0).parameters(width, depth)


@pytest.mark.parametrize("delta", [1e-1, 1e-3, 1e-4])
def test_a_law_is_recovered_from_its_own_losses(
    suite: RunTable, truth: PowerLaw, delta: float
) -> None:
    fit = ParametricLaw(delta=delta).fit(noise_free(suite, truth))
    assert fit.estimate.vector() == pytest.approx(truth.vector(), rel=EXACT)
    assert fit.score(fit.table) == pytest.approx(1.0)


def test_a_law_in_width_and_depth_is_recovered(suite: RunTable) -> None:
    truth = PowerLaw(
        variables=WIDTH_DEPTH,
        log_coefficients=(1.1, -0.2, 6.2, 11.5),
        exponents=(0.21, 0.48, 0.37, 0.54),
        log_floor=0.4,
    )
    fit = ParametricLaw(variables=WIDTH_DEPTH).fit(noise_free(suite, truth))
    # Four terms of which one is nearly a product of two others: the loss is recovered sooner.
    assert fit.predict(suite) == pytest.approx(truth.loss(fit.law.inputs(suite)), rel=EXACT)


def test_the_optimum_is_stationary_under_its_budget(truth: PowerLaw) -> None:
    """No other split of 6 N T = C has a lower loss, and N* grows as C to the slope."""
    for flops in (1e18, 1e21, 1e24):
        parameters, tokens = truth.optimum(flops)
        assert 6 * parameters * tokens == pytest.approx(flops)
        factor = np.exp(np.linspace(-3, 3, 601))
        inputs = {"parameters": parameters * factor, "tokens": tokens / factor}
        assert np.argmin(truth.loss(inputs)) == 300
    growth = np.log(truth.optimum(1e24)[0] / truth.optimum(1e21)[0]) / np.log(1e3)
    assert growth == pytest.approx(truth.slope)


def test_units_move_coefficients_only(suite: RunTable) -> None:
    """Counting tokens in pairs changes no exponent, no floor, no prediction, no objective."""
    law = ParametricLaw()
    columns = {**suite.columns, "tokens": suite.column("tokens") / 2}
    paired = RunTable.from_columns({"run": suite.run, **columns}, architecture=GEMSTONES)
    plain, other = law.fit(suite), law.fit(paired)
    assert other.objective == pytest.approx(plain.objective, rel=INVARIANT)
    assert other.estimate.exponents == pytest.approx(plain.estimate.exponents, rel=1e-4)
    assert other.predict(paired) == pytest.approx(plain.predict(suite), rel=1e-5)


def test_repeated_rows_double_the_objective(suite: RunTable) -> None:
    law = ParametricLaw()
    twice = RunTable.from_columns(
        {
            "run": [*suite.run, *(f"{name} again" for name in suite.run)],
            **{name: np.tile(values, 2) for name, values in suite.columns.items()},
        }
    )
    objective = law.fit(suite).objective
    assert law.fit(twice).objective == pytest.approx(2 * objective, rel=INVARIANT)


def test_every_start_agrees_and_no_slope_is_left(suite: RunTable) -> None:
    certificate = ParametricLaw().fit(suite).certificate
    assert certificate.agreeing == certificate.starts
    assert certificate.basins == (0.0,)
    assert certificate.relative_gradient < 1e-5
    assert certificate.isolated


def vanishing_floor() -> RunTable:
    """Thirteen shapes whose losses have no floor, so that descents creep along one that vanishes."""
    generator = np.random.default_rng(1)
    shapes = [(256, 23), (256, 80), (384, 13), (512, 11), (512, 49), (768, 3), (768, 45)]
    shapes += [(1024, 28), (1280, 15), (1280, 36), (1792, 7), (2048, 27), (3072, 12)]
    tokens = np.tile(np.geomspace(5e9, 3.5e11, 8), len(shapes))
    width, depth = (np.repeat(np.asarray(sizes, float), 8) for sizes in zip(*shapes, strict=True))
    law = PowerLaw(
        variables=SHAPE_ONLY,
        log_coefficients=(2.15, 0.8, 10.17),
        exponents=(0.267, 0.131, 0.482),
        log_floor=-30.0,
    )
    loss = law.loss({"width": width, "depth": depth, "tokens": tokens})
    noise = np.repeat(generator.normal(0, 0.01, len(shapes)), 8)
    noise += generator.standard_t(3, len(tokens)) * 2e-3
    return RunTable.from_columns(
        {
            "run": [f"{w:g}x{d:g}" for w, d in zip(width, depth, strict=True)],
            "width": width,
            "depth": depth,
            "tokens": tokens,
            "loss_nats": loss * np.exp(noise),
        }
    )


@pytest.mark.filterwarnings("ignore:at its bound")
def test_the_best_descent_goes_on_until_it_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """However early the descents give up, the certified one ends where the patient ones do."""
    law = ParametricLaw(variables=SHAPE_ONLY, delta=1e-3)
    patient = law.fit(vanishing_floor())
    monkeypatch.setattr(minimise, "PATIENCE", 1)
    hasty = law.fit(vanishing_floor())
    for fit in (patient, hasty):
        assert fit.certificate.rests
        assert fit.certificate.at_bound == ("floor",)
        assert not fit.certificate.isolated
    assert hasty.objective == pytest.approx(patient.objective, rel=1e-10)


def test_no_certificate_where_a_slope_is_left(suite: RunTable) -> None:
    certificate = ParametricLaw().fit(suite).certificate
    assert not replace(certificate, relative_gradient=7.8e-3).isolated


@pytest.mark.filterwarnings("ignore:at its bound")
@pytest.mark.filterwarnings("ignore:.* losses lie below")
def test_a_law_that_explains_nothing_says_so(suite: RunTable) -> None:
    """A table that mixes two losses, in nats of one text and of another, is no table of one law."""
    mixed = suite.with_losses(suite.column("loss_nats") * np.tile([1.0, 3.0], len(suite) // 2))
    with pytest.warns(LawWarning, match=r"next to nothing of .*: R² -?0\.\d\d, and -?\d% of"):
        ParametricLaw().fit(mixed)


def test_the_envelope_ignores_points_above_it(suite: RunTable) -> None:
    """Raising the loss of any point off the frontier leaves the frontier as it was."""
    law = EnvelopeLaw()
    fit = law.fit(suite)
    off = ~np.isin(np.arange(len(suite)), fit.rows)
    loss = suite.column("loss_nats").copy()
    loss[off] *= 1.05
    raised = law.fit(suite.with_losses(loss))
    assert raised.rows.tolist() == fit.rows.tolist()
    assert raised.estimate == fit.estimate


def test_the_hull_lies_below_all_points(suite: RunTable) -> None:
    resource, loss = suite.flops(), suite.column("loss_nats")
    rows = frontier(resource, loss, EnvelopeLaw().method)
    u, v = np.log(resource), np.log(loss)
    below = np.interp(u, u[rows], v[rows])
    inside = (u >= u[rows[0]]) & (u <= u[rows[-1]])
    assert (v[inside] >= below[inside] - 1e-12).all()
    assert (np.diff(loss[rows]) < 0).all()


def test_bins_keep_the_best_point_of_each() -> None:
    resource = np.asarray([1.0, 1.5, 9.0, 10.0, 90.0, 100.0])
    loss = np.asarray([3.0, 2.9, 2.5, 2.6, 2.2, 2.1])
    assert frontier(resource, loss, Bins(count=2)).tolist() == [2, 5]


def test_parabolas_find_the_slope_of_noise_free_data_of_dense_sizes() -> None:
    """With many sizes at equal aspect, approach 2 and the law agree on the slope."""
    truth = PowerLaw(
        variables=("parameters", "tokens"),
        log_coefficients=(6.0, 7.5),
        exponents=(0.34, 0.34),
        log_floor=0.55,
    )
    sizes = np.geomspace(1e7, 1e11, 60)
    tokens = np.geomspace(1e8, 1e13, 80)
    parameters, count = (axis.ravel() for axis in np.meshgrid(sizes, tokens, indexing="ij"))
    table = RunTable.from_columns(
        {
            "run": np.repeat(np.arange(60), 80),
            "parameters": parameters,
            "tokens": count,
            "flops": 6 * parameters * count,
            "loss_nats": truth.loss({"parameters": parameters, "tokens": count}),
        }
    )
    fit = IsoFlopLaw(budgets=tuple(np.geomspace(1e19, 1e23, 9))).fit(table)
    # A parabola over a wide range of N is biased (Czech et al. 2026); symmetric exponents spare it.
    assert fit.estimate.slope == pytest.approx(truth.slope, abs=0.02)


def test_a_width_law_needs_widths(suite: RunTable) -> None:
    narrow = suite.where(suite.column("width") == 512)
    with pytest.raises(ValueError, match="width is 512 in all 24 rows"):
        ParametricLaw(variables=SHAPE_ONLY).fit(narrow)


def test_a_law_needs_more_models_than_it_has_terms(suite: RunTable) -> None:
    few = suite.where(np.isin(suite.run, ["256x8", "512x24", "3072x12", "768x4"]))
    with pytest.raises(ValueError, match="4 distinct models"):
        ParametricLaw(variables=WIDTH_DEPTH).fit(few)
    with pytest.raises(ValueError, match="4 rows"):
        ParametricLaw().fit(few.where(few.column("tokens") < 6e9))


def test_a_variable_that_is_a_power_of_another_is_refused(suite: RunTable) -> None:
    columns = {**suite.columns, "depth": suite.column("width") ** 2}
    tied = RunTable.from_columns({"run": suite.run, **columns})
    with pytest.raises(ValueError, match="is a power of the others"):
        ParametricLaw(variables=SHAPE_ONLY).fit(tied)


def test_losses_below_the_floor_are_named(suite: RunTable) -> None:
    loss = suite.column("loss_nats").copy()
    loss[5] = 0.5
    with pytest.warns(LawWarning, match=r"rows \[5\] of synthetic"):
        ParametricLaw().fit(suite.with_losses(loss))


def test_a_law_without_a_floor_says_so() -> None:
    """Losses that fall to nothing have no floor: the parameter is reported at its bound."""
    truth = PowerLaw(
        variables=("parameters", "tokens"),
        log_coefficients=(3.0, 6.0),
        exponents=(0.2, 0.3),
        log_floor=-40.0,
    )
    grid = np.meshgrid(np.geomspace(1e6, 1e10, 8), np.geomspace(1e8, 1e12, 8))
    parameters, tokens = (axis.ravel() for axis in grid)
    table = RunTable.from_columns(
        {
            "parameters": parameters,
            "tokens": tokens,
            "loss_nats": truth.loss({"parameters": parameters, "tokens": tokens}),
        }
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LawWarning)
        fit = ParametricLaw().fit(table)
    assert np.exp(fit.estimate.log_floor) < 1e-3
    assert fit.estimate.exponents == pytest.approx(truth.exponents, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delta": 0.0}, "delta=0.0 is outside"),
        ({"variables": ()}, "at least one variable"),
        ({"variables": ("tokens", "tokens")}, "each once"),
        ({"starts": 0}, "starts=0 must be at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParametricLaw(**settings)


def test_a_model_of_one_head_shares_it_with_nobody() -> None:
    tiny = Architecture(vocabulary=256, context=128, head_width=16)
    width, depth = np.asarray([16.0, 32.0, 48.0, 64.0]), np.full(4, 2.0)
    assert tiny.key_value_width(width, depth).tolist() == [16, 16, 16, 32]
