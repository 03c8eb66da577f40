"""Explanations of failures: a verdict and one sentence, with the compiler's or the program's own words."""

import re
import signal

import numpy as np

from fourfold_hpc_coder.evaluation import agrees
from fourfold_hpc_coder.judge.bench import Exercise
from fourfold_hpc_coder.judge.parallelism import without_comments
from fourfold_hpc_coder.problems.signature import Parameter
from fourfold_hpc_coder.sandbox.job import JobResult
from fourfold_hpc_coder.vocabulary import Processors, Verdict

SIGNALS = {
    signal.SIGSEGV: "an access outside its memory",
    signal.SIGBUS: "an access outside a mapped file",
    signal.SIGFPE: "a division by zero or another arithmetic error",
    signal.SIGABRT: "an abort, as after an uncaught exception or a failed assertion",
    signal.SIGILL: "an illegal instruction",
    signal.SIGSYS: "a forbidden system call",
    signal.SIGTERM: "a termination signal",
    signal.SIGKILL: "a kill: memory ran out, or a signal of its own",
}

FENCE = "```"
"""Opens and closes the code in a chat's reply; no C++."""


def of_build(outcome: JobResult, body: str) -> tuple[Verdict, str]:
    """Explain why an answer did not become a program.

    Args:
        outcome: of the compiler or the linker.
        body: the answer.
    """
    if FENCE in without_comments(body):
        return "no build", (
            f"it is a chat's reply with its code in {FENCE} fences, where a function's body is wanted; "
            "--extract-bodies judges the body in it"
        )
    if outcome.limit != "nothing":
        return "no build", f"the compiler was stopped: {_limit(outcome)}"
    lines = outcome.stderr.splitlines()
    for pattern, prefix in (
        (r"undefined (?:reference|symbol).*", "it does not link: "),
        (r"multiple definition.*|duplicate symbol.*", "it does not link: "),
        (r"(?:fatal )?error: .*", "it does not compile: "),
        (r"internal compiler error.*|.*out of memory.*", "the compiler gave up: "),
    ):
        for line in lines:
            if words := re.search(pattern, line):
                return "no build", prefix + _short(words.group())
    last = next((line for line in reversed(lines) if line.strip()), f"exit code {outcome.code}")
    return "no build", f"it does not compile: {_short(last)}"


def of_run(
    outcome: JobResult, processors: Processors, where: str, *, patience_s: float
) -> tuple[Verdict, str]:
    """Explain why a program ended, or was ended, before it answered.

    Args:
        outcome: how it ended.
        processors: on what it ran.
        where: the call under way, as in "on 2 threads, for an input of size 17".
        patience_s: longest that a call may take.
    """
    words = _last_words(outcome.stderr)
    said = f'; its last words: "{words}"' if words else ""
    if outcome.limit in ("wall", "cpu"):
        spent = min(outcome.cpu_s / max(processors.count, 1), outcome.elapsed_s)
        why = (
            f"it gave no answer within {patience_s:g} s"
            if outcome.limit == "wall"
            else f"it used more than {outcome.cpu_s:.0f} s of processor time without an answer"
        )
        waits = spent < outcome.elapsed_s / 10 and outcome.elapsed_s > 1
        hint = " while hardly computing: it waits for something that never comes" if waits else ""
        return "timeout", f"{why}{hint}, {where}"
    if outcome.limit != "nothing":
        return "crash", f"it was stopped {where}: {_limit(outcome)}"
    if outcome.signal:
        return "crash", f"it ended with {_signal(outcome)} {where}{said}"
    return (
        "crash",
        f"it ended by itself with exit code {outcome.code} before it answered, {where}{said}",
    )


def of_end(
    outcome: JobResult, processors: Processors, *, is_over: bool, patience_s: float
) -> tuple[Verdict, str]:
    """Explain why a program that gave every answer did not come to a good end.

    Args:
        outcome: how it ended.
        processors: on what it ran.
        is_over: whether it ended by itself.
        patience_s: how long it was waited for.
    """
    if not is_over:
        return (
            "timeout",
            f"its answers were right, but it did not end within {patience_s:g} s, on {processors}",
        )
    words = _last_words(outcome.stderr)
    how = _signal(outcome) if outcome.signal else f"exit code {outcome.code}"
    said = f'; its last words: "{words}"' if words else ""
    return "crash", f"its answers were right, but it then ended with {how}, on {processors}{said}"


