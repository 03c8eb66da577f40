"""A problem's sequential reference at work: the rounds of a judgement, their right answers, and T*."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fourfold_hpc_coder.judge.bench import Bench, Exercise, built, launched
from fourfold_hpc_coder.judge.protocol import Channel, EndedError, Reply
from fourfold_hpc_coder.problems.problem import Problem
from fourfold_hpc_coder.vocabulary import Processors

PATIENCE = 6
"""Times the limit of a call that a reference may take."""
MOVING_S, MOVING_SHARE = 0.001, 1.25
"""On moving its inputs, and again its outputs, each rank may spend 1 ms more than 1.25 times what the
reference spends: caches are shared with others. More is charged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One call: its inputs and what the reference answers."""

    where: str
    """Ends a sentence about the call: `for an input of size 17`."""
    arguments: tuple[np.ndarray, ...]
    expected: dict[str, np.ndarray]
    moving_cpu_s: tuple[float, float] = (math.inf, math.inf)
    """Processor time that a program may spend on its inputs and on its outputs around the call."""
    is_timed: bool = True


@dataclass(slots=True)
class Reference:
    """A problem's sequential reference at work: right answers, and T*."""

    exercise: Exercise
    checks: tuple[Round, ...]
    timed: tuple[Round, ...]
    best_s: float
    again: tuple["Reference", ...] = ()
    """Exercises made of the same answer, on which it must be right as well; they are not timed."""
    watched: tuple[tuple[np.ndarray, ...], ...] = ()
    """Further inputs on which the race checker looks, and nobody compares the answer."""


def reference(bench: Bench, problem: Problem) -> Reference:
    """Draw the rounds of a problem and have its reference answer them.

    Raises:
        RuntimeError: where our own reference fails, which is a bug of the problem.
    """
    generator = generator_of(bench, problem)
    checks = [*problem.checks(generator)]
    size = bench.settings.timing_size(problem)
    timed = [
        (f"for an input of size {size}", problem.arguments(size, generator))
        for _ in range(bench.settings.repetitions)
    ]
    rounds, runtimes_s = answered(bench, problem, [*checks, *timed])
    count = len(checks)
    return Reference(
        exercise=problem,
        checks=rounds[:count],
        timed=rounds[count:],
        best_s=min(runtimes_s[count:]),
        watched=tuple((*drawn.values(),) for drawn in problem.mirrored(generator)),
    )


def generator_of(bench: Bench, problem: Problem) -> np.random.Generator:
    """Decides a problem's sizes and inputs, by the bench's secret."""
    return np.random.default_rng((bench.secret, zlib.crc32(problem.name.encode())))


def answered(
    bench: Bench, problem: Problem, wanted: Sequence[tuple[str, dict[str, np.ndarray]]]
) -> tuple[tuple[Round, ...], list[float]]:
    """Rounds of the inputs, each with the reference's answer, and the seconds that it took.

    Raises:
        RuntimeError: where our own reference fails.
    """
    calls = [(*arguments.values(),) for _, arguments in wanted]
    text = problem.unit(problem.prompt("serial"), problem.answer("serial"))
    answers = trusted_answers(bench, problem, text, calls)
    rounds = tuple(
        Round(
            where=where,
            arguments=arguments,
            expected=answer.outputs,
            moving_cpu_s=(allowed(answer.moving_cpu_s[0]), allowed(answer.moving_cpu_s[1])),
        )
        for (where, _), arguments, answer in zip(wanted, calls, answers, strict=True)
    )
    return rounds, [answer.runtime_s for answer in answers]


def allowed(moving_cpu_s: float) -> float:
    """Processor time of moving data that is not charged, where the reference took so long."""
    return MOVING_S + MOVING_SHARE * moving_cpu_s


def trusted_answers(
    bench: Bench, exercise: Exercise, text: str, calls: Sequence[Sequence[np.ndarray]]
) -> list[Reply]:
    """The answers of a sequential program of ours, alone on the machine.

    Raises:
        RuntimeError: where it does not build or ends early.
    """
    with bench.folder() as folder:
        outcome = built(bench, exercise, "serial", text, folder, is_kept=True)
        if outcome.code:
            raise RuntimeError(f"the reference of {exercise.name} does not build: {outcome.stderr}")
        # A busy machine must not fail what is known to end.
        patient = replace(bench.settings, time_limit_s=PATIENCE * bench.settings.time_limit_s)
        with launched(bench, folder, "serial", Processors(), settings=patient) as channel:
            try:
                channel.connect()
                with bench.quiet.timing():
                    return [call(channel, exercise, arguments) for arguments in calls]
            except EndedError:
                ended = channel.process.finish()
                raise RuntimeError(
                    f"the reference of {exercise.name} ended early: exit code {ended.code}, limit "
                    f"{ended.limit}, {ended.elapsed_s:.0f} s: {ended.stderr}"
                ) from None


def call(channel: Channel, exercise: Exercise, arguments: Sequence[np.ndarray]) -> Reply:
    """One call of an exercise's function."""
    return channel.call(arguments, exercise.signature.parameters, exercise.signature.outputs)
