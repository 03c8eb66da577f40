"""One answer, from text to verdict: compile, launch, compare, time, and ask whether it is parallel."""

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fourfold_hpc_coder import failures, parallelism, toolchain
from fourfold_hpc_coder.channel import Answer, Channel, EndedError, Evidence, ForgedError
from fourfold_hpc_coder.evaluation import Launch, Model, Run, Sample, Verdict
from fourfold_hpc_coder.problems import Problem
from fourfold_hpc_coder.workbench import ANSWER_BEGINS, Bench, Exercise, built, launched

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
) -> list[Answer]:
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
        with launched(bench, folder, "serial", Launch(), settings=patient) as channel:
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


def judge(bench: Bench, right: Reference, model: Model, prompt: str, body: str) -> Judgement:
    """Compile an answer, run it on every launch, and say what became of it.

    Args:
        bench: sandbox, limits, secret.
        right: the problem's reference answers.
        model: parallel model asked for.
        prompt: what the code model was shown, up to the opening brace.
        body: what it wrote.
    """
    written = parallelism.in_text(body, model)
    if not body.strip():
        return _failed("no answer", "the answer is empty", built=False)
    own = {"fourfold", *right.exercise.forbidden()}
    if used := sorted(own & set(re.findall(r"\w+", parallelism.without_comments(body)))):
        because = f"it names {', '.join(used)}, which belongs to the judge"
        return _failed("cheat", because, built=False)
    with bench.folder() as folder:
        outcome = built(bench, right.exercise, model, right.exercise.unit(prompt, body), folder)
        if outcome.code or outcome.limit != "nothing":
            verdict, because = failures.of_build(outcome)
            return _failed(verdict, because, built=False, output=outcome.stderr)
        if not toolchain.runs_here(model):
            return replace(
                _failed("compiled, not run", "it builds; running it needs a GPU", built=True),
                proof=written.because,
            )
        judgement, evidence = _run_all(bench, right, model, folder)
    if judgement.verdict != "correct":
        if model == "omp" and bench.settings.races and _right_alone(judgement):
            return _without_races(bench, right, prompt, body, judgement)
        return judgement
    acted = parallelism.in_action(evidence, model)
    proof = written if not written.parallel else acted
    judgement = replace(
        judgement,
        proof=proof.because,
        sample=replace(judgement.sample, parallel=proof.parallel),
    )
    if not proof.parallel:
        return replace(
            judgement,
            verdict="not parallel",
            because=f"its answers are right, but {proof.because}",
        )
    if model == "omp" and bench.settings.races:
        return _without_races(bench, right, prompt, body, judgement)
    return judgement


def _failed(verdict: Verdict, because: str, *, built: bool, output: str = "") -> Judgement:
    return Judgement(
        verdict=verdict,
        because=because,
        sample=Sample(built=built, parallel=True, runs=(), best_sequential_s=math.nan),
        output=output[:KEPT_CHARACTERS],
        proof="",
    )


def _run_all(
    bench: Bench, right: Reference, model: Model, folder: Path
) -> tuple[Judgement, dict[Launch, Evidence]]:
    """Every launch in order, up to the first that fails."""
    runs: list[Run] = []
    evidence: dict[Launch, Evidence] = {}
    verdict, because, output = "correct", "its answers are right", ""
    for launch in bench.settings.of(model):
        found = _run_one(bench, right, model, launch, folder)
        runs.append(found.run)
        if found.verdict != "correct":
            verdict, because, output = found.verdict, found.because, found.output
            break
        evidence[launch] = found.evidence
    ran_any = any(one.valid for one in runs)
    sample = Sample(
        built=True,
        parallel=True,
        runs=tuple(runs),
        best_sequential_s=right.best_s if ran_any else math.nan,
    )
    judgement = Judgement(
        verdict=verdict,
        because=because,
        sample=sample,
        output=output[-KEPT_CHARACTERS:],
        proof="",
    )
    return judgement, evidence


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


