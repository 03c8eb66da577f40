"""Keep a sample only if its answer compiles, runs and is right: judged as a model's answer would be."""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from fourfold_hpc_coder.instruct.grammar import Task
from fourfold_hpc_coder.judge import toolchain
from fourfold_hpc_coder.judge.bench import Bench, JudgeSettings
from fourfold_hpc_coder.judge.judge import Judgement, judge
from fourfold_hpc_coder.judge.reference import Reference, Round
from fourfold_hpc_coder.sandbox.process import find_sandbox
from fourfold_hpc_coder.sandbox.scratch import scratch_folder
from fourfold_hpc_coder.score.cache import equal_answers
from fourfold_hpc_coder.vocabulary import Model, Processors

CHECKED_ON: tuple[tuple[Model, tuple[Processors, ...]], ...] = (
    ("serial", (Processors(),)),
    ("omp", (Processors(threads=2),)),
    ("mpi", (Processors(ranks=2),)),
    ("mpi+omp", (Processors(ranks=2, threads=2),)),
    ("kokkos", (Processors(),)),
    ("stdpar", (Processors(threads=2),)),
)
"""One launch per model, with more than one processor where the model has them."""

SETTINGS = JudgeSettings(repetitions=1, races=False, launches=CHECKED_ON)
"""Correctness and parallelism, no timing: an answer of data is not raced."""


@contextmanager
def open_bench(*, allow_no_sandbox: bool = False) -> Iterator[Bench]:
    """A bench for verification; inputs are the same each time, since nobody here is an adversary's judge."""
    sandbox = find_sandbox(allow_none=allow_no_sandbox)
    with scratch_folder() as scratch:
        yield Bench(sandbox=sandbox, scratch=scratch, settings=SETTINGS, secret=20241219)


def oracle(task: Task, secret: int) -> Reference:
    """Right answers to a task by NumPy; nothing is timed."""
    problem = task.problem()
    generator = np.random.default_rng((secret, zlib.crc32(task.name.encode())))
    timed = problem.timing_size
    calls = [*problem.checks(generator)]
    calls.append((f"for an input of size {timed}", problem.arguments(timed, generator)))
    rounds = tuple(
        Round(where=where, arguments=(*drawn.values(),), expected=task.expected(drawn))
        for where, drawn in calls
    )
    return Reference(exercise=problem, checks=rounds[:-1], timed=rounds[-1:], best_s=float("nan"))


def verify(
    bench: Bench, task: Task, model: Model, prompt: str, answers: Sequence[str]
) -> list[Judgement]:
    """Judge answers to one task; equal ones, now or before, once.

    Args:
        bench: from `open_bench`.
        task: gives inputs and right answers.
        model: parallel model asked for.
        prompt: ends by opening the function.
        answers: function bodies.

    Raises:
        ValueError: where the model cannot be run here.
    """
    if reason := toolchain.barred(model, bench.sandbox):
        raise ValueError(f"{reason}; or leave {model} out of --models")
    right = oracle(task, bench.secret)
    problem = task.problem()

    def fresh(body: str) -> Judgement:
        return judge(bench, right, model, prompt, body)

    return [equal_answers(problem, model, prompt, body, bench.settings, fresh) for body in answers]
