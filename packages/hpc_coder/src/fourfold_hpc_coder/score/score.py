"""Score a file of model outputs: every answer judged once, journalled, cached, and resumable.

Beside the answers' verdicts, a scoring leaves `results.json` and `runs.csv` in ParEval's layout, the metrics
under both sets of definitions, and a report. The journal is the truth: one line per judged answer, written
whole; a scorer killed at any moment goes on from it.
"""

import hashlib
import importlib.resources
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from fourfold_hpc_coder.evaluation import (
    build_at_k,
    conditional_speedup_at_1,
    efficiency_at_k,
    pass_at_k,
    speedup_at_k,
    speedup_max_at_k,
)
from fourfold_hpc_coder.judge import toolchain
from fourfold_hpc_coder.judge.bench import Bench, JudgeSettings
from fourfold_hpc_coder.judge.judge import Judgement
from fourfold_hpc_coder.pareval import files as pareval
from fourfold_hpc_coder.pareval import metrics as published
from fourfold_hpc_coder.pareval.checkout import HOPELESS, CheckoutProblem
from fourfold_hpc_coder.pareval.files import Fields, Omission, Question
from fourfold_hpc_coder.problems import Problem, find_problem
from fourfold_hpc_coder.sandbox.backends import Sandbox
from fourfold_hpc_coder.sandbox.process import scratch_folder
from fourfold_hpc_coder.score.journal import Journal, cached, keep
from fourfold_hpc_coder.score.schedule import AnswerTask, AnyProblem, judge_all
from fourfold_hpc_coder.vocabulary import Model, Prompt
from fourfold_parallel.common.files import write_text
from fourfold_parallel.common.progress import Progress
from fourfold_parallel.common.values import digest

log = logging.getLogger(__name__)


def built_in(question: Question) -> Problem:
    """This package's problem of the question's name."""
    return find_problem(question.name, question.prompt, question.model)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """What to score and how."""

    outputs: Path
    folder: Path
    """Receives the journal, the results and the report."""
    models: tuple[Model, ...]
    settings: JudgeSettings
    sandbox: Sandbox
    jobs: int
    """Answers built and checked at once; timing is always done alone."""
    ks: tuple[int, ...]
    is_cached: bool
    """Whether verdicts of equal answers in earlier scorings are used."""
    find: Callable[[Question], AnyProblem] = built_in
    """The problem that a question is about; ValueError where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedQuestion:
    """A question with the judgement of each of its outputs."""

    question: Question
    judgements: tuple[Judgement, ...]

    @property
    def prompt(self) -> Prompt:
        """What the metrics need."""
        return Prompt(
            name=self.question.name,
            problem_type=self.question.problem_type,
            model=self.question.model,
            samples=tuple(one.sample for one in self.judgements),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringResult:
    """Everything that a scoring found."""

    judged: tuple[JudgedQuestion, ...]
    problems: tuple[Omission, ...]
    """What could not be scored, and why."""
    notes: tuple[str, ...]
    """Questions that the numbers cannot answer, such as k above the number of samples."""
    reused: int
    """Answers whose verdict was in the journal or the cache, or equal to another's."""


