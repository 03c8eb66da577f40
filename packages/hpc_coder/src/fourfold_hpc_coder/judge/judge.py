"""One answer, from text to verdict: compile, launch, compare, time, and ask whether it is parallel."""

import math
import re
import zlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fourfold_hpc_coder.judge import failures, parallelism, toolchain
from fourfold_hpc_coder.judge.bench import ANSWER_BEGINS, Bench, Exercise, built, launched
from fourfold_hpc_coder.judge.build import source_line
from fourfold_hpc_coder.judge.parallelism import Proof
from fourfold_hpc_coder.judge.protocol import Channel, EndedError, Evidence, ForgedError, Reply
from fourfold_hpc_coder.problems import Problem
from fourfold_hpc_coder.vocabulary import Execution, Model, Processors, Sample, Verdict

KEPT_CHARACTERS = 4000
"""Kept of what a compiler or program wrote."""
PATIENCE = 6
"""Times the limit of a call that a reference may take."""
MOVING_S, MOVING_SHARE = 0.001, 1.25
"""On moving its inputs, and again its outputs, each rank may spend 1 ms more than 1.25 times what the
reference spends: caches are shared with others. More is charged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What became of an answer, and why."""

    verdict: Verdict
    because: str
    """One sentence."""
    sample: Sample
    output: str
    """The end of what the compiler or the program wrote, where that explains something."""
    proof: str
    """What decided whether it is parallel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One call: its inputs and what the reference answers."""

    where: str
    """Ends a sentence about the call: `for an input of size 17`."""
    arguments: tuple[np.ndarray, ...]
    expected: dict[str, np.ndarray]
    moving_cpu_s: tuple[float, float] = (math.inf, math.inf)
    """Processor time that a program may spend on its inputs and on its outputs around the call."""
    is_timed: bool = True


@dataclass(slots=True)
class Reference:
    """A problem's sequential reference at work: right answers, and T*."""

    exercise: Exercise
    checks: tuple[Round, ...]
    timed: tuple[Round, ...]
    best_s: float


def reference(bench: Bench, problem: Problem) -> Reference:
    """Draw the rounds of a problem and have its reference answer them.

    Raises:
        RuntimeError: where our own reference fails, which is a bug of the problem.
    """
    generator = np.random.default_rng((bench.secret, zlib.crc32(problem.name.encode())))
    checks = [*problem.checks(generator)]
    timed = bench.settings.timing_size(problem)
    wanted = [
        *checks,
        *(
            (f"for an input of size {timed}", problem.arguments(timed, generator))
            for _ in range(bench.settings.repetitions)
        ),
    ]
    calls = [(*arguments.values(),) for _, arguments in wanted]
    text = problem.unit(problem.prompt("serial"), problem.answer("serial"))
    answers = trusted_answers(bench, problem, text, calls)
    rounds = [
        Round(
            where=where,
            arguments=arguments,
            expected=answer.outputs,
            moving_cpu_s=(allowed(answer.moving_cpu_s[0]), allowed(answer.moving_cpu_s[1])),
        )
        for (where, _), arguments, answer in zip(wanted, calls, answers, strict=True)
    ]
    count = len(checks)
    return Reference(
        exercise=problem,
        checks=tuple(rounds[:count]),
        timed=tuple(rounds[count:]),
        best_s=min(answer.runtime_s for answer in answers[count:]),
    )


def allowed(moving_cpu_s: float) -> float:
    """Processor time of moving data that is not charged, where the reference took so long."""
    return MOVING_S + MOVING_SHARE * moving_cpu_s


