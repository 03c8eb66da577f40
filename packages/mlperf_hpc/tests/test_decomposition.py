"""The three factors of time to quality: laws, and a slow twin."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold_mlperf_hpc.decomposition import (
    OVERHEAD,
    TRAINING,
    Attempt,
    BatchLaw,
    batch_law,
    bootstrap,
    counted,
    expected,
    factors,
    score_s,
)
from fourfold_parallel.run.timeline import PARTS, PartName

CLOSES = 1e-12
"""The largest relative difference between the product of the factors and the ratio of the times."""
SECONDS = st.floats(min_value=1e-6, max_value=1e7)
"""A part of a time, or none."""


def attempts() -> st.SearchStrategy[Attempt]:
    parts = st.fixed_dictionaries(
        {"compute": SECONDS}, optional={part: SECONDS for part in PARTS if part != "compute"}
    )
    return st.builds(Attempt, samples=st.floats(1, 1e9), is_reached=st.just(True), seconds=parts)


def attempt(samples: float = 100.0, *, reached: bool = True, **seconds: float) -> Attempt:
    named = {part: seconds.get(part.replace(" ", "_"), 0.0) for part in PARTS}
    return Attempt(
        samples=samples,
        is_reached=reached,
        seconds={**named, "compute": seconds.get("compute", 10.0)},
    )


@given(attempts(), attempts())
def test_three_factors_multiply_to_the_whole_ratio(a: Attempt, b: Attempt) -> None:
    parts = factors(a, b)
    assert parts.whole == pytest.approx(a.elapsed_s / b.elapsed_s, rel=CLOSES)
    for whole, inner in ((parts.compute, TRAINING), (parts.overhead, OVERHEAD)):
        assert math.prod(parts.by_part[part] for part in inner) == pytest.approx(whole, rel=CLOSES)
    assert {*TRAINING, *OVERHEAD} == set(PARTS)


@given(attempts(), attempts())
def test_the_ratio_turned_round_has_the_factors_turned_round(a: Attempt, b: Attempt) -> None:
    there, back = factors(a, b), factors(b, a)
    assert there.convergence * back.convergence == pytest.approx(1, rel=CLOSES)
    assert there.compute * back.compute == pytest.approx(1, rel=CLOSES)
    assert there.overhead * back.overhead == pytest.approx(1, rel=CLOSES)


@pytest.mark.parametrize("part", PARTS)
def test_a_delay_in_a_part_raises_its_factor_first(part: PartName) -> None:
    """Parts before it in the chain keep factor 1; convergence never moves."""
    plain = attempt(**{name.replace(" ", "_"): 5.0 for name in PARTS})
    slow = replace(plain, seconds={**plain.seconds, part: 9.0})
    parts = factors(slow, plain)
    assert parts.convergence == 1.0
    chain = (*TRAINING, *OVERHEAD)
    before = chain[: chain.index(part)]
    assert all(parts.by_part[name] == 1.0 for name in before)
    assert parts.by_part[part] > 1.0
    assert all(parts.by_part[name] <= 1.0 for name in chain[chain.index(part) + 1 :])


def test_twice_the_samples_is_convergence_alone() -> None:
    once = attempt(100.0, staging=0.0)
    twice = replace(once, samples=200.0, seconds={"compute": 20.0})
    parts = factors(twice, once)
    assert (parts.convergence, parts.compute, parts.overhead) == (2.0, 1.0, 1.0)


def test_what_is_expected_counts_a_misses_cost_and_not_its_success() -> None:
    """Going on with the next seed after a miss: simulated, attempt by attempt."""
    seen = [attempt(100, staging=1.0), attempt(300), attempt(500, reached=False, staging=4.0)]
    mean = expected(seen)
    draw = random.Random(0)
    samples, seconds, successes = 0.0, 0.0, 0
    for _ in range(60_000):
        drawn = draw.choice(seen)
        samples, seconds = samples + drawn.samples, seconds + drawn.elapsed_s
        successes += drawn.is_reached
    assert mean.samples == pytest.approx(samples / successes, rel=0.02)
    assert mean.elapsed_s == pytest.approx(seconds / successes, rel=0.02)
    assert expected(seen[:2]).samples == 200.0


def test_a_miss_has_no_time_to_quality() -> None:
    missed = attempt(reached=False)
    with pytest.raises(ValueError, match="missed the quality, and has no time to it"):
        factors(missed, attempt())
    with pytest.raises(ValueError, match="none of 2 attempts met the quality; name an easier"):
        expected([missed, missed])
    with pytest.raises(ValueError, match="learnt from nothing"):
        factors(attempt(0.0), attempt())


def test_the_score_leaves_out_the_fastest_and_the_slowest() -> None:
    """As the rules have it: a miss is the slowest, whatever it took."""
    times = [attempt(compute=seconds) for seconds in (9.0, 3.0, 5.0, 7.0)]
    quick_miss = attempt(reached=False, compute=0.5)
    assert score_s(times) == 6.0
    assert score_s([*times, quick_miss]) == pytest.approx((5 + 7 + 9) / 3)
    assert quick_miss not in counted([*times, quick_miss])
    with pytest.raises(ValueError, match="2 of 6 attempts missed the quality; the rules forgive"):
        score_s([*times, quick_miss, quick_miss])
    with pytest.raises(ValueError, match="leave none to count"):
        score_s(times[:2])


def test_the_batch_law_is_recovered() -> None:
    """From samples that it made, at any scale; and with noise, within what the noise allows."""
    batches = np.array([8.0, 16, 32, 64, 128, 256])
    for law in (BatchLaw(least=3000.0, critical=40.0), BatchLaw(least=1e7, critical=2000.0)):
        fitted = batch_law(batches, np.array([law.samples(batch) for batch in batches]))
        assert fitted.least == pytest.approx(law.least, rel=1e-4)
        assert fitted.critical == pytest.approx(law.critical, rel=1e-4)
    law = BatchLaw(least=3000.0, critical=40.0)
    noise = np.exp(np.random.default_rng(0).normal(0, 0.05, len(batches)))
    noisy = batch_law(batches, noise * [law.samples(batch) for batch in batches])
    assert noisy.critical == pytest.approx(law.critical, rel=0.3)
    assert law.samples(law.critical) == 2 * law.least
    with pytest.raises(ValueError, match="tell no law"):
        batch_law(np.array([8.0, 8.0]), np.array([1.0, 2.0]))


def test_the_interval_covers_the_true_ratio() -> None:
    """Of ten seeds a side, in about 95 of 100 repetitions; the bootstrap of so few is a little narrow."""
    generator = np.random.default_rng(1)
    covered = 0
    for repetition in range(60):
        sides = [
            [attempt(float(n)) for n in scale * np.exp(generator.normal(0, 0.2, 10))]
            for scale in (200.0, 100.0)
        ]
        low, high = bootstrap(*sides, lambda parts: parts.convergence, seed=repetition, draws=200)
        covered += low <= 2.0 <= high
    assert covered >= 0.8 * 60


def test_draws_in_which_all_missed_are_infinite() -> None:
    hopeful = [attempt(), attempt(reached=False)]
    low, high = bootstrap(hopeful, [attempt(), attempt()], lambda f: f.convergence, draws=500)
    assert math.isinf(high)
    assert low == pytest.approx(1.0)
