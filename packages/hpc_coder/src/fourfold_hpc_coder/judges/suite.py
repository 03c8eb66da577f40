"""The suite: answers in words and harmless forms, and which of them may count.

A judge is any program that reads ParEval's file of outputs and says of each output whether it is right, in
ParEval's file of results or in a plain one. It is asked for nothing else, so that any can be held to the
suite without a line of ours in it. A judge errs in two ways: it lets through what must not count, or it
refuses what is right. Serial programs that count in a judge that asks for no parallelism are let through: the
prompt asks for it.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

from fourfold_hpc_coder.doors.judging import open_judge
from fourfold_hpc_coder.judge.bench import JudgeSettings
from fourfold_hpc_coder.problems.library import own_problems
from fourfold_hpc_coder.vocabulary import Model
from fourfold_parallel.common.files import write_text

HEADERS = "".join(
    f"#include <{name}>\n"
    for name in ("chrono", "cmath", "cstdio", "cstdlib", "map", "thread", "vector")
)
"""Stand above every prompt: no case fails for want of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An answer, and whether a judge may count it."""

    name: str
    problem: str
    model: Model
    words: str
    """Its act, as the end of "a program that"."""
    body: str
    counts: bool = False

    @property
    def prompt(self) -> str:
        """The built-in problem's, below the headers."""
        return HEADERS + own_problems()[self.problem].prompt(self.model)


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeFinding:
    """A judge's word on a case."""

    case: Case
    counted: bool
    verdict: str
    """The judge's own word, where it has one beside yes and no."""

    @property
    def is_right(self) -> bool:
        """Whether the judge counts what may count, and nothing else."""
        return self.counted == self.case.counts


@lru_cache(maxsize=1)
def cases() -> tuple[Case, ...]:
    """Every case, those to one prompt together."""
    text = Path(__file__).with_name("cases.toml").read_text(encoding="utf-8")
    listed = [Case(**fields) for fields in tomllib.loads(text)["case"]]
    return tuple(sorted(listed, key=lambda case: (case.problem, case.model)))


def write_suite(folder: str | PathLike[str]) -> Path:
    """Write `outputs.json`, in ParEval's format, and `cases.json`, in words; the former's path.

    Args:
        folder: receives both; made where it is not there.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    for case in cases():
        key = (case.problem, case.model)
        if not entries or (entries[-1]["name"], entries[-1]["parallelism_model"]) != key:
            entries.append(
                {
                    "problem_type": own_problems()[case.problem].problem_type,
                    "language": "cpp",
                    "name": case.problem,
                    "parallelism_model": case.model,
                    "prompt": case.prompt,
                    "outputs": [],
                }
            )
        entries[-1]["outputs"].append(case.body)
    shown = [
        {"name": case.name, "words": case.words, "problem": case.problem, "counts": case.counts}
        for case in cases()
    ]
    write_text(place / "cases.json", json.dumps(shown, indent=1) + "\n")
    write_text(place / "outputs.json", json.dumps(entries, indent=1) + "\n")
    return place / "outputs.json"


def read_findings(path: str | PathLike[str]) -> tuple[JudgeFinding, ...]:
    """A judge's findings: from ParEval's file of results for `outputs.json`, or a list of true and false.

    Raises:
        ValueError: where the file does not say something of every case.
    """
    said = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(said, list):
        raise ValueError(f"{path} holds {type(said).__name__}; give a list of results")
    if all(isinstance(value, bool) for value in said):
        values = [(value, "") for value in said]
    else:
        outputs = [output for entry in said for output in entry.get("outputs", ())]
        if not all(isinstance(output, dict) for output in outputs):
            raise ValueError(f"{path} holds outputs without results; have the judge run first")
        values = [(bool(output.get("are_all_valid")), _word(output)) for output in outputs]
    if len(values) != len(cases()):
        raise ValueError(
            f"{path} says something of {len(values)} answers; there are {len(cases())}"
        )
    return tuple(
        JudgeFinding(case=case, counted=counted, verdict=word)
        for case, (counted, word) in zip(cases(), values, strict=True)
    )


def _word(output: Mapping[str, Any]) -> str:
    if not output.get("did_build"):
        return "no build"
    return "ran" if output.get("did_all_run") else "did not run"


def judged_here(
    settings: JudgeSettings | None = None, *, jobs: int = 2
) -> tuple[JudgeFinding, ...]:
    """This package's findings.

    Args:
        settings: limits and launches; the command line's for none.
        jobs: answers built and checked at once.
    """
    with open_judge(settings=settings, jobs=jobs, is_cached=False) as judge:
        futures = [
            judge.submit(case.problem, case.body, model=case.model, prompt=case.prompt)
            for case in cases()
        ]
        judgements = [future.result() for future in futures]
    return tuple(
        JudgeFinding(case=case, counted=judgement.sample.counts, verdict=judgement.verdict)
        for case, judgement in zip(cases(), judgements, strict=True)
    )


def table(findings: Mapping[str, Sequence[JudgeFinding]]) -> str:
    """Verdicts of some judges as a Markdown table, a row for each case and a last one with the errors.

    Args:
        findings: of each judge, by its name.
    """
    judges = [*findings]
    lines = [f"| a program that | may count | {' | '.join(judges)} |"]
    lines += [f"| --- | --- | {' | '.join('---' for _ in judges)} |"]
    for place, case in enumerate(cases()):
        cells = [_cell(findings[judge][place]) for judge in judges]
        lines.append(f"| {case.words} | {_yes(case.counts)} | {' | '.join(cells)} |")
    errors = [
        f"{sum(f.counted and not f.case.counts for f in findings[judge])} let through, "
        f"{sum(f.case.counts and not f.counted for f in findings[judge])} refused"
        for judge in judges
    ]
    return "\n".join([*lines, f"| **errors** | | {' | '.join(errors)} |"])


def _cell(finding: JudgeFinding) -> str:
    word = f"{_yes(finding.counted)}{f' ({finding.verdict})' if finding.verdict else ''}"
    return word if finding.is_right else f"**{word}**"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