def trusted_answers(
    bench: Bench, exercise: Exercise, text: str, calls: Sequence[Sequence[np.ndarray]]
) -> list[Reply]:
    """What a sequential program of ours answers, alone on the machine.

    Raises:
        RuntimeError: where it does not build or ends early.
    """
    with bench.folder() as folder:
        outcome = built(bench, exercise, "serial", text, folder)
        if outcome.code:
            raise RuntimeError(f"the reference of {exercise.name} does not build: {outcome.stderr}")
        # A busy machine must not fail what is known to end.
        patient = replace(bench.settings, time_limit_s=PATIENCE * bench.settings.time_limit_s)
        with launched(bench, folder, "serial", Processors(), settings=patient) as channel:
            try:
                channel.connect()
                with bench.quiet.timing():
                    return [_call(channel, exercise, arguments) for arguments in calls]
            except EndedError:
                ended = channel.process.finish()
                raise RuntimeError(
                    f"the reference of {exercise.name} ended early: exit code {ended.code}, limit "
                    f"{ended.limit}, {ended.elapsed_s:.0f} s: {ended.stderr}"
                ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceReport:
    """What a look for races gave."""

    race: str = ""
    """Where two threads meet; empty where none were seen, or nobody had to look."""
    unseen: str = ""
    """Why the checker could not tell."""


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
    checks: tuple["_LaunchResult", ...]
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
        found = check(bench, right, model, prompt, body, folder)
        return found if isinstance(found, Judgement) else judged_by_time(bench, found)


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
    own = {"fourfold", *right.exercise.forbidden()}
    if used := sorted(own & set(re.findall(r"\w+", parallelism.without_comments(body)))):
        because = f"it names {', '.join(used)}, which belongs to the judge"
        return _failed("cheat", because, built=False)
    text = right.exercise.unit(prompt, body)
    outcome = built(bench, right.exercise, model, text, folder)
    if outcome.code or outcome.limit != "nothing":
        verdict, because = failures.of_build(outcome, body)
        return _failed(verdict, because, built=False, output=outcome.stderr)
    if not toolchain.runs_here(model):
        return replace(
            _failed("compiled, not run", "it builds; running it needs a GPU", built=True),
            proof=written.because,
        )
    checks: list[_LaunchResult] = []
    for processors in bench.settings.of(model):
        checks.append(_run_one(bench, right, model, processors, folder, is_timed=False))
        if not checks[-1].run.valid:
            break
    if not any(one.run.valid for one in checks):
        return _summary(right, checks)
    candidate = Candidate(
        right=right,
        model=model,
        text=text,
        written=written,
        folder=folder,
        checks=(*checks,),
        race=None,
    )
    # What is parallel by its text is looked at in any case, and here no timing waits for it.
    is_asked = written.parallel if checks[-1].run.valid else _may_race(checks[-1].verdict)
    return replace(candidate, race=_race(bench, candidate)) if is_asked else candidate


def judged_by_time(bench: Bench, candidate: Candidate) -> Judgement:
    """Time a checked answer on the launches on which it was right, and say what became of it."""
    right, model, written = candidate.right, candidate.model, candidate.written
    found: list[_LaunchResult] = []
    for checked in candidate.checks:
        found.append(
            _run_one(bench, right, model, checked.run.processors, candidate.folder, is_timed=True)
            if checked.run.valid
            else checked
        )
        if not found[-1].run.valid:
            break
    judgement = _summary(right, found)
    if judgement.verdict == "correct":
        evidence = {one.run.processors: one.evidence for one in found}
        proof = parallelism.in_action(evidence, model) if written.parallel else written
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
    looked = _race(bench, candidate) if candidate.race is None else candidate.race
    if looked.unseen:
        unseen = f"not checked for races: {looked.unseen}"
        return replace(judgement, proof="; ".join(filter(None, (judgement.proof, unseen))))
    if not looked.race:
        return judgement
    now = (
        "its answers were right this time, but"
        if judgement.verdict == "correct"
        else "its answers vary:"
    )
    return replace(
        judgement,
        verdict="race",
        because=f"{now} {looked.race} with nothing in between",
        sample=_spoiled(judgement.sample),
    )


def _failed(verdict: Verdict, because: str, *, built: bool, output: str = "") -> Judgement:
    return Judgement(
        verdict=verdict,
        because=because,
        sample=Sample(built=built, parallel=True, runs=(), best_sequential_s=math.nan),
        output=output[:KEPT_CHARACTERS],
        proof="",
    )


def _summary(right: Reference, found: Sequence["_LaunchResult"]) -> Judgement:
    """Launches in order, of which the last may have failed, as one judgement."""
    last = found[-1]
    sample = Sample(
        built=True,
        parallel=True,
        runs=tuple(one.run for one in found),
        best_sequential_s=right.best_s if any(one.run.valid for one in found) else math.nan,
    )
    is_right = last.verdict == "correct"
    return Judgement(
        verdict=last.verdict,
        because="its answers are right" if is_right else last.because,
        sample=sample,
        output="" if is_right else last.output[-KEPT_CHARACTERS:],
        proof="",
    )


_SILENT = Evidence(
    process_cpu_s=0,
    main_cpu_s=0,
    region_cpu_s=0,
    regions=0,
    team=0,
    message_cpu_s=0,
    messages=0,
    talking_ranks=0,
    ranks=1,
    working_ranks=0,
)


def _charged_s(answer: Reply, one: Round, processors: Processors) -> float:
    """Seconds of the call, and of what the program did around it beyond moving its data to every rank."""
    moved = zip(answer.moving_cpu_s, one.moving_cpu_s, strict=True)
    return answer.runtime_s + sum(
        max(0.0, spent_s - processors.ranks * free_s) for spent_s, free_s in moved
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _LaunchResult:
    verdict: Verdict
    because: str
    output: str
    run: Execution
    evidence: Evidence


def _run_one(
    bench: Bench,
    right: Reference,
    model: Model,
    processors: Processors,
    folder: Path,
    *,
    is_timed: bool,
) -> _LaunchResult:
    """Start the program, have it answer the checks, or one of them and then the timed calls."""
    exercise, where = right.exercise, f"on {processors}, {right.checks[-1].where}"
    verdict: Verdict = "correct"
    because, output, runtime_s, evidence = "", "", math.inf, _SILENT
    ran = True
    with launched(bench, folder, model, processors, settings=bench.settings) as channel:
        try:
            channel.connect()
            # The largest first: the smallest is the special case. Before a clock runs, one wakes the threads.
            for one in right.checks[:-2:-1] if is_timed else right.checks[::-1]:
                where = f"on {processors}, {one.where}"
                answer = _call(channel, exercise, one.arguments)
                verdict, because = failures.of_answer(exercise, answer.outputs, one.expected, where)
                if verdict != "correct":
                    break
            else:
                with bench.quiet.timing() if is_timed else nullcontext():
                    for one in right.timed if is_timed else ():
                        where = f"on {processors}, {one.where}"
                        answer = _call(channel, exercise, one.arguments)
                        verdict, because = failures.of_answer(
                            exercise, answer.outputs, one.expected, where
                        )
                        if verdict != "correct":
                            break
                        if not one.is_timed:
                            continue
                        runtime_s = min(_charged_s(answer, one, processors), runtime_s)
                        if answer.evidence.region_cpu_s >= evidence.region_cpu_s:
                            evidence = answer.evidence
            channel.quit()
            is_over = channel.process.done
            ended = channel.process.finish()
            output = ended.stderr
            if verdict == "correct" and (ended.code or not is_over):
                ran = False
                verdict, because = failures.of_end(
                    ended, processors, is_over=is_over, patience_s=bench.settings.time_limit_s
                )
        except EndedError:
            ended = channel.process.finish()
            ran = False
            verdict, because = failures.of_run(
                ended, processors, where, patience_s=bench.settings.time_limit_s
            )
            output = ended.stderr
        except ForgedError as error:
            verdict, because = "cheat", f"{error}, on {processors}"
            output = channel.process.finish().stderr
    valid = verdict == "correct"
    return _LaunchResult(
        verdict=verdict,
        because=because,
        output=output,
        run=Execution(
            processors=processors, ran=ran, valid=valid, runtime_s=runtime_s if valid else math.nan
        ),
        evidence=evidence,
    )


def _call(channel: Channel, exercise: Exercise, arguments: Sequence[np.ndarray]) -> Reply:
    return channel.call(arguments, exercise.signature.parameters, exercise.signature.outputs)


_RACE = re.compile(r"^fourfold-race (write|read) 0x([0-9a-f]+) 0x([0-9a-f]+)$", re.MULTILINE)


def _may_race(verdict: Verdict) -> bool:
    """Whether a program that was right on fewer threads may be wrong by a race."""
    return verdict in ("wrong", "not finite")


def _race(bench: Bench, candidate: Candidate) -> RaceReport:
    """What the checker saw of two threads at one address."""
    if candidate.model != "omp" or not bench.settings.races:
        return RaceReport()
    right, text = candidate.right, candidate.text
    with bench.folder() as folder:
        if built(bench, right.exercise, "omp", text, folder, watched=True).code:
            return RaceReport(unseen="it does not build with the checker")
        wrote = _watched(bench, right, folder)
        if wrote is None:
            return RaceReport(unseen="it does not come to its end under the checker")
        if "fourfold-race unknown" in wrote:
            return RaceReport(
                unseen="it has tasks, nested regions or iterations that wait for others"
            )
        found = _RACE.search(wrote)
        if found is None:
            return RaceReport()
        kind, *addresses = found.groups()
        numbers = [source_line(bench.sandbox, folder / "out", one) for one in addresses]
    written = text.rpartition(ANSWER_BEGINS)[2].splitlines()
    lines = [" ".join(written[number - 1].split()) for number in numbers if number]
    shown = " and ".join(f"`{line}`" for line in dict.fromkeys(lines))
    act = (
        "two threads write one address" if kind == "write" else "a thread reads what another writes"
    )
    return RaceReport(race=f"{act} in {shown}" if shown else act)


def _watched(bench: Bench, right: Reference, folder: Path) -> str | None:
    """What the checker wrote while the program answered a small input; None if it did not get there."""
    one = right.checks[-1]
    with launched(bench, folder, "omp", Processors(threads=2), settings=bench.settings) as channel:
        try:
            channel.connect()
            _call(channel, right.exercise, one.arguments)
            channel.quit()
        except (EndedError, ForgedError):
            return None
        return channel.process.finish().stderr


def _spoiled(sample: Sample) -> Sample:
    """A sample whose runs on several threads do not count."""
    runs = tuple(
        replace(run, valid=False, runtime_s=math.nan) if run.processors.count > 1 else run
        for run in sample.runs
    )
    return replace(sample, runs=runs)
