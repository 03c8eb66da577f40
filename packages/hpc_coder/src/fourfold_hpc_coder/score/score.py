"""Score a file of model outputs: every answer judged once, journalled, cached, and resumable.

Beside the answers' verdicts, a scoring leaves `results.json` and `runs.csv` in ParEval's layout, the metrics
under both sets of definitions, and a report. The journal is the truth: one line per judged answer, written
whole; a scorer killed at any moment goes on from it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path

from fourfold_hpc_coder.judge import toolchain
from fourfold_hpc_coder.judge.bench import Bench, JudgeSettings
from fourfold_hpc_coder.judge.judge import Judgement
from fourfold_hpc_coder.pareval.bodies import body_of
from fourfold_hpc_coder.pareval.checkout import HOPELESS, UNSTEADY, CheckoutProblem
from fourfold_hpc_coder.pareval.files import Omission, Question, read_outputs
from fourfold_hpc_coder.problems.library import find_problem
from fourfold_hpc_coder.problems.problem import Problem
from fourfold_hpc_coder.sandbox.backends import Sandbox
from fourfold_hpc_coder.sandbox.process import find_sandbox
from fourfold_hpc_coder.sandbox.scratch import scratch_folder
from fourfold_hpc_coder.score.cache import answer_key, cached, keep
from fourfold_hpc_coder.score.journal import Journal
from fourfold_hpc_coder.score.schedule import AnswerTask, AnyProblem, judge_all
from fourfold_hpc_coder.score.tables import JudgedQuestion, ScoringResult, write_results
from fourfold_hpc_coder.vocabulary import Model
from fourfold_parallel.common.progress import Progress, silent


def built_in(question: Question) -> Problem:
    """This package's problem of the question's name."""
    return find_problem(question.name, question.prompt, question.model)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """A scoring: the file, the folder for its results, and the options."""

    outputs: str | PathLike[str]
    """ParEval's file of outputs."""
    folder: str | PathLike[str]
    """Receives the journal, the results and the report."""
    models: tuple[Model, ...] = ("serial", "omp", "mpi")
    settings: JudgeSettings = field(default_factory=JudgeSettings)
    sandbox: Sandbox = field(default_factory=lambda: find_sandbox(allow_none=False))
    jobs: int = 2
    """Answers built and checked at once; timing is always done alone."""
    ks: tuple[int, ...] = (1,)
    is_cached: bool = True
    """Whether verdicts of equal answers in earlier scorings are used."""
    extracts_bodies: bool = False
    """Whether outputs are replies of a chat, of which the function's body is judged."""
    find: Callable[[Question], AnyProblem] = built_in
    """The problem that a question is about; ValueError where there is none."""


@dataclass(frozen=True, slots=True)
class _Assignment:
    """A question that can be scored, its problem, and the key of each answer."""

    question: Question
    problem: AnyProblem
    keys: tuple[str, ...]


def score_file(scoring: Scoring, progress: Progress = silent) -> ScoringResult:
    """Judge every output of the file, then write results, metrics and journal.

    Raises:
        ValueError: where the file is no list of outputs, the folder holds another file's scores, or nothing
            in the file can be scored.
    """
    outputs, folder = Path(scoring.outputs), Path(scoring.folder)
    questions, unreadable = read_outputs(outputs)
    assignments, unscorable = _assign(questions, scoring)
    omissions = (*unreadable, *unscorable)
    if not assignments:
        raise ValueError(_nothing_to_score(scoring, questions, omissions))
    tasks = _distinct(assignments)
    answers = sum(len(assignment.keys) for assignment in assignments)
    with Journal(outputs, folder) as journal, scratch_folder() as scratch:
        verdicts = dict(_known(tasks, journal, is_cached=scoring.is_cached))
        waiting = [task for task in tasks if task.key not in verdicts]
        known = answers - len(waiting)
        fresh: dict[str, Judgement] = {}

        def settle(task: AnswerTask, judgement: Judgement) -> None:
            journal.write(task.key, judgement)
            keep(task.key, judgement)
            fresh[task.key] = judgement
            note = f"{task.problem.name} {task.question.model}: {judgement.verdict}"
            progress(known + len(fresh), answers, note)

        progress(known, answers, "")
        bench = Bench(
            sandbox=scoring.sandbox,
            scratch=scratch,
            settings=scoring.settings,
            secret=journal.secret,
        )
        failed = judge_all(bench, waiting, scoring.models, scoring.jobs, settle)
    verdicts.update(fresh)
    judged = _judged(assignments, verdicts)
    result = ScoringResult(
        judged=judged,
        omissions=(
            *omissions,
            *(Omission(place=place, because=why) for place, why in failed.items()),
        ),
        notes=(*_undefined(judged, scoring.ks), *_hopeless(assignments)),
        reused=sum(len(entry.judgements) for entry in judged) - len(fresh),
    )
    write_results(result, folder, scoring.ks, scoring.settings)
    return result


