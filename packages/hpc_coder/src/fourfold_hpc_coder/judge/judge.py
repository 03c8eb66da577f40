"""One answer, from text to verdict: compile, launch, compare, time, and ask whether it is parallel."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fourfold_hpc_coder.judge import failures, parallelism, toolchain
from fourfold_hpc_coder.judge.bench import Bench, built
from fourfold_hpc_coder.judge.launch import LaunchResult, launch
from fourfold_hpc_coder.judge.parallelism import Proof
from fourfold_hpc_coder.judge.races import RaceReport, find_race
from fourfold_hpc_coder.judge.reference import Reference
from fourfold_hpc_coder.vocabulary import Model, Processors, Sample, Verdict

KEPT_CHARACTERS = 4000
"""Kept of what a compiler or program wrote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The verdict on an answer, and the reason."""

    verdict: Verdict
    because: str
    """One sentence."""
    sample: Sample
    output: str
    """The end of what the compiler or the program wrote, where that explains something."""
    proof: str
    """The observation that decided whether it is parallel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An answer that built and was right on some launch: what its checks found, until it is timed."""

    right: Reference
    model: Model
    text: str
    """Its translation unit."""
    written: Proof
    folder: Path
    """Its program is in `out` there."""
    is_everywhere: bool
    """Whether every rank must return the right value."""
    checks: tuple[LaunchResult, ...]
    """Every launch in order, up to the first that failed."""
    race: RaceReport | None
    """None where nobody looked."""

    @property
    def program_bytes(self) -> int:
        """Size of the program."""
        return (self.folder / "out" / "answer").stat().st_size


def judge(bench: Bench, right: Reference, model: Model, prompt: str, body: str) -> Judgement:
    """Compile an answer, run it on every launch, and say what became of it.

    Args:
        bench: sandbox, limits, secret.
        right: the problem's reference answers.
        model: parallel model asked for.
        prompt: what the code model was shown, up to the opening brace.
        body: what it wrote.
    """
    with bench.folder() as folder:
        checked = check(bench, right, model, prompt, body, folder)
        return checked if isinstance(checked, Judgement) else time_candidate(bench, checked)


def check(
    bench: Bench, right: Reference, model: Model, prompt: str, body: str, folder: Path
) -> Judgement | Candidate:
    """Everything about an answer that needs no quiet: build it, check it on every launch, look for races.

    Args:
        bench: sandbox, limits, secret.
        right: the problem's reference answers.
        model: parallel model asked for.
        prompt: what the code model was shown, up to the opening brace.
        body: what it wrote.
        folder: private and empty; the program stays in it.
    """
    written = parallelism.in_text(body, model)
    if not body.strip():
        return _failed("no answer", "the answer is empty", built=False)
    # What belongs to the judge has a name of ours, and an honest answer none.
    own = {"fourfold", *right.exercise.forbidden()}
    if used := sorted(own & set(re.findall(r"\w+", parallelism.without_comments(body)))):
        because = f"it names {', '.join(used)}, which belongs to the judge"
        return _failed("cheat", because, built=False)
    if used := sorted(right.exercise.fixed() & redefined(body)):
        because = f"it redefines {', '.join(used)}, which its judge's text after it uses"
        return _failed("cheat", because, built=False)
    text = right.exercise.unit(prompt, body)
    programs = [(right, folder), *_places(right.again, folder)]
    for asked, place in programs:
        outcome = built(bench, asked.exercise, model, text, place)
        if outcome.code or outcome.limit != "nothing":
            verdict, because = failures.of_build(outcome, body)
            return _failed(verdict, because, built=False, output=outcome.stderr)
    if not toolchain.runs_here(model):
        return replace(
            _failed("compiled, not run", "it builds; running it needs a GPU", built=True),
            proof=written.because,
        )
    is_everywhere = wants_every_rank(prompt)
    # The launches in order, up to the first that fails.
    checks: list[LaunchResult] = []
    for processors in bench.settings.of(model):
        checks.append(_checked(bench, programs, model, processors, is_everywhere=is_everywhere))
        if not checks[-1].run.valid:
            break
    if not any(check.run.valid for check in checks):
        return _summary(right, checks)
    candidate = Candidate(
        right=right,
        model=model,
        text=text,
        written=written,
        folder=folder,
        is_everywhere=is_everywhere,
        checks=(*checks,),
        race=None,
    )
    # What is parallel by its text is looked at in any case, and here no timing waits for it.
    is_asked = written.parallel if checks[-1].run.valid else _may_race(checks[-1].verdict)
    return replace(candidate, race=find_race(bench, right, model, text)) if is_asked else candidate


def _checked(
    bench: Bench,
    programs: Sequence[tuple[Reference, Path]],
    model: Model,
    processors: Processors,
    *,
    is_everywhere: bool,
) -> LaunchResult:
    """The first launch of an answer's programs that fails, or the last."""

    def launched(asked: Reference, place: Path) -> LaunchResult:
        return launch(
            bench, asked, model, processors, place, is_timed=False, is_everywhere=is_everywhere
        )

    checked = launched(*programs[0])
    for asked, place in programs[1:]:
        checked = launched(asked, place) if checked.run.valid else checked
    return checked


