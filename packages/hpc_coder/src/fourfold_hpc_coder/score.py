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
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path

from fourfold_hpc_coder import pareval, published, toolchain
from fourfold_hpc_coder.evaluation import (
    Launch,
    Model,
    Prompt,
    Run,
    Sample,
    build_at_k,
    conditional_speedup_at_1,
    efficiency_at_k,
    pass_at_k,
    speedup_at_k,
    speedup_max_at_k,
)
from fourfold_hpc_coder.judge import Bench, Judgement, Reference, Settings, judge, reference
from fourfold_hpc_coder.pareval import Fields, Question
from fourfold_hpc_coder.problems import Problem, find_problem
from fourfold_hpc_coder.sandbox import Sandbox, scratch_folder
from fourfold_parallel.run.files import cache_folder, write_text
from fourfold_parallel.run.progress import Progress
from fourfold_parallel.run.values import digest

log = logging.getLogger(__name__)

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to score and how."""

    outputs: Path
    folder: Path
    """Receives the journal, the results and the report."""
    models: tuple[Model, ...]
    settings: Settings
    sandbox: Sandbox
    jobs: int
    """Answers built and checked at once; timing is always done alone."""
    ks: tuple[int, ...]
    is_cached: bool
    """Whether verdicts of equal answers in earlier scorings are used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
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
class Scored:
    """Everything that a scoring found."""

    judged: tuple[Judged, ...]
    problems: tuple[pareval.Problem, ...]
    """What could not be scored, and why."""
    notes: tuple[str, ...]
    """Questions that the numbers cannot answer, such as k above the number of samples."""
    reused: int
    """Answers whose verdict was in the journal or the cache, or equal to another's."""


@dataclass(frozen=True, slots=True)
class _Task:
    """One distinct answer, and every place of the file where it stands."""

    question: Question
    problem: Problem
    body: str
    key: str
    places: tuple[tuple[int, int], ...]


def score(plan: Plan, progress: Progress) -> Scored:
    """Judge every output of the file, then write results, metrics and journal.

    Raises:
        ValueError: where the file is no list of outputs, the folder holds another file's scores, or nothing
            in the file can be scored.
    """
    questions, problems = pareval.read_outputs(plan.outputs)
    kept, left_out = _scorable(questions, plan.models)
    problems = (*problems, *left_out)
    if not kept:
        reasons = "; ".join(f"{one.place}: {one.because}" for one in problems[:3])
        raise ValueError(f"nothing in {plan.outputs} can be scored. {reasons or 'It is empty'}")
    tasks = _tasks(kept, plan.settings)
    with _Journal(plan) as journal, scratch_folder() as scratch:
        found = {task.key: held for task in tasks if (held := journal.held.get(task.key))}
        if plan.is_cached:
            for task in tasks:
                if task.key not in found and (held := _cached(task.key)):
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
        progress(answers - len(waiting), answers, "")
        fresh, failed = _judge_all(bench, waiting, plan, journal, progress, answers)
    found.update(fresh)
    judged = tuple(
        Judged(
            question=question,
            judgements=tuple(found[key] for key in keys),
        )
        for (question, _), keys in (
            (one, [_key(*one, body, plan.settings) for body in one[0].outputs]) for one in kept
        )
        if all(key in found for key in keys)
    )
    scored = Scored(
        judged=judged,
        problems=(*problems, *failed),
        notes=_notes(judged, plan.ks),
        reused=answers - len(fresh),
    )
    write_results(scored, plan.folder, plan.ks, plan.settings)
    return scored


def _scorable(
    questions: Sequence[Question], models: Sequence[Model]
) -> tuple[list[tuple[Question, Problem]], list[pareval.Problem]]:
    kept, left_out = [], []
    absent = {model: toolchain.missing(model) for model in models}
    for question in questions:
        place = f"{question.name} ({question.model})"
        if question.model not in models:
            continue
        try:
            problem = find_problem(question.name, question.prompt)
        except ValueError as error:
            left_out.append(pareval.Problem(place=place, because=str(error)))
            continue
        if absent[question.model]:
            left_out.append(pareval.Problem(place=place, because=absent[question.model]))
        else:
            kept.append((question, problem))
    return kept, left_out


def _tasks(kept: Sequence[tuple[Question, Problem]], settings: Settings) -> list[_Task]:
    """Distinct answers, those to one problem together."""
    found: dict[str, _Task] = {}
    for entry, (question, problem) in enumerate(kept):
        for index, body in enumerate(question.outputs):
            key = _key(question, problem, body, settings)
            before = found.get(key)
            places = (*(before.places if before else ()), (entry, index))
            found[key] = _Task(question, problem, body, key, places)
    return sorted(found.values(), key=lambda task: (task.problem.name, task.places))