def _assign(
    questions: Iterable[Question], scoring: Scoring
) -> tuple[list[_Assignment], list[Omission]]:
    """The questions that can be scored here, and why the others of the chosen models cannot."""
    assignments, omissions = [], []
    barred = {model: toolchain.barred(model, scoring.sandbox) for model in scoring.models}
    for question in questions:
        if question.model not in scoring.models:
            continue
        place = f"{question.name} ({question.model})"
        try:
            problem = scoring.find(question)
        except ValueError as error:
            omissions.append(Omission(place=place, because=str(error)))
            continue
        if barred[question.model]:
            omissions.append(Omission(place=place, because=barred[question.model]))
            continue
        asked = _with_bodies(question) if scoring.extracts_bodies else question
        keys = tuple(
            answer_key(problem, asked.model, asked.prompt, body, scoring.settings)
            for body in asked.outputs
        )
        assignments.append(_Assignment(asked, problem, keys))
    return assignments, omissions


def _with_bodies(question: Question) -> Question:
    """The question with the function's body of each reply; the replies stay beside them, in `raw_outputs`."""
    return replace(
        question,
        outputs=tuple(body_of(reply, question.prompt) for reply in question.outputs),
        fields={**question.fields, "raw_outputs": [*question.outputs]},
    )


def _nothing_to_score(
    scoring: Scoring, questions: Iterable[Question], omissions: Sequence[Omission]
) -> str:
    reasons = "; ".join(f"{omission.place}: {omission.because}" for omission in omissions[:3])
    others = ", ".join(sorted({question.model for question in questions} - {*scoring.models}))
    empty = f"It has prompts for {others} only; name one with --models" if others else "It is empty"
    return f"nothing in {scoring.outputs} can be scored. {reasons or empty}"


def _distinct(assignments: Iterable[_Assignment]) -> list[AnswerTask]:
    """Distinct answers, those to one problem together."""
    tasks: dict[str, AnswerTask] = {}
    for entry, assignment in enumerate(assignments):
        for index, (body, key) in enumerate(
            zip(assignment.question.outputs, assignment.keys, strict=True)
        ):
            before = tasks[key].places if key in tasks else ()
            tasks[key] = AnswerTask(
                assignment.question, assignment.problem, body, key, (*before, (entry, index))
            )
    return sorted(tasks.values(), key=lambda task: (task.problem.name, task.places))


def _known(
    tasks: Iterable[AnswerTask], journal: Journal, *, is_cached: bool
) -> Iterator[tuple[str, Judgement]]:
    """Verdicts of this scoring's journal and, where asked for, of the cache, which the journal takes in."""
    for task in tasks:
        if task.key in journal.verdicts:
            yield task.key, journal.verdicts[task.key]
        elif is_cached and (judgement := cached(task.key)):
            journal.write(task.key, judgement)
            yield task.key, judgement


def _judged(
    assignments: Iterable[_Assignment], verdicts: Mapping[str, Judgement]
) -> tuple[JudgedQuestion, ...]:
    """The questions all of whose answers have a verdict."""
    return tuple(
        JudgedQuestion(
            question=assignment.question, judgements=tuple(verdicts[key] for key in assignment.keys)
        )
        for assignment in assignments
        if all(key in verdicts for key in assignment.keys)
    )


def _undefined(judged: Iterable[JudgedQuestion], ks: Sequence[int]) -> Iterator[str]:
    """A note for every k that is above a prompt's number of samples."""
    prompts: dict[int, list[str]] = {}
    for entry in judged:
        for k in ks:
            if k > len(entry.judgements):
                prompts.setdefault(k, []).append(f"{entry.question.name} ({entry.question.model})")
    for k, names in prompts.items():
        yield (
            f"k={k} is above the number of samples of {len(names)} prompts, such as {names[0]}: their "
            "metrics at this k are not defined and stay empty; generate more samples or ask for a smaller k"
        )


def _hopeless(assignments: Iterable[_Assignment]) -> Iterator[str]:
    """A note for every problem of a checkout whose own check refuses right answers, or says little."""
    names = {
        assignment.problem.name
        for assignment in assignments
        if isinstance(assignment.problem, CheckoutProblem) and assignment.question.model != "cuda"
    }
    for name in sorted(names & {*HOPELESS}):
        yield f"no answer to {name} passes with ParEval's driver: {HOPELESS[name]}"
    for name in sorted(names & {*UNSTEADY}):
        yield f"ParEval's check of {name} says little: {UNSTEADY[name]}"
