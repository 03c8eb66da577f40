"""Is a program really parallel? What its text says, and what it did when it ran.

Neither alone is enough. A pragma in a comment satisfies a search for a substring (ParEval's check), and an
empty parallel region before a sequential loop satisfies any look at the text; a program that was given one
processor shows nothing when it runs. Both must agree: the text uses the model, and where a launch had more
than one processor, work was done inside parallel regions that several threads entered, or several ranks
computed and data moved between them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import assert_never

from fourfold_hpc_coder.judge.protocol import Evidence
from fourfold_hpc_coder.vocabulary import Model, Processors

WORKING_SHARE = 0.05
"""Least share of a call's processor time that must be spent in parallel regions, or by other threads."""


REPEATED_SHARE = 0.8
"""Ranks that each compute so much of what one rank computes alone share nothing. Ranks of our own answers
compute 0.7 at most, and on three 0.5, where the whole takes 0.3 ms or more."""
MEASURABLE_S = 0.0003
"""Least time of that to judge by."""
CROWD = 16
"""Most ranks of a launch that settles whether they repeat the work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """Whether a program is parallel as asked, and the observation that decided it."""

    parallel: bool
    because: str


_DIRECTIVES = r"parallel|task|taskloop|teams|target|sections|for"
_MESSAGES = (
    r"\bMPI_(?:I?(?:[bsr]?send|m?recv|sendrecv|bcast|reduce\w*|allreduce|gatherv?|allgatherv?|scatterv?|"
    r"alltoall\w*|scan|exscan|neighbor_\w+)|R?(?:put|get|accumulate)|get_accumulate|fetch_and_op|"
    r"compare_and_swap|win_shared_query)\w*\s*\("
)
_KOKKOS = (
    r"\bparallel_(?:for|reduce|scan)\s*\(|"
    r"\bKokkos::(?:Experimental::)?(?:sort|\w+_scan|transform)\w*\s*\("
)
_POLICY = r"\b(?:execution\s*::\s*)?par(?:_unseq)?\s*,|\bparallel(?:_unsequenced)?_policy\b"
_GPU = r"\b(?:threadIdx|blockIdx|this_grid|this_thread_block)\b"


def without_comments(text: str) -> str:
    """C++ text with comments removed and the contents of string and character literals blanked."""
    # What is not closed goes to the end, for the next one not to be sought there again.
    pattern = re.compile(
        r'//[^\n]*|/\*.*?(?:\*/|\Z)|R"(\w*)\(.*?(?:\)\1"|\Z)|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'',
        re.DOTALL,
    )
    return pattern.sub(lambda match: " " if match.group().startswith("/") else '""', text)


_CONDITION = re.compile(r"[ \t]*(?:#|%:)[ \t]*(if|ifdef|ifndef|else|elif|endif)\b[ \t]*(\S*)")


def without_dead(code: str) -> str:
    """Code without what stands between `#if 0` and its `#else` or `#endif`."""
    kept: list[str] = []
    depth = 0  # of conditions, within the one that is dead
    for line in code.split("\n"):
        condition = _CONDITION.match(line)
        word, value = condition.groups() if condition else ("", "")
        if not depth and word == "if" and value in ("0", "(0)", "false"):
            depth = 1
        elif depth:
            depth += word.startswith("if")
            depth -= word == "endif" or (depth == 1 and word in ("else", "elif"))
        else:
            kept.append(line)
    return "\n".join(kept)


def in_text(body: str, model: Model) -> Proof:
    """The proof by the text: a directive, a message, a pattern, a thread's index, outside of comments."""
    joined = re.sub(r"\\\n", " ", body)
    pragmas = re.sub(r'_Pragma\s*\(\s*"([^"]*)"\s*\)', r"\n#pragma \1\n", joined)
    code = without_dead(without_comments(pragmas))
    match model:
        case "serial":
            return Proof(parallel=True, because="a serial answer was asked for")
        case "omp":
            return _has_openmp(code)
        case "mpi":
            return _has(_MESSAGES, code, "no MPI call that moves data between ranks")
        case "mpi+omp":
            messages = in_text(body, "mpi")
            return _has_openmp(code) if messages.parallel else messages
        case "kokkos":
            return _has(
                _KOKKOS, code, "no Kokkos pattern (parallel_for, parallel_reduce, parallel_scan)"
            )
        case "stdpar":
            return _has(_POLICY, code, "no algorithm with a parallel policy (std::execution::par)")
        case "cuda" | "hip":
            return _has(_GPU, code, "no use of the thread's index, so every thread does the same")
        case _:
            assert_never(model)


def _has(pattern: str, code: str, otherwise: str) -> Proof:
    sign = re.search(pattern, code, re.IGNORECASE)
    if sign:
        return Proof(parallel=True, because=f"it has {sign.group().strip(' (')}")
    return Proof(parallel=False, because=f"it has {otherwise}")


def _has_openmp(code: str) -> Proof:
    written = r"(?:^[ \t]*#[ \t]*pragma[ \t]+omp\b|\bomp\s*::\s*directive\s*\()"
    pattern = rf"{written}[^\n]{{0,1000}}?\b(?:{_DIRECTIVES})"
    sign = re.search(pattern, code, re.MULTILINE)
    if sign:
        return Proof(parallel=True, because=f"it has {' '.join(sign.group().split())}")
    return Proof(parallel=False, because="it has no OpenMP directive that divides work")


_BY_TURNS = re.compile(
    r"\bschedule\s*\(\s*(?:\w+\s*:\s*)?(?:dynamic|guided|runtime|auto)\b|\btask|\bsections\b"
)