def score(plan: Scoring, progress: Progress) -> ScoringResult:
    """Judge every output of the file, then write results, metrics and journal.

    Raises:
        ValueError: where the file is no list of outputs, the folder holds another file's scores, or nothing
            in the file can be scored.
    """
    questions, problems = pareval.read_outputs(plan.outputs)
    kept, left_out = _scorable(questions, plan)
    problems = (*problems, *left_out)
    if not kept:
        reasons = "; ".join(f"{one.place}: {one.because}" for one in problems[:3])
        others = ", ".join(sorted({one.model for one in questions} - {*plan.models}))
        none = (
            f"It has prompts for {others} only; name one with --models" if others else "It is empty"
        )
        raise ValueError(f"nothing in {plan.outputs} can be scored. {reasons or none}")
    tasks = _tasks(kept, plan.settings)
    with Journal(plan.outputs, plan.folder) as journal, scratch_folder() as scratch:
        found = {task.key: held for task in tasks if (held := journal.held.get(task.key))}
        if plan.is_cached:
            for task in tasks:
                if task.key not in found and (held := cached(task.key)):
                    found[task.key] = held
                    journal.write(task.key, held)
        answers = sum(len(question.outputs) for question, _ in kept)
        waiting = [task for task in tasks if task.key not in found]
        bench = Bench(
            sandbox=plan.sandbox,
            scratch=scratch,
            settings=plan.settings,
            secret=journal.secret,
        )
        fresh: dict[str, Judgement] = {}

        def settle(task: AnswerTask, judgement: Judgement) -> None:
            journal.write(task.key, judgement)
            keep(task.key, judgement)
            fresh[task.key] = judgement
            note = f"{task.problem.name} {task.question.model}: {judgement.verdict}"
            progress(answers - len(waiting) + len(fresh), answers, note)

        progress(answers - len(waiting), answers, "")
        failed = judge_all(bench, waiting, plan.models, plan.jobs, settle)
    found.update(fresh)
    judged = tuple(
        JudgedQuestion(
            question=question,
            judgements=tuple(found[key] for key in keys),
        )
        for (question, _), keys in (
            (one, [_key(*one, body, plan.settings) for body in one[0].outputs]) for one in kept
        )
        if all(key in found for key in keys)
    )
    borrowed = {q.name for q, one in kept if isinstance(one, CheckoutProblem) and q.model != "cuda"}
    hopeless = [
        f"no answer to {name} passes with ParEval's driver: {HOPELESS[name]}"
        for name in sorted(borrowed & {*HOPELESS})
    ]
    scored = ScoringResult(
        judged=judged,
        problems=(
            *problems,
            *(Omission(place=place, because=why) for place, why in failed.items()),
        ),
        notes=(*_notes(judged, plan.ks), *hopeless),
        reused=sum(len(one.judgements) for one in judged) - len(fresh),
    )
    write_results(scored, plan.folder, plan.ks, plan.settings)
    return scored


def _scorable(
    questions: Sequence[Question], plan: Scoring
) -> tuple[list[tuple[Question, AnyProblem]], list[Omission]]:
    kept, left_out = [], []
    absent = {model: toolchain.barred(model, plan.sandbox) for model in plan.models}
    for question in questions:
        place = f"{question.name} ({question.model})"
        if question.model not in plan.models:
            continue
        try:
            problem = plan.find(question)
        except ValueError as error:
            left_out.append(Omission(place=place, because=str(error)))
            continue
        if absent[question.model]:
            left_out.append(Omission(place=place, because=absent[question.model]))
        else:
            kept.append((question, problem))
    return kept, left_out


def _tasks(
    kept: Sequence[tuple[Question, AnyProblem]], settings: JudgeSettings
) -> list[AnswerTask]:
    """Distinct answers, those to one problem together."""
    found: dict[str, AnswerTask] = {}
    for entry, (question, problem) in enumerate(kept):
        for index, body in enumerate(question.outputs):
            key = _key(question, problem, body, settings)
            before = found.get(key)
            places = (*(before.places if before else ()), (entry, index))
            found[key] = AnswerTask(question, problem, body, key, places)
    return sorted(found.values(), key=lambda task: (task.problem.name, task.places))


@lru_cache(maxsize=1)
def _machinery() -> str:
    """Digest of everything of ours that a verdict depends on."""
    whole = hashlib.sha256()
    package = importlib.resources.files("fourfold_hpc_coder")
    names = (
        "pareval/checkout.py",
        "evaluation.py",
        "sandbox/job.py",
        "sandbox/process.py",
        "sandbox/backends.py",
        "sandbox/landlock.py",
        "sandbox/seccomp.py",
        "judge/bench.py",
        "judge/judge.py",
        "score/schedule.py",
        "judge/protocol.py",
        "judge/parallelism.py",
        "judge/failures.py",
        "judge/toolchain.py",
        "judge/openmp_calls.py",
        "problems/kernels.py",
        "problems/__init__.py",
        "problems/inputs.py",
    )
    files = [package / name for name in names]
    files += sorted((package / "judge" / "drivers").iterdir(), key=lambda one: one.name)
    for file in files:
        if file.is_file():
            whole.update(file.read_bytes())
    return whole.hexdigest()


@cache
def _identity(model: Model) -> str:
    return toolchain.identity(model)


def _key(question: Question, problem: AnyProblem, body: str, settings: JudgeSettings) -> str:
    return answer_key(problem, question.model, question.prompt, body, settings)


def answer_key(
    problem: AnyProblem, model: Model, prompt: str, body: str, settings: JudgeSettings
) -> str:
    """Equal keys are equal verdicts, on one machine."""
    facts = (
        _machinery(),
        _identity(model),
        digest(settings),
        repr(problem),
        model,
        prompt,
        body,
        str(len(os.sched_getaffinity(0))),
    )
    return hashlib.sha256("\0".join(facts).encode("utf-8", "surrogatepass")).hexdigest()


