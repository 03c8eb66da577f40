"""Laws of the metrics, and a slow twin that tries every choice of k samples."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourfold_hpc_coder.evaluation import (
    agrees,
    at_least_one,
    build_at_k,
    conditional_speedup_at_1,
    efficiency_at_k,
    expected_best,
    pass_at_k,
    speedup_at_k,
    speedup_max_at_k,
)
from fourfold_hpc_coder.score.intervals import Z, bootstrap, wilson
from fourfold_hpc_coder.vocabulary import Execution, Processors, Prompt, Sample, Tolerance

TWO = Processors(threads=2)
FOUR = Processors(threads=4)
EXACT = 1e-12  # sums of at most 8 rationals of doubles
TOLERANCE = Tolerance(relative=1e-6, absolute=1e-9)


def sample(*, built: bool = True, valid: bool = True, parallel: bool = True, speed: float = 1.0):
    runs = tuple(
        Execution(processors=one, ran=True, valid=valid, runtime_s=one.count / speed / 4)
        for one in (TWO, FOUR)
    )
    return Sample(built=built, parallel=parallel, runs=runs if built else (), best_sequential_s=1.0)


samples = st.builds(
    sample,
    built=st.booleans(),
    valid=st.booleans(),
    parallel=st.booleans(),
    speed=st.floats(0.1, 10),
)
several = st.lists(samples, min_size=1, max_size=7)


def prompt(found) -> Prompt:
    return Prompt(name="p", problem_type="reduce", model="omp", samples=tuple(found))


@given(several, st.integers(1, 7))
def test_metrics_are_expectations_over_every_choice(found, k: int) -> None:
    """Each metric is the mean, over all k-subsets, of the subset's best sample."""
    if k > len(found):
        assert math.isnan(pass_at_k([prompt(found)], k))
        return
    subsets = [*itertools.combinations(found, k)]

    def mean(of) -> float:
        return sum(max(of(one) for one in subset) for subset in subsets) / len(subsets)

    def speed(one) -> float:
        return 1 / one.runs[0].runtime_s if one.counts else 0.0

    whole = [prompt(found)]
    assert build_at_k(whole, k) == pytest.approx(mean(lambda one: one.built), abs=EXACT)
    assert pass_at_k(whole, k) == pytest.approx(mean(lambda one: one.counts), abs=EXACT)
    assert pass_at_k(whole, k, parallel=False) == pytest.approx(
        mean(lambda one: one.right), abs=EXACT
    )
    assert speedup_at_k(whole, k, processors=TWO) == pytest.approx(mean(speed), rel=1e-9)
    # What is drawn takes twice the time on four threads.
    assert speedup_max_at_k(whole, k) == pytest.approx(mean(speed), rel=1e-9)


@given(several, st.randoms(), st.integers(1, 3))
def test_the_order_of_samples_and_runs_is_no_matter(found, random, k: int) -> None:
    mixed = [*found]
    random.shuffle(mixed)
    for metric in (
        lambda p: pass_at_k([p], k),
        lambda p: build_at_k([p], k),
        lambda p: speedup_at_k([p], k, processors=FOUR),
        lambda p: speedup_max_at_k([p], k),
    ):
        assert metric(prompt(found)) == pytest.approx(metric(prompt(mixed)), nan_ok=True)


@given(several)
def test_a_build_is_needed_to_pass_and_more_tries_never_hurt(found) -> None:
    whole = [prompt(found)]
    builds = [build_at_k(whole, k) for k in range(1, len(found) + 1)]
    passes = [pass_at_k(whole, k) for k in range(1, len(found) + 1)]
    speeds = [speedup_at_k(whole, k, processors=TWO) for k in range(1, len(found) + 1)]
    assert all(b >= p - EXACT for b, p in zip(builds, passes, strict=True))
    for series in (builds, passes, speeds):
        if not math.isnan(series[0]):
            assert all(a <= b + EXACT for a, b in itertools.pairwise(series))


@given(several, st.integers(1, 3))
def test_one_more_failure_raises_no_metric(found, k: int) -> None:
    more = [*found, sample(built=False)]
    for metric in (
        lambda p: pass_at_k([p], k),
        lambda p: build_at_k([p], k),
        lambda p: speedup_at_k([p], k, processors=TWO),
        lambda p: efficiency_at_k([p], k, processors=TWO),
    ):
        before, after = metric(prompt(found)), metric(prompt(more))
        assert math.isnan(before) or after <= before + EXACT


