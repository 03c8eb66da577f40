"""The tables of a scoring: results in ParEval's layout, metrics under both definitions, verdicts."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from fourfold_hpc_coder.judge.bench import JudgeSettings
from fourfold_hpc_coder.judge.judge import Judgement
from fourfold_hpc_coder.pareval import files
from fourfold_hpc_coder.pareval import metrics as published
from fourfold_hpc_coder.pareval.files import Fields, Omission, Question
from fourfold_hpc_coder.vocabulary import Model, Prompt
from fourfold_parallel.common.files import write_text


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedQuestion:
    """A question with the judgement of each of its outputs."""

    question: Question
    judgements: tuple[Judgement, ...]

    @property
    def prompt(self) -> Prompt:
        """The question as the metrics need it."""
        return Prompt(
            name=self.question.name,
            problem_type=self.question.problem_type,
            model=self.question.model,
            samples=tuple(judgement.sample for judgement in self.judgements),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringResult:
    """Everything that a scoring found."""

    judged: tuple[JudgedQuestion, ...]
    omissions: tuple[Omission, ...]
    """Entries that could not be scored, and why."""
    notes: tuple[str, ...]
    """Questions that the numbers cannot answer, such as k above the number of samples."""
    reused: int
    """Answers whose verdict was in the journal or the cache, or equal to another's."""

    def counts(self) -> dict[Model, Counter[str]]:
        """Number of answers per model and verdict."""
        counters: dict[Model, Counter[str]] = {}
        for entry in self.judged:
            counter = counters.setdefault(entry.question.model, Counter())
            counter.update(judgement.verdict for judgement in entry.judgements)
        return counters


def metrics(
    judged: Sequence[JudgedQuestion], ks: Sequence[int], settings: JudgeSettings
) -> list[Fields]:
    """Our definitions, a row per model and problem type, speed-ups on the model's largest launch."""
    rows = []
    prompts = [entry.prompt for entry in judged]
    kinds: list[tuple[Model, str]] = sorted({(p.model, p.problem_type) for p in prompts})
    for model, problem_type in kinds:
        group = [p for p in prompts if (p.model, p.problem_type) == (model, problem_type)]
        processors = max(settings.of(model), key=lambda launch: launch.count)
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
            **entry.question.fields,
            "outputs": [
                files.result_fields(body, judgement.sample, entry.question.model)
                for body, judgement in zip(entry.question.outputs, entry.judgements, strict=True)
            ],
        }
        for entry in judged
    ]


def write_results(
    scored: ScoringResult, folder: Path, ks: Sequence[int], settings: JudgeSettings
) -> Mapping[str, Path]:
    """Write every table, each whole; the HTML page is `report.write`'s."""
    entries = results(scored.judged)
    prompts = [entry.prompt for entry in scored.judged]
    verdicts = [
        {
            "name": entry.question.name,
            "parallelism_model": entry.question.model,
            "output_idx": index,
            "verdict": judgement.verdict,
            "because": judgement.because,
            "proof": judgement.proof,
        }
        for entry in scored.judged
        for index, judgement in enumerate(entry.judgements)
    ]
    texts: dict[str, str] = {
        "results.json": json.dumps(entries, indent=1) + "\n",
        "runs.csv": files.runs_csv(entries),
        "metrics.csv": files.table(metrics(scored.judged, ks, settings)),
        "metrics-pareval.csv": files.table(published.metrics(prompts, ks, sizes={})),
        "verdicts.csv": files.table(verdicts),
        "left-out.csv": files.table(
            [
                {"place": omission.place, "because": omission.because}
                for omission in scored.omissions
            ]
        ),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return {name: folder / name for name in texts}