def _charged_s(answer: Answer, one: Round, launch: Launch) -> float:
    """Seconds of the call, and of what the program did around it beyond moving its data to every rank."""
    moved = zip(answer.moving_cpu_s, one.moving_cpu_s, strict=True)
    return answer.runtime_s + sum(
        max(0.0, spent_s - launch.ranks * free_s) for spent_s, free_s in moved
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Launched:
    verdict: Verdict
    because: str
    output: str
    run: Run
    evidence: Evidence


def _run_one(
    bench: Bench, right: Reference, model: Model, launch: Launch, folder: Path
) -> _Launched:
    exercise, where = right.exercise, f"on {launch}, {right.checks[-1].where}"
    verdict: Verdict = "correct"
    because, output, runtime_s, evidence = "", "", math.inf, _SILENT
    ran = True
    with launched(bench, folder, model, launch, settings=bench.settings) as channel:
        try:
            channel.connect()
            # The largest first: the smallest is the special case.
            for one in reversed(right.checks):
                where = f"on {launch}, {one.where}"
                answer = _call(channel, exercise, one.arguments)
                verdict, because = failures.of_answer(exercise, answer.outputs, one.expected, where)
                if verdict != "correct":
                    break
            else:
                with bench.quiet.timing():
                    for one in right.timed:
                        where = f"on {launch}, {one.where}"
                        answer = _call(channel, exercise, one.arguments)
                        verdict, because = failures.of_answer(
                            exercise, answer.outputs, one.expected, where
                        )
                        if verdict != "correct":
                            break
                        if not one.is_timed:
                            continue
                        runtime_s = min(_charged_s(answer, one, launch), runtime_s)
                        if answer.evidence.region_cpu_s >= evidence.region_cpu_s:
                            evidence = answer.evidence
            channel.quit()
            is_over = channel.process.done
            ended = channel.process.finish()
            output = ended.stderr
            if verdict == "correct" and (ended.code or not is_over):
                ran = False
                verdict, because = failures.of_end(
                    ended, launch, is_over=is_over, patience_s=bench.settings.time_limit_s
                )
        except EndedError:
            ended = channel.process.finish()
            ran = False
            verdict, because = failures.of_run(
                ended, launch, where, patience_s=bench.settings.time_limit_s
            )
            output = ended.stderr
        except ForgedError as error:
            verdict, because = "cheat", f"{error}, on {launch}"
            output = channel.process.finish().stderr
    valid = verdict == "correct"
    return _Launched(
        verdict=verdict,
        because=because,
        output=output,
        run=Run(launch=launch, ran=ran, valid=valid, runtime_s=runtime_s if valid else math.nan),
        evidence=evidence,
    )


def _call(channel: Channel, exercise: Exercise, arguments: Sequence[np.ndarray]) -> Answer:
    return channel.call(arguments, exercise.signature.parameters, exercise.signature.outputs)


_RACE = re.compile(r"^fourfold-race (write|read) 0x([0-9a-f]+) 0x([0-9a-f]+)$", re.MULTILINE)


def _without_races(
    bench: Bench, right: Reference, prompt: str, body: str, judgement: Judgement
) -> Judgement:
    """The judgement, or "race" where the checker saw two threads at one address."""
    text = right.exercise.unit(prompt, body)
    with bench.folder() as folder:
        if built(bench, right.exercise, "omp", text, folder, watched=True).code:
            return _unchecked(judgement, "it does not build with the checker")
        seen = _watched(bench, right, folder)
        if seen is None:
            return _unchecked(judgement, "it does not come to its end under the checker")
        if "fourfold-race unknown" in seen:
            because = "it has tasks, nested regions or ordered iterations, which the checker cannot follow"
            return _unchecked(judgement, because)
        found = _RACE.search(seen)
        if found is None:
            return judgement
        kind, *addresses = found.groups()
        numbers = [toolchain.source_line(bench.sandbox, folder / "out", one) for one in addresses]
        written = text.rpartition(ANSWER_BEGINS)[2].splitlines()
        lines = [" ".join(written[number - 1].split()) for number in numbers if number]
        shown = " and ".join(f"`{line}`" for line in dict.fromkeys(lines))
    act = (
        "two threads write one address" if kind == "write" else "a thread reads what another writes"
    )
    where = f" in {shown}" if shown else ""
    now = (
        "its answers were right this time, but"
        if judgement.verdict == "correct"
        else "its answers vary:"
    )
    return replace(
        judgement,
        verdict="race",
        because=f"{now} {act}{where} with nothing in between",
        sample=_spoiled(judgement.sample),
    )


def _unchecked(judgement: Judgement, because: str) -> Judgement:
    proof = f"not checked for races: {because}"
    return replace(judgement, proof="; ".join(filter(None, (judgement.proof, proof))))


def _watched(bench: Bench, right: Reference, folder: Path) -> str | None:
    """What the checker wrote while the program answered a small input; None if it did not get there."""
    one = right.checks[-1]
    with launched(bench, folder, "omp", Launch(threads=2), settings=bench.settings) as channel:
        try:
            channel.connect()
            _call(channel, right.exercise, one.arguments)
            channel.quit()
        except (EndedError, ForgedError):
            return None
        return channel.process.finish().stderr


def _right_alone(judgement: Judgement) -> bool:
    """Whether a wrong program was right on one thread: then a race is the likely reason."""
    return judgement.verdict in ("wrong", "not finite") and any(
        run.valid for run in judgement.sample.runs
    )


def _spoiled(sample: Sample) -> Sample:
    """A sample whose runs on several threads do not count."""
    runs = tuple(
        replace(run, valid=False, runtime_s=math.nan) if run.launch.processors > 1 else run
        for run in sample.runs
    )
    return replace(sample, runs=runs)
