"""The suite that every law of the registry is run through; a law is added to it by standing there."""

from __future__ import annotations

import dataclasses
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fourfold_gemstones import registry
from fourfold_gemstones.architecture import GEMSTONES
from fourfold_gemstones.form import UNITS, FormEstimate, FormLaw
from fourfold_gemstones.parametric import ParametricLaw
from fourfold_gemstones.questions.simulate import SAMPLE
from fourfold_gemstones.runs import RunTable

SAME = 1e-6
"""Two routes to one optimum differ by the rounding of their inputs."""
EXACT = 1e-7
"""Losses of a noise-free law, found again."""
RUNS = 24


def design(**factors: float) -> RunTable:
    """Runs that vary in everything that a law of the registry reads, two checkpoints each."""
    generator = np.random.default_rng(0)
    rows = []
    for run in range(RUNS):
        size, tokens = 10 ** generator.uniform(7.3, 9.3), 10 ** generator.uniform(9, 10.8)
        width, depth = 256.0 * generator.integers(1, 9), float(generator.integers(4, 40))
        epochs, loops = 2.0 ** generator.integers(0, 6), 2.0 ** generator.integers(0, 4)
        share = generator.uniform(0.3, 0.8)
        rate = 1e-3 * (size / 1e8) ** -0.5 * np.exp(generator.normal())
        batch = 3e5 * np.exp(generator.normal())
        rows += [
            {
                "run": f"run {run:02d}",
                "width": width,
                "depth": depth,
                "parameters": size,
                "tokens": tokens * part,
                "unique_tokens": min(tokens / epochs, tokens * part),
                "loops": loops,
                "looped_parameters": size * share,
                "once_parameters": size * (1 - share),
                "learning_rate": rate,
                "batch_tokens": batch,
                "loss_nats": 3.0,
            }
            for part in (0.3, 1.0)
        ]
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in rows[0]}
    for name, factor in factors.items():
        columns[name] = [value * factor for value in columns[name]]
    return RunTable.from_columns(columns, architecture=GEMSTONES, source="the design")


def truth(name: str, table: RunTable) -> np.ndarray:
    """Losses of the law's own example, or of a power law near the published one."""
    law = registry.law(name)
    inputs = law.inputs(table)
    if isinstance(law, FormLaw):
        values = tuple(law.form.example[parameter] for parameter in law.form.names)
        return FormEstimate(form=law.form, values=values, references=law.references(table)).loss(
            inputs
        )
    terms = {"effective_parameters": "parameters"}
    at = [SAMPLE.variables.index(terms.get(v, v)) for v in law.variables]  # pyright: ignore[reportArgumentType]
    true = dataclasses.replace(
        SAMPLE,
        variables=law.variables,
        log_coefficients=tuple(SAMPLE.log_coefficients[j] for j in at),
        exponents=tuple(SAMPLE.exponents[j] for j in at),
    )
    return true.loss(inputs)


@cache
def fitted(name: str) -> Any:
    """The fit to noise-free losses."""
    table = design()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return few(name).fit(table.with_losses(truth(name, table)))


def few(name: str) -> ParametricLaw | FormLaw:
    """The law with fewer descents, which are enough here."""
    return dataclasses.replace(registry.law(name), starts=8)


@pytest.fixture(params=registry.names())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(
    params=[
        pytest.param(law, marks=pytest.mark.slow) if law == "farseer" else law
        for law in registry.names()
    ]
)
def quick(request: pytest.FixtureRequest) -> str:
    """Names of laws; Farseer's nine parameters take their minute once."""
    return request.param


def test_a_law_says_what_it_is(name: str) -> None:
    entry = registry.entry(name)
    assert entry.equation.startswith("L = ")
    assert entry.use.endswith(".")
    assert len(entry.source) > 10
    assert set(entry.law.variables) <= set(UNITS)
    if isinstance(entry.law, FormLaw):
        form = entry.law.form
        assert set(form.example) == set(form.names)
        for shape in form.shapes:
            low, high = shape.seeds
            assert shape.low <= low < high <= shape.high, shape.name
            assert shape.low <= form.example[shape.name] <= shape.high, shape.name