def is_by_turns(text: str) -> bool:
    """Whether threads take their work in turns, so that on a busy machine one may take all of it."""
    return _BY_TURNS.search(without_comments(text)) is not None


def in_action(
    evidence: Mapping[Processors, Evidence], model: Model, *, by_turns: bool = False
) -> Proof:
    """The proof by the runs, on those launches that had several processors.

    Args:
        evidence: of one call on the timing input, by launch.
        model: what was asked for.
        by_turns: whether threads take their work in turns, of which one may take all.
    """
    match model:
        case "serial" | "cuda" | "hip":
            return Proof(parallel=True, because="nothing to observe")
        case "kokkos":
            return _worked(evidence, "no time was spent in Kokkos' patterns")
        case "stdpar":
            several = {
                processors: observed
                for processors, observed in evidence.items()
                if processors.threads > 1
            }
            lack = "no work was divided by an algorithm with a parallel policy"
            return _worked(several, lack, spins=True)
        case "omp":
            several = {
                processors: observed
                for processors, observed in evidence.items()
                if processors.threads > 1
            }
            return _worked(several, "no work was done inside parallel regions", by_turns=by_turns)
        case "mpi":
            return _talked(evidence)
        case "mpi+omp":
            talked = _talked(evidence)
            several = {
                processors: observed
                for processors, observed in evidence.items()
                if processors.threads > 1
            }
            return (
                _worked(several, "no work was done inside parallel regions", by_turns=by_turns)
                if talked.parallel
                else talked
            )
        case _:
            assert_never(model)


def clearest(calls: Sequence[Evidence], processors: Processors) -> Evidence:
    """Of several calls with the same work, that which tells most about it.

    On several threads, the one with most time in regions; on one, that which was disturbed least, since a
    neighbour's turn on the processor reads like work of our own.
    """
    if processors.threads > 1:
        return max(calls, key=lambda call: call.region_cpu_s)
    return min(calls, key=lambda call: call.computed_s)


def _worked(
    evidence: Mapping[Processors, Evidence],
    otherwise: str,
    *,
    by_turns: bool = False,
    spins: bool = False,
) -> Proof:
    """The proof by regions; where threads wait by spinning, the time of the others says nothing."""
    if not evidence:
        return Proof(
            parallel=True, because="no launch had several threads, so nothing was observed"
        )
    for processors, observed in evidence.items():
        inside = observed.region_cpu_s / max(observed.computed_s, 1e-9)
        others = (observed.process_cpu_s - observed.main_cpu_s) / max(
            observed.process_cpu_s - observed.message_cpu_s, 1e-9
        )
        # A region that nobody else enters is a sequential loop with a directive; so is one in which others
        # wait while one thread works, as at a `single`.
        shared = 1 - observed.busiest_cpu_s / max(observed.team_cpu_s, 1e-9)
        is_idle = not by_turns and observed.team_cpu_s > 0 and shared < WORKING_SHARE
        is_alone = processors.threads > 1 and (observed.team <= observed.ranks or is_idle)
        share = inside if spins else max(inside, others)
        if observed.regions and not is_alone and share >= WORKING_SHARE:
            return Proof(
                parallel=True,
                because=f"on {processors}, {observed.regions:.0f} parallel regions took {inside:.0%} of the "
                "calling threads' time"
                + ("" if spins else f", and other threads did {max(others, 0):.0%} of the work"),
            )
    return Proof(parallel=False, because=otherwise)


def _repeated(evidence: Mapping[Processors, Evidence]) -> str:
    """The sign that each rank does the whole work; empty where that is not so, or cannot be seen."""
    computed_s = {
        processors: observed.computed_s
        for processors, observed in evidence.items()
        if processors.threads == 1
    }
    alone_s = computed_s.get(Processors(), 0.0)
    several = {
        processors: spent_s / alone_s / processors.ranks
        for processors, spent_s in computed_s.items()
        if processors.ranks > 1 and alone_s >= MEASURABLE_S
    }
    if not several or min(several.values()) < REPEATED_SHARE:
        return ""
    processors, share = max(several.items(), key=lambda pair: pair[0].ranks)
    return f"each of {processors} computed {share:.0%} of what one rank does alone"


def second_look(evidence: Mapping[Processors, Evidence], cores: int) -> Processors | None:
    """A launch to settle whether ranks repeat the work, where it looks so; otherwise None.

    A slow moment of the machine can make half of the work take the processor time of all of it. Of more
    ranks each has a smaller part, for which the moment would have to be slower still.
    """
    crowd = Processors(ranks=min(2 * cores, CROWD))
    most = max((processors.ranks for processors in evidence), default=0)
    return crowd if most < crowd.ranks and _repeated(evidence) else None


def _talked(evidence: Mapping[Processors, Evidence]) -> Proof:
    several = {
        processors: observed for processors, observed in evidence.items() if processors.ranks > 1
    }
    if not several:
        return Proof(parallel=True, because="no launch had several ranks, so nothing was observed")
    talked = {
        processors: observed
        for processors, observed in several.items()
        if observed.talking_ranks > 1
    }
    for processors, observed in talked.items():
        if observed.working_ranks > 1:
            if why := _repeated(evidence):
                return Proof(parallel=False, because=why)
            return Proof(
                parallel=True,
                because=f"on {processors}, {observed.messages:.0f} calls moved data between "
                f"{observed.talking_ranks:.0f} ranks",
            )
    lack = "one rank did all the work" if talked else "no data moved between ranks"
    return Proof(parallel=False, because=lack)