def equal_answers(
    problem: AnyProblem,
    model: Model,
    prompt: str,
    body: str,
    settings: JudgeSettings,
    fresh: Callable[[str], Judgement],
) -> Judgement:
    """The verdict of an equal answer from the cache, or a fresh one, which is kept."""
    key = answer_key(problem, model, prompt, body, settings)
    held = cached(key)
    if held is None:
        held = fresh(body)
        keep(key, held)
    return held


def _notes(judged: Iterable[JudgedQuestion], ks: Sequence[int]) -> tuple[str, ...]:
    fewest: dict[int, list[str]] = {}
    for one in judged:
        for k in ks:
            if k > len(one.judgements):
                fewest.setdefault(k, []).append(f"{one.question.name} ({one.question.model})")
    return tuple(
        f"k={k} is above the number of samples of {len(names)} prompts, such as {names[0]}: "
        "their metrics at this k are not defined and stay empty; generate more samples or ask for a smaller k"
        for k, names in fewest.items()
    )


def metrics(
    judged: Sequence[JudgedQuestion], ks: Sequence[int], settings: JudgeSettings
) -> list[Fields]:
    """Our definitions, a row per model and problem type, speed-ups on the model's largest launch."""
    rows = []
    prompts = [one.prompt for one in judged]
    kinds: list[tuple[Model, str]] = sorted({(p.model, p.problem_type) for p in prompts})
    for model, problem_type in kinds:
        group = [p for p in prompts if (p.model, p.problem_type) == (model, problem_type)]
        processors = max(settings.of(model), key=lambda one: one.count)
        row: Fields = {
            "execution model": model,
            "problem type": problem_type,
            "prompts": len(group),
            "samples": sum(len(p.samples) for p in group),
            "processors": processors.count,
        }
        for k in ks:
            row[f"build@{k}"] = build_at_k(group, k)
            row[f"pass@{k}"] = pass_at_k(group, k)
            row[f"pass@{k}, parallel or not"] = pass_at_k(group, k, parallel=False)
            row[f"speedup_n@{k}"] = speedup_at_k(group, k, processors=processors)
            row[f"speedup_max@{k}"] = speedup_max_at_k(group, k)
            row[f"efficiency_n@{k}"] = efficiency_at_k(group, k, processors=processors)
        row["speedup_n of samples that count"] = conditional_speedup_at_1(
            group, processors=processors
        )
        if not toolchain.runs_here(model):  # what was never run is not wrong
            row |= {
                key: math.nan for key in row if key.startswith(("pass", "speedup", "efficiency"))
            }
        rows.append(row)
    return rows


def results(judged: Sequence[JudgedQuestion]) -> list[Fields]:
    """The file's entries with each output's results, as ParEval's driver writes them."""
    return [
        {
            **one.question.fields,
            "outputs": [
                pareval.result_fields(body, judgement.sample, one.question.model)
                for body, judgement in zip(one.question.outputs, one.judgements, strict=True)
            ],
        }
        for one in judged
    ]


def write_results(
    scored: ScoringResult, folder: Path, ks: Sequence[int], settings: JudgeSettings
) -> Mapping[str, Path]:
    """Write every table, each whole; the HTML page is `report.write`'s."""
    entries = results(scored.judged)
    prompts = [one.prompt for one in scored.judged]
    verdicts = [
        {
            "name": one.question.name,
            "parallelism_model": one.question.model,
            "output_idx": index,
            "verdict": judgement.verdict,
            "because": judgement.because,
            "proof": judgement.proof,
        }
        for one in scored.judged
        for index, judgement in enumerate(one.judgements)
    ]
    texts: dict[str, str] = {
        "results.json": json.dumps(entries, indent=1) + "\n",
        "runs.csv": pareval.runs_csv(entries),
        "metrics.csv": pareval.table(metrics(scored.judged, ks, settings)),
        "metrics-pareval.csv": pareval.table(published.metrics(prompts, ks, sizes={})),
        "verdicts.csv": pareval.table(verdicts),
        "left-out.csv": pareval.table(
            [{"place": one.place, "because": one.because} for one in scored.problems]
        ),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return {name: folder / name for name in texts}


def counts(scored: ScoringResult) -> dict[str, dict[str, int]]:
    """Number of answers per model and verdict."""
    found: dict[str, dict[str, int]] = {}
    for one in scored.judged:
        of_model: dict[str, int] = found.setdefault(one.question.model, {})
        for judgement in one.judgements:
            of_model[judgement.verdict] = of_model.get(judgement.verdict, 0) + 1
    return found