def test_the_gradient_is_that_of_finite_differences(name: str) -> None:
    """At the law's example, moved a little; the Hessian likewise, from gradients."""
    law = registry.law(name)
    table = design()
    problem = law.problem(table.with_losses(truth(name, table)))
    descent = problem.descent(np.ones((1, len(table))))
    generator = np.random.default_rng(1)
    if isinstance(law, FormLaw):
        centre = np.asarray([law.form.example[parameter] for parameter in law.form.names])
    else:
        centre = problem.seeds(1)[0]
    theta = (centre + generator.uniform(-0.02, 0.02, len(centre)))[None]
    gradient, hessian, scale = descent.derivatives(theta, 1.0)
    assert (scale > 0).all()
    for p, step in enumerate(1e-6 * np.eye(len(centre))):
        up, down = theta + step, theta - step
        slope = (descent.value(up, 1.0) - descent.value(down, 1.0)) / 2e-6
        assert gradient[0, p] == pytest.approx(slope[0], rel=1e-4, abs=1e-7)
        bend = (descent.derivatives(up, 1.0)[0] - descent.derivatives(down, 1.0)[0]) / 2e-6
        assert hessian[0, p] == pytest.approx(bend[0], rel=1e-4, abs=1e-5)


def test_noise_free_losses_are_found_again(quick: str) -> None:
    fit = fitted(quick)
    assert np.log(fit.predict(fit.table)) == pytest.approx(
        np.log(fit.table.column("loss_nats")), abs=EXACT
    )
    assert fit.certificate.rests
    assert fit.score(fit.table) > 1 - 1e-9


def test_units_do_not_matter(quick: str) -> None:
    """Sizes in thousands, tokens in millions, rates and batches in other units: the same predictions."""
    other = design(
        **dict.fromkeys(("parameters", "once_parameters", "looped_parameters"), 1e-1),
        **dict.fromkeys(("tokens", "unique_tokens"), 1e2),
        learning_rate=10.0,
        batch_tokens=0.1,
    )
    if quick in ("compute", "width-depth", "shape"):
        pytest.skip("counts FLOPs or blocks, whose unit is given")
    losses = truth(quick, design())
    assert truth(quick, other) == pytest.approx(losses, rel=1e-9) or not isinstance(
        registry.law(quick), FormLaw
    )
    again = few(quick).fit(other.with_losses(losses))
    assert again.predict(other) == pytest.approx(fitted(quick).predict(design()), rel=SAME)


def test_a_run_of_no_weight_is_left_out(quick: str) -> None:
    fit = fitted(quick)
    generator = np.random.default_rng(2)
    noise = np.repeat(generator.normal(0, 0.002, RUNS), 2)
    table = fit.table.with_losses(fit.table.column("loss_nats") * np.exp(noise))
    keep = table.run != "run 03"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = few(quick).fit(table)
    weights = np.stack([np.ones(len(table)), keep.astype(float)])
    same, without = few(quick).refits(whole, table, weights)
    objective = {True: whole.objective}
    for estimate, rows in ((same, np.ones(len(table), dtype=bool)), (without, keep)):
        part = table.where(rows)
        told = dataclasses.replace(whole, estimate=estimate).predict(part)
        residual = np.abs(np.log(part.column("loss_nats") / told))
        inner = np.minimum(residual, whole.law.delta)
        objective[bool(rows.all())] = float((inner * (residual - inner / 2)).sum())
    assert objective[True] == pytest.approx(whole.objective, rel=SAME)
    assert objective[False] < objective[True]