@lru_cache(maxsize=1)
def _machinery() -> str:
    """Digest of everything of ours that a verdict depends on."""
    whole = hashlib.sha256()
    package = importlib.resources.files("fourfold_hpc_coder")
    names = (
        "judge.py",
        "channel.py",
        "parallelism.py",
        "failures.py",
        "toolchain.py",
        "kernels.py",
    )
    files = [package / name for name in names]
    files += sorted((package / "drivers").iterdir(), key=lambda one: one.name)
    for file in files:
        if file.is_file():
            whole.update(file.read_bytes())
    return whole.hexdigest()


@cache
def _identity(model: Model) -> str:
    return toolchain.identity(model)


def _key(question: Question, problem: Problem, body: str, settings: Settings) -> str:
    return answer_key(problem, question.model, question.prompt, body, settings)


def answer_key(problem: Problem, model: Model, prompt: str, body: str, settings: Settings) -> str:
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
    problem: Problem,
    model: Model,
    prompt: str,
    body: str,
    settings: Settings,
    fresh: Callable[[str], Judgement],
) -> Judgement:
    """The verdict of an equal answer from the cache, or a fresh one, which is kept."""
    key = answer_key(problem, model, prompt, body, settings)
    held = _cached(key)
    if held is None:
        held = fresh(body)
        _keep(key, held)
    return held


def _judge_all(
    bench: Bench,
    waiting: Sequence[_Task],
    plan: Plan,
    journal: "_Journal",
    progress: Progress,
    answers: int,
) -> tuple[dict[str, Judgement], list[pareval.Problem]]:
    """Judge what is left, problem by problem; a problem whose reference fails is reported, not fatal."""
    found: dict[str, Judgement] = {}
    failed: list[pareval.Problem] = []
    groups: dict[str, list[_Task]] = {}
    for task in waiting:
        groups.setdefault(task.problem.name, []).append(task)

    def one(task: _Task, right: Reference) -> None:
        with bench.quiet.working():
            judgement = judge(bench, right, task.question.model, task.question.prompt, task.body)
        journal.write(task.key, judgement)
        _keep(task.key, judgement)
        found[task.key] = judgement
        note = f"{task.problem.name} {task.question.model}: {judgement.verdict}"
        progress(answers - len(waiting) + len(found), answers, note)

    with ThreadPoolExecutor(max_workers=plan.jobs) as pool:
        for name, tasks in groups.items():
            try:
                with bench.quiet.working():
                    right = reference(bench, tasks[0].problem)
            except RuntimeError as error:
                failed.append(pareval.Problem(place=name, because=str(error)[:500]))
                continue
            for done in [pool.submit(one, task, right) for task in tasks]:
                done.result()
    return found, failed


class _Journal:
    """Append-only verdicts of one scoring; its first line says of what."""

    def __init__(self, plan: Plan) -> None:
        self.path = plan.folder / "verdicts.jsonl"
        self.held: dict[str, Judgement] = {}
        self._lock = threading.Lock()
        self._of = hashlib.sha256(plan.outputs.read_bytes()).hexdigest()
        self.secret = secrets.randbits(63)
        whole = self._read(plan.outputs) if self.path.exists() else b""
        plan.folder.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._handle, len(whole))
        if not whole:
            self._append({"schema": SCHEMA, "outputs_sha256": self._of, "secret": self.secret})

    def _read(self, outputs: Path) -> bytes:
        """Take the lines that are whole; refuse the journal of another file."""
        content = self.path.read_bytes()
        content = content[: content.rfind(b"\n") + 1]
        lines = [json.loads(line) for line in content.splitlines()]
        if not lines:
            return b""
        if lines[0].get("outputs_sha256") != self._of or lines[0].get("schema") != SCHEMA:
            raise ValueError(
                f"{self.path.parent} holds the scores of another file than {outputs}; "
                "name another folder with --out, or remove that one"
            )
        self.secret = lines[0]["secret"]
        self.held = {line["key"]: judgement_of(line) for line in lines[1:]}
        return content

    def write(self, key: str, judgement: Judgement) -> None:
        """Append a verdict."""
        with self._lock:
            self._append({"key": key, **judgement_fields(judgement)})

    def _append(self, fields: Fields) -> None:
        os.write(self._handle, (json.dumps(fields) + "\n").encode())

    def __enter__(self) -> "_Journal":
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self._handle)
        os.close(self._handle)


