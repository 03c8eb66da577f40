"""The four scores of a code model: its programs build, are right, are fast, and are so per processor.

ParEval (Nichols et al. 2024), the benchmark on which HPC-Coder-V2 is measured, asks a code model for N
samples of each function and scores four things: does a sample build, is it right, and how much faster than
the best sequential program is it, in all and per processor. Here each of the four is an expectation over
choosing k of the N samples and keeping the best one:

    build@k        P[one of k builds]                           = 1 - C(N - c, k) / C(N, k)
    pass@k         P[one of k counts], over c that count          the same estimator
    speedup_n@k    E[largest T*/T_n among k; 0 if none counts]  = sum_j C(j - 1, k - 1) / C(N, k) x_(j)
    efficiency_n@k speedup_n@k / n

with x_(1) <= ... <= x_(N) the speed-ups on n processors over the best sequential time T*, and 0 for every
sample that does not count. A sample counts if it was built, gave the right answer in *every* run, and
really used the parallel model it was asked for: a serial answer to an OpenMP prompt is right, not parallel.

These definitions correct those that ParEval's scripts compute, which `pareval/metrics.py` follows exactly.
"""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np

from fourfold_hpc_coder.vocabulary import Processors, Prompt, Sample, Tolerance


def agrees(answer: np.ndarray, reference: np.ndarray, tolerance: Tolerance) -> np.ndarray:
    """Element by element, whether an answer is the reference's up to rounding.

    Written as `difference <= limit`, which is false of NaN: `difference > limit` as the test of a *wrong*
    answer lets a program pass that fills its output with NaN.

    Args:
        answer: the program's output, of the reference's shape; a structure's fields must all agree.
        reference: what the sequential reference gave for the same input.
        tolerance: for floating-point values.

    Raises:
        ValueError: where the shapes differ, or the reference itself is not finite.
    """
    if answer.shape != reference.shape:
        raise ValueError(
            f"an answer of shape {answer.shape} cannot be compared with {reference.shape}"
        )
    if reference.dtype.names:
        fields = [
            agrees(answer[name], reference[name], tolerance) for name in reference.dtype.names
        ]
        return np.logical_and.reduce(fields)
    if not np.issubdtype(reference.dtype, np.inexact):
        return answer == reference
    if not np.isfinite(reference).all():
        raise ValueError(
            "the reference's answer is not finite; the problem's inputs must avoid that"
        )
    limit = tolerance.absolute + tolerance.relative * np.abs(reference)
    with np.errstate(invalid="ignore", over="ignore"):
        return np.abs(answer - reference) <= limit


def at_least_one(samples: int, successes: int, k: int) -> float:
    """P[at least one success among k of the samples, chosen without replacement] (Chen et al. 2021).

    NaN for k > samples, where the question has no answer: ParEval's script says 1 there even if no sample
    succeeds.

    Raises:
        ValueError: for k < 1 or more successes than samples.
    """
    if k < 1 or not 0 <= successes <= samples:
        raise ValueError(
            f"k={k} with {successes} of {samples} samples; use k of 1 or more, successes <= samples"
        )
    if k > samples:
        return math.nan
    return float(1 - Fraction(math.comb(samples - successes, k), math.comb(samples, k)))


def expected_best(values: Sequence[float], k: int) -> float:
    """E[the largest of k of the values, chosen without replacement]; NaN for k > len(values)."""
    if k < 1:
        raise ValueError(f"k={k} samples cannot be chosen; use 1 or more")
    if k > len(values):
        return math.nan
    ways = math.comb(len(values), k)
    # The j-th smallest is the best of the chosen iff the k - 1 others come from the j - 1 below it.
    return math.fsum(
        float(Fraction(math.comb(j, k - 1), ways)) * value for j, value in enumerate(sorted(values))
    )


def build_at_k(prompts: Sequence[Prompt], k: int) -> float:
    """Mean over prompts of the probability that one of k samples builds."""
    return _mean(at_least_one(len(p.samples), sum(s.built for s in p.samples), k) for p in prompts)


def pass_at_k(prompts: Sequence[Prompt], k: int, *, parallel: bool = True) -> float:
    """Mean over prompts of the probability that one of k samples counts.

    Args:
        prompts: of one model, usually one problem type.
        k: samples chosen.
        parallel: whether a sample must use the model it was asked for; False is ParEval's reading.
    """
    counted = [sum(s.counts if parallel else s.right for s in p.samples) for p in prompts]
    return _mean(
        at_least_one(len(p.samples), count, k) for p, count in zip(prompts, counted, strict=True)
    )


def speedup_at_k(prompts: Sequence[Prompt], k: int, *, processors: Processors) -> float:
    """Mean over *all* prompts of the expected best speed-up on `processors` among k samples.

    A sample that does not count has speed-up 0. NaN where one that counts was not timed on this launch.
    """
    return _mean(expected_best([_speedup(s, p, processors) for s in p.samples], k) for p in prompts)


def conditional_speedup_at_1(prompts: Sequence[Prompt], *, processors: Processors) -> float:
    """Mean speed-up of the samples that count, over the prompts that have one; NaN where none has.

    What a user gains who tests what the model wrote before using it. It rises when failures become more
    frequent among slow samples, so it is no score of a model.
    """
    per_prompt = [
        [
            _speedup(s, p, processors)
            for s in p.samples
            if s.counts and _speedup(s, p, processors) > 0
        ]
        for p in prompts
    ]
    return _mean(math.fsum(values) / len(values) for values in per_prompt if values)


def efficiency_at_k(prompts: Sequence[Prompt], k: int, *, processors: Processors) -> float:
    """Speed-up per processor of the same launch."""
    return speedup_at_k(prompts, k, processors=processors) / processors.count


def speedup_max_at_k(prompts: Sequence[Prompt], k: int) -> float:
    """As `speedup_at_k`, each sample taken on the launch that suits it best."""
    return _mean(expected_best([_best_speedup(s, p) for s in p.samples], k) for p in prompts)


def _best_speedup(sample: Sample, prompt: Prompt) -> float:
    speedups = [_speedup(sample, prompt, run.processors) for run in sample.runs] or [0.0]
    return max((speedup for speedup in speedups if not math.isnan(speedup)), default=math.nan)


def _speedup(sample: Sample, prompt: Prompt, processors: Processors) -> float:
    """X of a sample: T*/T on a launch if it counts, else 0. T* is the least that any sample measured.

    NaN where it counts and was not timed there.
    """
    if not sample.counts:
        return 0.0
    best_s = min(
        (s.best_sequential_s for s in prompt.samples if not math.isnan(s.best_sequential_s)),
        default=math.nan,
    )
    runtime_s = next(
        (run.runtime_s for run in sample.runs if run.processors == processors), math.nan
    )
    return best_s / max(runtime_s, CLOCK_S)


CLOCK_S = 1e-8
"""No call is taken to be shorter than this (as in ParEval), so that a runtime of 0 gives a finite ratio."""


def _mean(values: Iterable[float]) -> float:
    numbers = [*values]
    return math.fsum(numbers) / len(numbers) if numbers else math.nan
