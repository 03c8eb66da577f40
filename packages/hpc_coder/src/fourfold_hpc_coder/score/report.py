"""One self-contained HTML page of a scoring: tables, curves, and each answer with its verdict."""

import difflib
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from fourfold_hpc_coder.judge.bench import JudgeSettings
from fourfold_hpc_coder.judge.judge import Judgement
from fourfold_hpc_coder.pareval.files import Fields
from fourfold_hpc_coder.problems.library import own_problems
from fourfold_hpc_coder.score.tables import JudgedQuestion, ScoringResult, metrics, rates
from fourfold_hpc_coder.vocabulary import Processors
from fourfold_parallel.common.files import write_text
from fourfold_parallel.reproduce.page import render

GOOD, POOR, BAD = "good", "poor", "bad"
_TONE: Mapping[str, str] = {
    "correct": GOOD,
    "not parallel": POOR,
    "race": POOR,
    "compiled, not run": POOR,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerView:
    """One answer as the page shows it."""

    index: int
    verdict: str
    tone: str
    because: str
    proof: str
    code: str
    difference: str
    """HTML: lines that the reference has otherwise."""
    output: str
    runs: tuple[Fields, ...]
    curve: str
    """SVG of speed-up over processors, empty where nothing was timed on several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptView:
    """One prompt as the page shows it."""

    anchor: str
    name: str
    model: str
    prompt: str
    reference: str
    answers: tuple[AnswerView, ...]


def write(
    scored: ScoringResult,
    path: str | PathLike[str],
    *,
    title: str,
    ks: Sequence[int],
    settings: JudgeSettings,
    facts: Sequence[str],
) -> Path:
    """Write the page, whole.

    Args:
        scored: what a scoring found.
        path: of the HTML file.
        title: shown at the top; the file that was scored.
        ks: k of the metrics.
        settings: with the launches.
        facts: lines about the machine: compilers, sandbox.
    """
    rendered = render(
        Path(__file__).with_name("report.html.jinja"),
        title=title,
        facts=facts,
        counts=scored.counts(),
        metrics=metrics(scored.judged, ks, settings),
        rates=[rate for rate in rates(scored.judged, ks, settings) if rate.problem_type == "all"],
        matrix=_matrix(scored.judged),
        models=sorted({entry.question.model for entry in scored.judged}),
        pages=[_page(number, entry) for number, entry in enumerate(scored.judged)],
        omissions=scored.omissions,
        notes=scored.notes,
        tone=lambda verdict: _TONE.get(verdict, BAD),
        number=_number,
    )
    page = Path(path)
    write_text(page, rendered)
    return page


def _number(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3g}"
    return str(value)


def _matrix(judged: Sequence[JudgedQuestion]) -> dict[str, dict[str, tuple[str, str, str]]]:
    """By problem and model: answers that count, the tone of that share, and the anchor of the page."""
    rows: dict[str, dict[str, tuple[str, str, str]]] = {}
    for number, entry in enumerate(judged):
        right = sum(judgement.sample.counts for judgement in entry.judgements)
        total = len(entry.judgements)
        tone = GOOD if right == total else POOR if right else BAD
        rows.setdefault(entry.question.name, {})[entry.question.model] = (
            f"{right}/{total}",
            tone,
            f"p{number}",
        )
    return dict(sorted(rows.items()))


def _page(number: int, judged: JudgedQuestion) -> PromptView:
    problem = own_problems().get(judged.question.name)
    has_answer = problem is not None and judged.question.model in problem.models
    reference = problem.answer(judged.question.model) if problem and has_answer else ""
    return PromptView(
        anchor=f"p{number}",
        name=judged.question.name,
        model=judged.question.model,
        prompt=judged.question.prompt,
        reference=reference,
        answers=tuple(
            _answer(index, body, judgement, reference)
            for index, (body, judgement) in enumerate(
                zip(judged.question.outputs, judged.judgements, strict=True)
            )
        ),
    )


def _answer(index: int, body: str, judgement: Judgement, reference: str) -> AnswerView:
    runs = tuple(
        {
            "launch": str(run.processors),
            "outcome": "right" if run.valid else ("wrong" if run.ran else "did not end by itself"),
            "runtime_s": run.runtime_s,
            "speedup": judgement.sample.best_sequential_s / max(run.runtime_s, 1e-9),
        }
        for run in judgement.sample.runs
    )
    return AnswerView(
        index=index,
        verdict=judgement.verdict,
        tone=_TONE.get(judgement.verdict, BAD),
        because=judgement.because,
        proof=judgement.proof,
        code=body,
        difference=_difference(reference, body) if reference else "",
        output=judgement.output,
        runs=runs,
        curve=speedup_curve(
            {
                run.processors: judgement.sample.best_sequential_s / run.runtime_s
                for run in judgement.sample.runs
                if run.runtime_s > 0
            }
        ),
    )


def _difference(reference: str, body: str) -> str:
    """Lines of a unified difference, marked; escaped."""
    lines = difflib.unified_diff(
        reference.split("\n"), body.split("\n"), "reference", "answer", lineterm="", n=2
    )
    marked = []
    for line in lines:
        kind = {"+": "added", "-": "removed", "@": "place"}.get(line[:1], "same")
        marked.append(f'<span class="{kind}">{html.escape(line)}</span>')
    return "\n".join(marked)


def speedup_curve(speedups: Mapping[Processors, float]) -> str:
    """Speed-up over processors as a small SVG, with the ideal dashed; empty for one launch."""
    points = sorted((processors.count, value) for processors, value in speedups.items())
    if len({processors for processors, _ in points}) < 2:
        return ""
    width, height, left, below = 260, 130, 34, 24
    most = max(processors for processors, _ in points)
    top = max(most, *(value for _, value in points))

    def place(processors: float, value: float) -> str:
        x = left + (width - left - 8) * processors / most
        y = height - below - (height - below - 8) * value / top
        return f"{x:.1f},{y:.1f}"

    line = " ".join(place(*point) for point in points)
    dots = "".join(
        '<circle cx="{}" cy="{}" r="3"/>'.format(*place(*point).split(",")) for point in points
    )
    ticks = "".join(
        f'<text x="{place(n, 0).split(",")[0]}" y="{height - 8}" text-anchor="middle">{n}</text>'
        for n in sorted({processors for processors, _ in points})
    )
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="speed-up over processors">'
        f'<polyline class="ideal" points="{place(0, 0)} {place(most, most)}"/>'
        f'<polyline class="axis" points="{left},8 {left},{height - below} {width - 8},{height - below}"/>'
        f'<polyline class="line" points="{line}"/>{dots}{ticks}'
        f'<text x="{left - 4}" y="14" text-anchor="end">{top:.2g}x</text></svg>'
    )
