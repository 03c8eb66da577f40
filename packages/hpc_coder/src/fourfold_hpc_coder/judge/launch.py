"""One launch of an answer's program: its answers compared, and timed where that is asked for."""

import math
from dataclasses import dataclass
from pathlib import Path

from fourfold_hpc_coder.judge import failures, parallelism
from fourfold_hpc_coder.judge.bench import Bench, launched
from fourfold_hpc_coder.judge.protocol import EndedError, Evidence, ForgedError, Reply
from fourfold_hpc_coder.judge.reference import Reference, Round, call
from fourfold_hpc_coder.vocabulary import Execution, Model, Processors, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchResult:
    """The result of one launch of a program."""

    verdict: Verdict
    because: str
    output: str
    """The end of its standard error."""
    run: Execution
    evidence: Evidence


_SILENT = Evidence(
    process_cpu_s=0,
    main_cpu_s=0,
    region_cpu_s=0,
    regions=0,
    team=0,
    message_cpu_s=0,
    team_cpu_s=0,
    busiest_cpu_s=0,
    messages=0,
    talking_ranks=0,
    ranks=1,
    working_ranks=0,
)


def _charged_s(reply: Reply, asked: Round, processors: Processors) -> float:
    """Seconds of the call, and of what the program did around it beyond moving its data to every rank."""
    moved = zip(reply.moving_cpu_s, asked.moving_cpu_s, strict=True)
    return reply.runtime_s + sum(
        max(0.0, spent_s - processors.ranks * free_s) for spent_s, free_s in moved
    )


def launch(
    bench: Bench,
    right: Reference,
    model: Model,
    processors: Processors,
    folder: Path,
    *,
    is_timed: bool,
    is_everywhere: bool = False,
) -> LaunchResult:
    """Start the program, have it answer the checks, or one of them and then the timed calls.

    Args:
        bench: sandbox, limits.
        right: the rounds with their right answers.
        model: of the answer.
        processors: on what it runs.
        folder: its program is in `out` there.
        is_timed: whether this launch is timed, for which everything else becomes quiet.
        is_everywhere: whether every rank must return the right value, not the first alone.
    """
    exercise, patience_s = right.exercise, bench.settings.time_limit_s
    where = f"on {processors}, {right.checks[-1].where}"
    verdict: Verdict = "correct"
    because, runtime_s, ran = "", math.inf, True
    calls: list[Evidence] = []

    def right_reply(asked: Round) -> Reply | None:
        nonlocal where, verdict, because
        where = f"on {processors}, {asked.where}"
        reply = call(channel, exercise, asked.arguments)
        verdict, because = failures.of_answer(exercise, reply.outputs, asked.expected, where)
        if verdict == "correct" and is_everywhere and exercise.signature.result:
            if len(reply.elsewhere) != processors.ranks - 1:
                raise ForgedError("a reply on the result channel lacks the value of a rank")
            verdict, because = failures.of_other_ranks(
                exercise, reply.elsewhere, asked.expected, where
            )
        return reply if verdict == "correct" else None

    with launched(bench, folder, model, processors, settings=bench.settings) as channel:
        try:
            channel.connect()
            # The largest first: the smallest is the special case. Before a clock runs, one wakes the threads.
            checks = right.checks[:-2:-1] if is_timed else right.checks[::-1]
            if all(map(right_reply, checks)) and is_timed:
                with bench.quiet.timing():
                    for asked in right.timed:
                        reply = right_reply(asked)
                        if reply is None:
                            break
                        if asked.is_timed:
                            runtime_s = min(_charged_s(reply, asked, processors), runtime_s)
                            calls.append(reply.evidence)
            # A good program also comes to a good end, by itself.
            channel.quit()
            is_over = channel.process.done
            ended = channel.process.finish()
            if verdict == "correct" and (ended.code or not is_over):
                ran = False
                verdict, because = failures.of_end(
                    ended, processors, is_over=is_over, patience_s=patience_s
                )
        except EndedError:
            ran = False
            ended = channel.process.finish()
            verdict, because = failures.of_run(ended, processors, where, patience_s=patience_s)
        except ForgedError as error:
            verdict, because = "cheat", f"{error}, on {processors}"
            ended = channel.process.finish()
    valid = verdict == "correct"
    return LaunchResult(
        verdict=verdict,
        because=because,
        output=ended.stderr,
        run=Execution(
            processors=processors, ran=ran, valid=valid, runtime_s=runtime_s if valid else math.nan
        ),
        evidence=parallelism.clearest(calls or (_SILENT,), processors),
    )