def time_candidate(bench: Bench, candidate: Candidate) -> Judgement:
    """Time a checked answer on the launches on which it was right, and say what became of it."""
    right, model, written = candidate.right, candidate.model, candidate.written

    def timed(processors: Processors) -> LaunchResult:
        return launch(
            bench,
            right,
            model,
            processors,
            candidate.folder,
            is_timed=True,
            is_everywhere=candidate.is_everywhere,
        )

    # Time every launch that was right; the one that failed, if any, is the last and stays as it was.
    launches: list[LaunchResult] = []
    for checked in candidate.checks:
        launches.append(timed(checked.run.processors) if checked.run.valid else checked)
        if not launches[-1].run.valid:
            break
    judgement = _summary(right, launches)
    # Right answers must also be parallel, by their text and by what the launches showed. Of wrong ones only
    # those are looked at further that were right on fewer threads: theirs may be a race.
    if judgement.verdict == "correct":
        evidence = {result.run.processors: result.evidence for result in launches}
        crowd = parallelism.second_look(evidence, len(os.sched_getaffinity(0)))
        if crowd and (looked := timed(crowd)).run.valid:
            evidence[crowd] = looked.evidence
        by_turns = parallelism.is_by_turns(candidate.text)
        proof = (
            parallelism.in_action(evidence, model, by_turns=by_turns)
            if written.parallel
            else written
        )
        judgement = replace(
            judgement,
            proof=proof.because,
            sample=replace(judgement.sample, parallel=proof.parallel),
        )
        if not proof.parallel:
            because = f"its answers are right, but {proof.because}"
            return replace(judgement, verdict="not parallel", because=because)
    elif not (_may_race(judgement.verdict) and any(run.valid for run in judgement.sample.runs)):
        return judgement
    race = candidate.race or find_race(bench, right, model, candidate.text)
    if race.unseen:
        unseen = f"not checked for races: {race.unseen}"
        return replace(judgement, proof="; ".join(filter(None, (judgement.proof, unseen))))
    if not race.race:
        return judgement
    now = (
        "its answers were right this time, but"
        if judgement.verdict == "correct"
        else "its answers vary:"
    )
    return replace(
        judgement,
        verdict="race",
        because=f"{now} {race.race} with nothing in between",
        sample=_spoiled(judgement.sample),
    )


_EVERYWHERE = re.compile(r"\bon\s+(?:all|every)\s+(?:ranks?|process(?:es)?)\b")
_REDEFINES = re.compile(r"(?:#|%:|\?\?=)[ \t]*(?:define|undef)[ \t]+(\w+)")
_CONTINUED = re.compile(r"\\[ \t]*\n")


def wants_every_rank(prompt: str) -> bool:
    """Whether a prompt asks for the returned value on every rank, and not on the first alone."""
    return _EVERYWHERE.search(prompt) is not None


def redefined(body: str) -> frozenset[str]:
    """Words that an answer gives another meaning by the preprocessor."""
    code = parallelism.without_comments(_CONTINUED.sub("", body))
    return frozenset(_REDEFINES.findall(code))


def _places(again: Sequence[Reference], folder: Path) -> list[tuple[Reference, Path]]:
    """A private, empty folder for each further program of an answer."""
    places = [(asked, folder / f"again-{number}") for number, asked in enumerate(again)]
    for _, place in places:
        place.mkdir()
    return places


def _failed(verdict: Verdict, because: str, *, built: bool, output: str = "") -> Judgement:
    return Judgement(
        verdict=verdict,
        because=because,
        sample=Sample(built=built, parallel=True, runs=(), best_sequential_s=math.nan),
        output=output[:KEPT_CHARACTERS],
        proof="",
    )


def _summary(right: Reference, launches: Sequence[LaunchResult]) -> Judgement:
    """Launches in order, of which the last may have failed, as one judgement."""
    last = launches[-1]
    sample = Sample(
        built=True,
        parallel=True,
        runs=tuple(result.run for result in launches),
        best_sequential_s=right.best_s
        if any(result.run.valid for result in launches)
        else math.nan,
    )
    is_right = last.verdict == "correct"
    return Judgement(
        verdict=last.verdict,
        because="its answers are right" if is_right else last.because,
        sample=sample,
        output="" if is_right else last.output[-KEPT_CHARACTERS:],
        proof="",
    )


def _may_race(verdict: Verdict) -> bool:
    """Whether a program that was right on fewer threads may be wrong by a race."""
    return verdict in ("wrong", "not finite")


def _spoiled(sample: Sample) -> Sample:
    """A sample whose runs on several threads do not count."""
    runs = tuple(
        replace(run, valid=False, runtime_s=math.nan) if run.processors.count > 1 else run
        for run in sample.runs
    )
    return replace(sample, runs=runs)