def _signal(outcome: JobResult) -> str:
    name = signal.Signals(outcome.signal)
    return f"{name.name} ({SIGNALS.get(name, 'a signal')})"


def _limit(outcome: JobResult) -> str:
    return {
        "wall": f"more than {outcome.elapsed_s:.0f} s",
        "cpu": f"more than {outcome.cpu_s:.0f} s of processor time",
        "memory": "more memory than allowed",
        "processes": "more processes than allowed",
        "files": "more in its files than allowed",
        "nothing": "no limit",
    }[outcome.limit]


def of_answer(
    exercise: Exercise,
    outputs: dict[str, np.ndarray],
    expected: dict[str, np.ndarray],
    where: str,
) -> tuple[Verdict, str]:
    """Compare outputs with the reference's; ("correct", "") where they agree."""
    for parameter in exercise.signature.outputs:
        ours, right = outputs[parameter.name], expected[parameter.name]
        verdict, because = _of_output(exercise, parameter, ours, right, _called(parameter))
        if verdict != "correct":
            return verdict, f"{because}, {where}"
    return "correct", ""


def of_other_ranks(
    exercise: Exercise, elsewhere: np.ndarray, expected: dict[str, np.ndarray], where: str
) -> tuple[Verdict, str]:
    """Compare what the ranks after the first returned; ("correct", "") where every one is right.

    Args:
        exercise: says how close is close.
        elsewhere: a value a rank.
        expected: the reference's outputs.
        where: ends a sentence about the call.
    """
    for parameter in exercise.signature.result:
        for rank, value in enumerate(elsewhere[:, None], start=1):
            called = f"{_called(parameter)} on rank {rank}"
            right = expected[parameter.name]
            verdict, because = _of_output(exercise, parameter, value, right, called)
            if verdict != "correct":
                return verdict, f"{because}, which the prompt wants on every rank, {where}"
    return "correct", ""


def _of_output(
    exercise: Exercise, parameter: Parameter, ours: np.ndarray, right: np.ndarray, called: str
) -> tuple[Verdict, str]:
    if ours.shape != right.shape:
        because = f"{called} has {ours.size} elements where the reference has {right.size}"
        return "wrong", because
    if np.array_equal(ours, right):  # false of NaN, and much faster
        return "correct", ""
    good = agrees(ours, right, exercise.tolerance(parameter))
    if good.all():
        return "correct", ""
    first = int(np.argmin(good))
    verdict: Verdict = "not finite" if _not_finite(ours[~good]) else "wrong"
    place = f"{called}[{first}]" if parameter.holds == "many" else called
    share = f" ({np.count_nonzero(~good)} of {good.size} differ)" if good.size > 1 else ""
    return verdict, f"{place} is {ours[first]} where the reference has {right[first]}{share}"


def _called(parameter: Parameter) -> str:
    return "the returned value" if parameter.name == "result" else parameter.name


def _not_finite(values: np.ndarray) -> bool:
    if values.dtype.names:
        return any(_not_finite(values[name]) for name in values.dtype.names)
    return np.issubdtype(values.dtype, np.inexact) and not np.isfinite(values).all()


_NOISE = re.compile(
    r"^\s*$|^-+$|mpirun|orterun|ORTE_ERROR_LOG|PMIX|\*\*\* |"
    r"^\[[^\]]*\] (?:Signal|Failing|\[ ?\d+\]|\*\*\*)|Primary job|"
    r"per user-direction|exit code|non-zero|^\s*Process name|detected that|noticed that"
)


def _last_words(stderr: str) -> str:
    kept = [line for line in stderr.splitlines() if not _NOISE.search(line)]
    return _short(kept[-1]) if kept else ""


def _short(text: str, most: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."
