"""The tables of a scoring: results in ParEval's layout, metrics under both definitions, verdicts."""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from fourfold_hpc_coder.score.intervals import NO_INTERVAL, Interval, bootstrap, wilson
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


@dataclass(frozen=True, slots=True, kw_only=True)
class RateEstimate:
    """A rate of a model over problems, with its intervals of 95 %."""

    model: Model
    problem_type: str
    """`all` for every type together."""
    name: str
    """As in `metrics.csv`: `pass@1`."""
    value: float
    wilson: Interval
    """Over samples; NaN where the rate is no share of samples."""
    bootstrap: Interval
    """Over problems; NaN where there is one."""
    prompts: int
    samples: int

    def __str__(self) -> str:
        """As in a sentence: `pass@1 0.50 [0.24, 0.76] over 10 samples, [0.30, 0.70] over 5 problems`."""
        parts = []
        if not math.isnan(self.wilson[0]):
            parts.append(
                f"[{self.wilson[0]:.2f}, {self.wilson[1]:.2f}] over {self.samples} samples"
            )
        if not math.isnan(self.bootstrap[0]):
            low, high = self.bootstrap
            parts.append(f"[{low:.2f}, {high:.2f}] over {self.prompts} problems")
        return f"{self.name} {self.value:.2f} {', '.join(parts)}".rstrip()


def rates(
    judged: Sequence[JudgedQuestion], ks: Sequence[int], settings: JudgeSettings
) -> list[RateEstimate]:
    """Every rate of `metrics` with its intervals, by model: over all problems, then by type."""
    prompts = [entry.prompt for entry in judged]
    rows: list[RateEstimate] = []
    models: list[Model] = sorted({prompt.model for prompt in prompts})
    for model in models:
        of_model = [prompt for prompt in prompts if prompt.model == model]
        groups = {"all": of_model}
        for kind in sorted({prompt.problem_type for prompt in of_model}):
            groups[kind] = [prompt for prompt in of_model if prompt.problem_type == kind]
        for kind, group in groups.items():
            rows += _rates_of(group, model, kind, ks, settings)
    return rows


def _rates_of(
    group: Sequence[Prompt], model: Model, kind: str, ks: Sequence[int], settings: JudgeSettings
) -> list[RateEstimate]:
    samples = [sample for prompt in group for sample in prompt.samples]
    runs = toolchain.runs_here(model)
    processors = max(settings.of(model), key=lambda launch: launch.count)
    rows: list[RateEstimate] = []

    def add(name: str, statistic: Callable[[Sequence[Prompt]], float], ends: Interval) -> None:
        rows.append(
            RateEstimate(
                model=model,
                problem_type=kind,
                name=name,
                value=statistic(group),
                wilson=ends,
                bootstrap=bootstrap(group, statistic),
                prompts=len(group),
                samples=len(samples),
            )
        )

    for k in ks:
        # With one of k chosen, and as many samples of each prompt, the rate is a share of samples.
        is_share = k == 1 and len({len(prompt.samples) for prompt in group}) == 1
        built, counted, right = (
            wilson(sum(map(is_so, samples)), len(samples)) if is_share else NO_INTERVAL
            for is_so in (
                lambda sample: sample.built,
                lambda sample: sample.counts,
                lambda sample: sample.right,
            )
        )
        add(f"build@{k}", partial(build_at_k, k=k), built)
        if runs:
            add(f"pass@{k}", partial(pass_at_k, k=k), counted)
            add(f"pass@{k}, parallel or not", partial(pass_at_k, k=k, parallel=False), right)
            add(f"speedup_n@{k}", partial(speedup_at_k, k=k, processors=processors), NO_INTERVAL)
            efficiency = partial(efficiency_at_k, k=k, processors=processors)
            add(f"efficiency_n@{k}", efficiency, NO_INTERVAL)
            add(f"speedup_max@{k}", partial(speedup_max_at_k, k=k), NO_INTERVAL)
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


def _rate_fields(rate: RateEstimate) -> Fields:
    return {
        "execution model": rate.model,
        "problem type": rate.problem_type,
        "rate": rate.name,
        "value": rate.value,
        "wilson low": rate.wilson[0],
        "wilson high": rate.wilson[1],
        "bootstrap low": rate.bootstrap[0],
        "bootstrap high": rate.bootstrap[1],
        "prompts": rate.prompts,
        "samples": rate.samples,
    }


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
        "rates.csv": files.table(
            [_rate_fields(rate) for rate in rates(scored.judged, ks, settings)]
        ),
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
