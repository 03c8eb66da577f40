"""What it takes for a generated program to count, and how a model is scored on many of them.

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

These definitions correct those that ParEval's scripts compute; `published.py` has the latter to the letter.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import numpy as np

Model = Literal["serial", "omp", "mpi", "mpi+omp", "kokkos", "cuda", "hip"]
"""A parallel programming model, in ParEval's words (`parallelism_model`)."""
MODELS: tuple[Model, ...] = get_args(Model)

Verdict = Literal[
    "correct",
    "not parallel",
    "race",
    "wrong",
    "not finite",
    "crash",
    "timeout",
    "cheat",
    "no answer",
    "no build",
    "compiled, not run",
]
"""What became of a sample. Only "correct" counts; the others say why not:

`not parallel`: right, but does not use the model asked for. `race`: right in every run that was seen, but
two threads touch one address, at least one to write, with nothing in between. `wrong`: another answer than
the reference's. `not finite`: NaN or infinity where the reference is finite. `crash`: a signal, an uncaught
exception, an exit before the answer or a bad one after the last. `timeout`: the time or processor limit.
`cheat`: it wrote on the result channel, or names what is the judge's. `no answer`: nothing to compile. `no
build`: the compiler or linker refused. `compiled, not run`: what it needs to run is not on this machine.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """On how much of the machine a program is run."""

    ranks: int = 1
    threads: int = 1
    """Threads per rank."""

    @property
    def processors(self) -> int:
        """N of speedup_n: ranks times threads."""
        return self.ranks * self.threads

    def __str__(self) -> str:
        """As in a sentence: `2 threads`, `4 ranks`, `4 ranks of 2 threads`."""
        ranks = f"{self.ranks} rank{'s' * (self.ranks != 1)}"
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        if self.ranks == 1:
            return threads
        return ranks if self.threads == 1 else f"{ranks} of {threads}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One launch of a sample's program."""

    launch: Launch
    ran: bool
    """Whether it came to its end by itself."""
    valid: bool
    """Whether every answer it gave equals the reference's."""
    runtime_s: float
    """Time of one call on the timing input, NaN where it was not timed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One answer of a model to one prompt, as far as the metrics need it."""

    built: bool
    parallel: bool
    """Whether it really uses the model it was asked for; always true of a serial prompt."""
    runs: tuple[Run, ...]
    best_sequential_s: float
    """T*: time of the best sequential program on the same input, NaN where unknown."""

    @property
    def right(self) -> bool:
        """Built, and every run ended with the right answer."""
        return self.built and bool(self.runs) and all(run.ran and run.valid for run in self.runs)

    @property
    def counts(self) -> bool:
        """Right, and parallel as asked."""
        return self.right and self.parallel


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A function asked for in one parallel model, and the samples that a code model gave."""

    name: str
    problem_type: str
    model: Model
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far a floating-point answer may lie from the reference's; integers must be equal."""

    relative: float
    absolute: float


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


def speedup_at_k(prompts: Sequence[Prompt], k: int, *, launch: Launch) -> float:
    """Mean over *all* prompts of the expected best speed-up on `launch` among k samples.

    A sample that does not count has speed-up 0. NaN where one that counts was not timed on this launch.
    """
    return _mean(expected_best([_speedup(s, p, launch) for s in p.samples], k) for p in prompts)


def conditional_speedup_at_1(prompts: Sequence[Prompt], *, launch: Launch) -> float:
    """Mean speed-up of the samples that count, over the prompts that have one; NaN where none has.

    What a user gains who tests what the model wrote before using it. It rises when failures become more
    frequent among slow samples, so it is no score of a model.
    """
    per_prompt = [
        [_speedup(s, p, launch) for s in p.samples if s.counts and _speedup(s, p, launch) > 0]
        for p in prompts
    ]
    return _mean(math.fsum(values) / len(values) for values in per_prompt if values)


def efficiency_at_k(prompts: Sequence[Prompt], k: int, *, launch: Launch) -> float:
    """Speed-up per processor of the same launch."""
    return speedup_at_k(prompts, k, launch=launch) / launch.processors


def speedup_max_at_k(prompts: Sequence[Prompt], k: int) -> float:
    """As `speedup_at_k`, each sample taken on the launch that suits it best."""
    return _mean(expected_best([_best_speedup(s, p) for s in p.samples], k) for p in prompts)


def _best_speedup(sample: Sample, prompt: Prompt) -> float:
    found = [_speedup(sample, prompt, run.launch) for run in sample.runs] or [0.0]
    return max((one for one in found if not math.isnan(one)), default=math.nan)


def _speedup(sample: Sample, prompt: Prompt, launch: Launch) -> float:
    """X of a sample: T*/T on a launch if it counts, else 0. T* is the least that any sample measured.

    NaN where it counts and was not timed there.
    """
    if not sample.counts:
        return 0.0
    best_s = min(
        (s.best_sequential_s for s in prompt.samples if not math.isnan(s.best_sequential_s)),
        default=math.nan,
    )
    runtime_s = next((run.runtime_s for run in sample.runs if run.launch == launch), math.nan)
    return best_s / max(runtime_s, CLOCK_S)


CLOCK_S = 1e-8
"""No call is taken to be shorter than this (as in ParEval), so that a runtime of 0 gives a finite ratio."""


def _mean(values: Iterable[float]) -> float:
    numbers = [*values]
    return math.fsum(numbers) / len(numbers) if numbers else math.nan
