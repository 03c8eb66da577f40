"""Laws that every estimator of the paper's three approaches must satisfy; others: `test_registry.py`."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pytest

from fourfold_gemstones import registry
from fourfold_gemstones.architecture import GEMSTONES
from fourfold_gemstones.envelope import Bins, EnvelopeLaw, IsoFlopLaw
from fourfold_gemstones.questions.simulate import sample
from fourfold_gemstones.runs import RunTable
from fourfold_gemstones.uncertainty import Fit, Law, bootstrap

SAME = 1e-6
"""Two routes to one optimum differ by the rounding of their inputs."""
TABLE = sample()
FORMS: dict[str, Law] = {
    **{name: registry.law(name) for name in ("parameters", "compute", "width-depth", "shape")},
    "hull": EnvelopeLaw(),
    "bins": EnvelopeLaw(method=Bins(count=20), target="tokens"),
    "parabolas": IsoFlopLaw(budgets=(1e19, 2e19, 4e19, 8e19)),
}
"""An estimator of each approach, and of each set of variables."""


@pytest.fixture(params=sorted(FORMS))
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@cache
def fitted(form: str) -> Any:
    return FORMS[form].fit(TABLE)


def predicted(form: str, estimate: Any) -> np.ndarray:
    """Predictions of an estimate over the whole table."""
    return dataclasses.replace(fitted(form), estimate=estimate).predict(TABLE)


def test_a_fit_holds_its_law_and_table_and_the_law_is_as_before(form: str) -> None:
    law, fit = FORMS[form], fitted(form)
    assert isinstance(law, Law)
    assert isinstance(fit, Fit)
    assert fit.law is law
    assert fit.table is TABLE
    assert type(law)(**law.get_params()) == law


def test_predictions_are_positive_one_a_row(form: str) -> None:
    values = fitted(form).predict(TABLE)
    assert values.shape == (len(TABLE),)
    assert (np.isfinite(values) & (values > 0)).all()
    assert 0.5 < fitted(form).score(TABLE) <= 1


def test_the_order_of_runs_does_not_matter(form: str) -> None:
    names = TABLE.run
    order = np.concatenate([np.flatnonzero(names == name) for name in sorted(set(names))[::-1]])
    columns = {name: values[order] for name, values in TABLE.columns.items()}
    other = RunTable.from_columns({"run": names[order], **columns}, architecture=GEMSTONES)
    assert predicted(form, FORMS[form].fit(other).estimate) == pytest.approx(
        fitted(form).predict(TABLE), rel=SAME
    )


def test_weights_of_one_are_the_fit_itself(form: str) -> None:
    (again,) = FORMS[form].refits(fitted(form), TABLE, np.ones((1, len(TABLE))))
    assert predicted(form, again) == pytest.approx(fitted(form).predict(TABLE), rel=SAME)


def test_a_run_of_no_weight_is_left_out(form: str) -> None:
    keep = TABLE.run != "1024x28"
    (weighted,) = FORMS[form].refits(fitted(form), TABLE, keep.astype(float)[None])
    without = FORMS[form].fit(TABLE.where(keep)).estimate
    assert predicted(form, weighted) == pytest.approx(predicted(form, without), rel=SAME)


def test_a_run_of_weight_two_is_a_run_and_its_copy(form: str) -> None:
    names = sorted(set(TABLE.run))
    counts = np.asarray([2 if names.index(run) % 3 == 0 else 1 for run in TABLE.run])
    counts[TABLE.run == names[1]] = 0
    (weighted,) = FORMS[form].refits(fitted(form), TABLE, counts.astype(float)[None])
    table = TABLE.repeated(counts)
    assert len(set(table.run)) == len(names) - 1 + 7
    copied = FORMS[form].fit(table).estimate
    assert predicted(form, weighted) == pytest.approx(predicted(form, copied), rel=SAME)


def test_draws_depend_on_the_generator_alone(form: str) -> None:
    first, second = (
        bootstrap(fitted(form), draws=6, generator=np.random.default_rng(3)).estimates
        for _ in range(2)
    )
    assert len(first) > 0
    assert first == second


def test_too_few_rows_are_refused_by_the_name_of_their_table(form: str) -> None:
    few = TABLE.where(np.arange(len(TABLE)) < 2)
    with pytest.raises(ValueError, match="the sample"):
        FORMS[form].fit(few)


def test_scikit_learn_copies_it(form: str) -> None:
    """`clone` and its check of `get_params`; its other checks fit arrays, or need a `__dict__`."""
    base = pytest.importorskip("sklearn.base", reason="scikit-learn's own checks")
    checks = pytest.importorskip("sklearn.utils.estimator_checks")
    law: Any = FORMS[form]
    assert base.clone(law) == law
    checks.check_get_params_invariance(type(law).__name__, law)