def test_other_losses_are_fitted_as_a_table_of_them_would_be(quick: str) -> None:
    """Losses of half the reducible part, in one batch with the losses themselves."""
    fit = fitted(quick)
    log_losses = np.log(fit.table.column("loss_nats"))
    both = np.stack([log_losses, log_losses + np.log(1.05)])
    same, more = few(quick).refits(fit, fit.table, np.ones_like(both), both)
    told = [
        dataclasses.replace(fit, estimate=estimate).predict(fit.table) for estimate in (same, more)
    ]
    assert np.log(told[0]) == pytest.approx(log_losses, abs=1e-6)
    assert np.log(told[1]) == pytest.approx(log_losses + np.log(1.05), abs=1e-5)


def test_what_does_not_vary_is_refused_by_name(name: str) -> None:
    law = registry.law(name)
    table = design()
    variable = next(v for v in law.variables if v != "effective_parameters")
    columns = {**table.columns, variable: np.full(len(table), 64.0 if variable == "width" else 1e9)}
    if variable == "tokens":
        pytest.skip("a run has one row at each token count")
    flat = dataclasses.replace(table, columns=columns)
    with pytest.raises(ValueError, match=f"{variable} is .* in all|is a power of the others"):
        law.fit(flat)


def test_a_law_of_ones_own_is_one_file(tmp_path: Path) -> None:
    """A file by its path is a law like the others; one that holds none is refused with the way out."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from fourfold_gemstones.parametric import ParametricLaw\n"
        "from fourfold_gemstones.registry import Entry\n"
        'ENTRY = Entry(law=ParametricLaw(variables=("width", "tokens"), delta=1e-3),\n'
        '    equation="L = E + A w^-a + B T^-b", source="of our own", use="A law in width.")\n'
    )
    law = registry.law(str(path))
    assert law.variables == ("width", "tokens")
    path.write_text("ENTRY = 3\n")
    with pytest.raises(ValueError, match="holds no ENTRY"):
        registry.entry.__wrapped__(str(path))
    with pytest.raises(ValueError, match="no law 'cubic'; there are compute"):
        registry.law("cubic")


def test_muennighoffs_law_is_chinchillas_in_one_epoch_and_saturates() -> None:
    """Tokens of a first epoch count in full, and never for more than U (1 + R*)."""
    from fourfold_gemstones.registry.repeated import _worth

    unique = torch.zeros(1, dtype=torch.float64)
    once, many = (
        _worth(unique, torch.tensor([repeats], dtype=torch.float64), torch.tensor(15.4))
        for repeats in (0.0, 1e6)
    )
    assert once.item() == 0
    assert many.exp().item() == pytest.approx(16.4, rel=1e-3)
    third = _worth(unique, torch.tensor([3.0], dtype=torch.float64), torch.tensor(15.4))
    assert third.exp().item() == pytest.approx(1 + 15.4 * (1 - np.exp(-3 / 15.4)), rel=1e-6)


def test_skaling_holds_chinchillas_law_and_softq_its_maximum() -> None:
    """With a coupling of one the two terms add; with a large order the larger remains."""
    from fourfold_gemstones.registry import skaling, softq

    logs = {"parameters": torch.tensor([0.3]), "tokens": torch.tensor([-0.2])}
    shapes = {"alpha": 0.5, "beta": 0.4, "gamma": 1.0, "log_ratio": 0.1}
    (told,) = skaling._log_terms(shapes, logs, {})
    assert told.exp().item() == pytest.approx(np.exp(-0.15) + np.exp(0.1 + 0.08), rel=1e-6)
    logs = {"parameters": torch.tensor([0.3]), "unique_tokens": torch.tensor([-0.2])}
    shapes = {"alpha": 0.5, "beta": 0.4, "log_q": torch.tensor(6.0), "log_ratio": 0.1}
    (told,) = softq._log_terms(shapes, logs, {})
    assert told.item() == pytest.approx(max(-0.15, 0.18), abs=1e-3)