def test_nothing_right_is_a_speed_up_of_0_and_no_timing_is_none() -> None:
    """A model whose every answer fails is no faster for it; a right answer without a time is not slow."""
    broken, wrong, untimed = sample(built=False), sample(valid=False), sample()
    for found in ([broken], [wrong], [broken, wrong]):
        assert speedup_at_k([prompt(found)], 1, processors=TWO) == 0
        assert speedup_max_at_k([prompt(found)], 1) == 0
    elsewhere = Processors(threads=64)
    assert math.isnan(speedup_at_k([prompt([untimed, wrong])], 1, processors=elsewhere))


def test_a_right_answer_that_is_not_parallel_does_not_count() -> None:
    """ParEval counts it."""
    serial = sample(parallel=False)
    assert (serial.right, serial.counts) == (True, False)
    assert pass_at_k([prompt([serial])], 1) == 0
    assert pass_at_k([prompt([serial])], 1, parallel=False) == 1
    assert math.isnan(conditional_speedup_at_1([prompt([serial])], processors=TWO))


def test_a_sample_wrong_in_one_run_does_not_count_in_any() -> None:
    half = sample()
    first, second = half.runs
    wrong = Execution(processors=second.processors, ran=True, valid=False, runtime_s=math.nan)
    mixed = Sample(built=True, parallel=True, runs=(first, wrong), best_sequential_s=1.0)
    assert speedup_at_k([prompt([mixed, half])], 1, processors=TWO) == speedup_at_k(
        [prompt([sample(built=False), half])], 1, processors=TWO
    )


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 1.1])
def test_no_value_but_a_close_one_agrees(wrong: float) -> None:
    """NaN compares false with everything; a test for wrongness instead of rightness accepts it."""
    reference = np.array([1.0, 2.0])
    assert agrees(reference * (1 + 1e-8), reference, TOLERANCE).all()
    assert not agrees(np.array([wrong, 2.0]), reference, TOLERANCE)[0]


def test_structures_agree_in_every_field_and_integers_exactly() -> None:
    kind = np.dtype([("index", "u8"), ("value", "f8")])
    one, other = np.array([(1, 2.0)], kind), np.array([(2, 2.0)], kind)
    assert agrees(one, one, TOLERANCE).all()
    assert not agrees(other, one, TOLERANCE).any()
    large = np.array([10**15])
    assert not agrees(large + 1, large, TOLERANCE).any()


def test_impossible_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="k=0"):
        at_least_one(3, 1, 0)
    with pytest.raises(ValueError, match="4 of 3"):
        at_least_one(3, 4, 1)
    with pytest.raises(ValueError, match="use 1 or more"):
        expected_best([1.0], 0)
    with pytest.raises(ValueError, match="shape"):
        agrees(np.zeros(2), np.zeros(3), TOLERANCE)
    with pytest.raises(ValueError, match="reference"):
        agrees(np.zeros(1), np.array([math.nan]), TOLERANCE)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_solves_its_equation(counts: tuple[int, int]) -> None:
    """Its ends are the chances under which the observed share is just z deviations away."""
    successes, samples = counts
    share = successes / samples
    low, high = wilson(successes, samples)
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(share - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / samples))
    assert wilson(samples - successes, samples) == pytest.approx((1 - high, 1 - low))


def test_no_samples_have_no_interval_and_more_successes_than_samples_are_refused() -> None:
    assert all(map(math.isnan, wilson(0, 0)))
    with pytest.raises(ValueError, match="between 0"):
        wilson(3, 2)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12))
def test_a_bootstrap_lies_within_the_values_and_is_the_same_each_time(values: list[float]) -> None:
    def mean(chosen) -> float:
        return math.fsum(chosen) / len(chosen)

    low, high = bootstrap(values, mean)
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12
    assert bootstrap(values, mean) == (low, high)
    assert bootstrap([values[0]] * 5, mean) == pytest.approx((values[0], values[0]))
    assert all(map(math.isnan, bootstrap(values[:1], mean)))


def test_a_bootstrap_covers_the_truth_as_often_as_it_says() -> None:
    """Of a mean over 40 problems; the percentile interval is known to be a little short."""
    generator = np.random.default_rng(0)
    truth, trials = 0.4, 200
    hits = 0
    for _ in range(trials):
        low, high = bootstrap(
            [*generator.binomial(10, truth, 40) / 10], lambda chosen: sum(chosen) / len(chosen)
        )
        hits += low <= truth <= high
    assert 0.88 <= hits / trials <= 0.99