def judgement_fields(judgement: Judgement) -> Fields:
    """A judgement as plain JSON; what is not a number is null."""
    sample = judgement.sample
    return {
        "verdict": judgement.verdict,
        "because": judgement.because,
        "proof": judgement.proof,
        "output": judgement.output,
        "built": sample.built,
        "parallel": sample.parallel,
        "best_sequential_s": _null(sample.best_sequential_s),
        "runs": [
            {
                "ranks": run.launch.ranks,
                "threads": run.launch.threads,
                "ran": run.ran,
                "valid": run.valid,
                "runtime_s": _null(run.runtime_s),
            }
            for run in sample.runs
        ],
    }


def judgement_of(fields: Fields) -> Judgement:
    """The judgement that `judgement_fields` wrote."""
    runs = tuple(
        Run(
            launch=Launch(ranks=run["ranks"], threads=run["threads"]),
            ran=run["ran"],
            valid=run["valid"],
            runtime_s=_nan(run["runtime_s"]),
        )
        for run in fields["runs"]
    )
    sample = Sample(
        built=fields["built"],
        parallel=fields["parallel"],
        runs=runs,
        best_sequential_s=_nan(fields["best_sequential_s"]),
    )
    return Judgement(
        verdict=fields["verdict"],
        because=fields["because"],
        sample=sample,
        output=fields["output"],
        proof=fields["proof"],
    )


def _null(value: float) -> float | None:
    return None if math.isnan(value) else value


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def _cache_file(key: str) -> Path:
    return cache_folder() / "hpc_coder" / "verdicts" / key[:2] / f"{key}.json"


def _cached(key: str) -> Judgement | None:
    try:
        return judgement_of(json.loads(_cache_file(key).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError):
        return None


def _keep(key: str, judgement: Judgement) -> None:
    # A limit that was hit on a busy machine need not be hit again.
    if judgement.verdict != "timeout":
        write_text(_cache_file(key), json.dumps(judgement_fields(judgement)))


def _notes(judged: Iterable[Judged], ks: Sequence[int]) -> tuple[str, ...]:
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


def metrics(judged: Sequence[Judged], ks: Sequence[int], settings: Settings) -> list[Fields]:
    """Our definitions, a row per model and problem type, speed-ups on the model's largest launch."""
    rows = []
    prompts = [one.prompt for one in judged]
    kinds: list[tuple[Model, str]] = sorted({(p.model, p.problem_type) for p in prompts})
    for model, problem_type in kinds:
        group = [p for p in prompts if (p.model, p.problem_type) == (model, problem_type)]
        launch = max(settings.of(model), key=lambda one: one.processors)
        row: Fields = {
            "execution model": model,
            "problem type": problem_type,
            "prompts": len(group),
            "samples": sum(len(p.samples) for p in group),
            "processors": launch.processors,
        }
        for k in ks:
            row[f"build@{k}"] = build_at_k(group, k)
            row[f"pass@{k}"] = pass_at_k(group, k)
            row[f"pass@{k}, parallel or not"] = pass_at_k(group, k, parallel=False)
            row[f"speedup_n@{k}"] = speedup_at_k(group, k, launch=launch)
            row[f"speedup_max@{k}"] = speedup_max_at_k(group, k)
            row[f"efficiency_n@{k}"] = efficiency_at_k(group, k, launch=launch)
        row["speedup_n of samples that count"] = conditional_speedup_at_1(group, launch=launch)
        rows.append(row)
    return rows


def results(judged: Sequence[Judged]) -> list[Fields]:
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
    scored: Scored, folder: Path, ks: Sequence[int], settings: Settings
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


def with_launches(settings: Settings, chosen: Mapping[Model, tuple[Launch, ...]]) -> Settings:
    """Settings with other launches for some models."""
    launches: dict[Model, tuple[Launch, ...]] = {**dict(settings.launches), **chosen}
    return replace(settings, launches=tuple(launches.items()))


def counts(scored: Scored) -> dict[str, dict[str, int]]:
    """Number of answers per model and verdict."""
    found: dict[str, dict[str, int]] = {}
    for one in scored.judged:
        of_model: dict[str, int] = found.setdefault(one.question.model, {})
        for judgement in one.judgements:
            of_model[judgement.verdict] = of_model.get(judgement.verdict, 0) + 1
    return found
