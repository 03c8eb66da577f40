"""The law of a recurrence: planted parameters come back, and the suite is what its claims say."""

from itertools import product

import numpy as np
import pytest

from fourfold_recurrent_depth.reproduce import recipes
from fourfold_recurrent_depth.reproduce.worth import Point, fit, interval, resampled_phi


def planted(phi: float, noise: float, seed: int = 0) -> list[Point]:
    """Runs of the suite's shape under a known law."""
    generator = np.random.default_rng(seed)
    points = []
    for width, loops, tokens in product((24, 32, 48, 64), (1, 2, 4, 8), (1.5e5, 3e5, 6e5)):
        once, looped = 24.0 * width**2, 26.0 * width**2
        weights = once + loops**phi * looped
        loss = 1.2 + 0.6 * (weights / 1e5) ** -0.4 + 0.7 * (tokens / 3e5) ** -0.6
        loss *= float(np.exp(noise * generator.standard_normal()))
        points.append(Point(once=once, looped=looped, loops=loops, tokens=tokens, loss_nats=loss))
    return points


@pytest.mark.parametrize("phi", [0.0, 0.46, 1.0])
def test_a_planted_worth_comes_back(phi: float) -> None:
    law = fit(planted(phi, noise=0.0))
    assert law.phi == pytest.approx(phi, abs=2e-3)
    assert law.alpha == pytest.approx(0.4, abs=5e-3)
    assert law.beta == pytest.approx(0.6, abs=5e-3)
    assert np.allclose(
        law.loss(planted(phi, 0.0)), [p.loss_nats for p in planted(phi, 0.0)], rtol=1e-4
    )


def test_the_interval_holds_what_was_planted_and_is_narrower_with_less_noise() -> None:
    loud, quiet = (interval(resampled_phi(tuple(planted(0.46, noise)))) for noise in (4e-3, 1e-3))
    assert loud[0] < 0.46 < loud[1]
    assert quiet[1] - quiet[0] < loud[1] - loud[0]


def test_too_few_runs_tell_no_law() -> None:
    with pytest.raises(ValueError, match="5 runs tell no law of 6 parameters"):
        fit(planted(0.5, 0.0)[:5])


def test_the_suite_is_what_the_claims_say() -> None:
    study = recipes.worth("laptop")
    arms = [arm for arm, _ in study.members]
    assert [arms.count(arm) for arm in ("looped", "truncated", "untied")] == [48, 24, 6]
    assert len({run.name for _, run in study.members}) == len(study.members)
    assert {run.steps * run.tokens_per_step for _, run in study.members} == {153600, 307200, 614400}


def test_an_untied_twin_takes_the_looped_models_flops() -> None:
    """But for the adapter, which a twin passes once."""
    from fourfold_recurrent_depth.analysis.flops import costs

    looped, untied = (
        recipes.worth_run(arm, width=48, loops=4, steps=300) for arm in ("looped", "untied")
    )
    prices = [costs(run.model.config(), context=64) for run in (looped, untied)]  # type: ignore[attr-defined]
    core = prices[0].recurrence - 2 * 48 * 48
    assert prices[1].recurrence - 2 * 48 * 48 == pytest.approx(4 * core)
