"""In which order answers are judged: built and checked on all processors, then timed one by one, in quiet.

A timing suffers nothing beside it, so each one costs the other processors its length and the wait until
they are idle. Hence answers wait for one another: a few problems' worth is built and checked by as many jobs
as there are; when none works any more, their programs are timed, and no other program exists meanwhile. What
needs no timing is settled at once. A kill loses at most what had not been timed.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from fourfold_hpc_coder.judge import toolchain
from fourfold_hpc_coder.judge.bench import Bench, precompile, ready
from fourfold_hpc_coder.judge.judge import Candidate, Judgement, check, time_candidate
from fourfold_hpc_coder.judge.reference import Reference, reference
from fourfold_hpc_coder.pareval.checkout import CheckoutProblem, checkout_reference
from fourfold_hpc_coder.pareval.files import Question
from fourfold_hpc_coder.problems.problem import Problem
from fourfold_hpc_coder.vocabulary import Model

AnyProblem = Problem | CheckoutProblem
"""A problem of this package, or of a checkout of ParEval."""

TOGETHER = 64
"""Answers that are timed in one stretch, at most: a minute's work, which a kill may lose."""
PROBLEMS = 4
"""Whose inputs and right answers are in memory at once, at most."""
LARGE_BYTES = 4 << 20
"""A larger program is timed at once rather than kept: a file may hold many."""


@dataclass(frozen=True, slots=True)
class AnswerTask:
    """One distinct answer, and every place of the file where it stands."""

    question: Question
    problem: AnyProblem
    body: str
    key: str
    places: tuple[tuple[int, int], ...]

    @property
    def source(self) -> str:
        """Answers of one source share inputs and right answers."""
        name = self.problem.name
        is_shared = not isinstance(self.problem, CheckoutProblem)
        return name if is_shared else f"{name} ({self.question.model})"


def judge_all(
    bench: Bench,
    waiting: Sequence[AnswerTask],
    models: Sequence[Model],
    jobs: int,
    settle: Callable[[AnswerTask, Judgement], None],
    rights: dict[str, Reference] | None = None,
) -> dict[str, str]:
    """Judge answers; a problem whose reference fails is reported, not fatal.

    Args:
        bench: where.
        waiting: the answers, those to one problem together.
        models: of the answers, in the order in which they matter.
        jobs: answers built and checked at once.
        settle: takes each judgement when it is final, from any thread.
        rights: right answers that earlier calls left there, by source, and receives those of the last
            problems; of one bench with one secret.

    Returns:
        Why a reference failed, by source.
    """
    failed: dict[str, str] = {}
    rights = {} if rights is None else rights
    with _pool(jobs) as pool:
        _lay_ground(bench, waiting, models, pool)
        for window in windows(waiting):
            # First the right answers to the window's problems; those to earlier problems leave memory.
            first = {task.source: task for task in reversed(window)}
            for source in [source for source in rights if source not in first]:
                if len({*rights, *first}) > PROBLEMS:
                    del rights[source]
            begun = {
                source: pool.submit(_reference, bench, task)
                for source, task in sorted(first.items())
                if source not in rights and source not in failed
            }
            for source, future in begun.items():
                try:
                    rights[source] = future.result()
                except RuntimeError as error:
                    failed[source] = str(error)[:500]
            # Then every answer is built and checked, on all processors: the longest first, for all jobs to
            # end together.
            able = sorted(
                (task for task in window if task.source in rights),
                key=lambda task: task.question.model == "serial",
            )
            checked: list[tuple[AnswerTask, Future[_WaitingProgram | None]]] = [
                (task, pool.submit(_checked, bench, task, rights[task.source], settle))
                for task in able
            ]
            programs: list[_WaitingProgram] = []
            for task, future in checked:
                try:
                    if program := future.result():
                        programs.append(program)
                except RuntimeError as error:  # what lies beneath every answer in a model
                    place = f"{task.problem.name} ({task.question.model})"
                    failed[place] = str(error)[:500]
            # Now nothing works any more, and the programs that were right are timed, one by one.
            for program in programs:
                with program.folder:
                    settle(program.task, time_candidate(bench, program.candidate))
    return failed


def windows(waiting: Sequence[AnswerTask]) -> Iterator[list[AnswerTask]]:
    """The answers in their order, cut into those that are timed together."""
    window: list[AnswerTask] = []
    sources: set[str] = set()
    for task in waiting:
        if len(window) == TOGETHER or len(sources | {task.source}) > PROBLEMS:
            yield window
            window, sources = [], set()
        window.append(task)
        sources.add(task.source)
    if window:
        yield window


@dataclass(frozen=True, slots=True)
class _WaitingProgram:
    """A checked answer that waits to be timed, and what holds its folder."""

    task: AnswerTask
    candidate: Candidate
    folder: ExitStack


def _checked(
    bench: Bench,
    task: AnswerTask,
    right: Reference,
    settle: Callable[[AnswerTask, Judgement], None],
) -> _WaitingProgram | None:
    """The answer if it has yet to be timed; otherwise it is settled."""
    question = task.question
    with ExitStack() as stack:
        folder = stack.enter_context(bench.folder())
        checked = check(bench, right, question.model, question.prompt, task.body, folder)
        if isinstance(checked, Candidate) and checked.program_bytes > LARGE_BYTES:
            checked = time_candidate(bench, checked)
        if isinstance(checked, Candidate):
            return _WaitingProgram(task, checked, stack.pop_all())
        settle(task, checked)
        return None


def _lay_ground(
    bench: Bench, waiting: Sequence[AnswerTask], models: Sequence[Model], pool: ThreadPoolExecutor
) -> None:
    """Begin what every answer needs before the first asks for it; preludes, which take longest, first.

    What fails there fails again, and is reported, where it is asked for.
    """
    asked = {task.question.model for task in waiting}
    here: list[Model] = [model for model in models if model in asked and toolchain.runs_here(model)]
    texts: dict[tuple[str, ...], list[str]] = {}
    of_prelude: dict[tuple[str, ...], Model] = {}
    for model in here:
        flags = toolchain.flavour_of(model).prelude
        of_prelude.setdefault(flags, model)
        texts.setdefault(flags, []).extend(
            task.problem.unit(task.question.prompt, task.body)
            for task in waiting
            if task.question.model == model
        )
    for flags, model in of_prelude.items():
        pool.submit(precompile, bench, model, texts[flags], second_pass=False)
    for model in here:
        pool.submit(ready, bench, model)
    for flags, model in of_prelude.items():
        pool.submit(precompile, bench, model, texts[flags], second_pass=True)


@contextmanager
def _pool(jobs: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that begin nothing new once something went wrong."""
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _reference(bench: Bench, task: AnswerTask) -> Reference:
    if isinstance(task.problem, CheckoutProblem):
        return checkout_reference(bench, task.problem, task.question.prompt)
    return reference(bench, task.problem)
