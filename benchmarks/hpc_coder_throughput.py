"""Judgements a second and core: 34 OpenMP answers, one to each built-in problem, at two jobs.

    scripts/env python benchmarks/hpc_coder_throughput.py [--against CHECKOUT] [--repeats N]

Rounds, in turn, each in a process of its own: from an empty cache; from a cache that holds what lies beneath
answers, and no verdict (a trainer's case: every answer is new); from a cache of verdicts. `--against` names
another checkout of this repository, such as one of the commit before, whose rounds are taken in between. The
profile says where the processor time of a round goes: seconds that each kind of job took, summed over jobs,
and how much of the round's wall time was a timing, during which nothing else may run. Rates need an idle
machine; the ratio of two rounds needs one that is equally busy.
"""

import argparse
import contextlib
import ctypes
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

JOBS = 2
ROUNDS = ("cold", "new answers", "verdicts kept")
PR_SET_CHILD_SUBREAPER = 36
"""Of prctl(2): processes whose parent ended become ours, and their processor time with them."""


def kind(command: tuple[str, ...]) -> str:
    """The kind of a compiler's job."""
    text = " ".join(command)
    if "c++-header" in text or "-E" in command:
        return "precompile what answers include"
    if "driver.cc" in text:
        return "compile drivers"
    if "-c" in command and "answer.cpp" not in text:
        return "compile what lies beneath drivers"
    if "-fsanitize=thread" in text:
        return "compile for the race checker"
    return "compile answers and references"


def cpu_s() -> float:
    """Processor seconds of this process and of everything that ended below it."""
    with contextlib.suppress(ChildProcessError):  # none is left
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(both.ru_utime + both.ru_stime for both in used)


def round_(root: Path, name: str) -> dict[str, Any]:
    """One round in this process."""
    from fourfold_hpc_coder.judge import artifacts, build, judge, reference
    from fourfold_hpc_coder.problems.library import own_problems
    from fourfold_hpc_coder.score import schedule, score

    stages: defaultdict[str, float] = defaultdict(float)
    lock = threading.Lock()

    def counted(work: Callable[..., Any], title: Callable[..., str]) -> Callable[..., Any]:
        def timed(*words: Any, **more: Any) -> Any:
            began_s = time.perf_counter()
            try:
                return work(*words, **more)
            finally:
                with lock:
                    stages[title(*words)] += time.perf_counter() - began_s

        return timed

    wrapped: list[tuple[Any, str, Callable[..., str]]] = [
        (artifacts, "compiling", lambda _, command, __: kind(command)),
        (schedule, "time_candidate", lambda *_: "time answers, alone"),
        (judge, "find_race", lambda *_: "(race checker, in all)"),
        (reference, "trusted_answers", lambda *_: "(references, in all)"),
    ]
    for module, name_of, title in wrapped:
        setattr(module, name_of, counted(getattr(module, name_of), title))
    setattr(build, "compiling", artifacts.compiling)  # noqa: B010 - unknown to type checkers
    entries = [
        {
            "name": problem.name,
            "problem_type": problem.problem_type,
            "parallelism_model": "omp",
            "prompt": problem.prompt("omp"),
            "outputs": [problem.answer("omp")],
        }
        for problem in own_problems().values()
    ]
    outputs = root / f"{name}.json"
    outputs.write_text(json.dumps(entries))
    began_s, began_cpu_s = time.perf_counter(), cpu_s()
    result = score.score_file(
        score.Scoring(
            outputs=outputs,
            folder=root / name,
            models=("omp",),
            jobs=JOBS,
            is_cached=name == ROUNDS[2],
        )
    )
    elapsed_s, spent_s = time.perf_counter() - began_s, cpu_s() - began_cpu_s
    verdicts = [judgement.verdict for entry in result.judged for judgement in entry.judgements]
    if verdicts != ["correct"] * len(entries):
        raise SystemExit(f"verdicts of {name}: {verdicts}")
    return {
        "answers": len(verdicts),
        "elapsed_s": round(elapsed_s, 3),
        "cpu_s": round(spent_s, 3),
        "stages_s": {title: round(value, 2) for title, value in sorted(stages.items())},
    }


def child(checkout: Path, root: Path, name: str) -> dict[str, Any]:
    """A round in a process of its own, of a checkout's packages."""
    sources = [
        str(checkout / "packages" / package / "src") for package in ("parallel", "hpc_coder")
    ]
    environment = {
        **os.environ,
        "FOURFOLD_CACHE": str(root / "cache"),
        "PYTHONPATH": os.pathsep.join(sources),
    }
    words = [sys.executable, __file__, "--round", name, "--root", str(root)]
    called = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if called.returncode:
        sys.exit(called.stderr)
    return json.loads(called.stdout.splitlines()[-1])


def main() -> None:
    """Run the rounds, print rates and ratios, append a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--round", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if chosen.round:
        print(json.dumps(round_(chosen.root, chosen.round)))
        return
    from fourfold_parallel.common.records import hardware

    here = Path(__file__).resolve().parents[1]
    checkouts = {"ours": here} | ({"before": chosen.against.resolve()} if chosen.against else {})
    load = os.getloadavg()[0]
    rounds: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for _ in range(chosen.repeats):
        roots = {who: Path(tempfile.mkdtemp(prefix="fourfold-")) for who in checkouts}
        try:
            for name in ROUNDS:
                # The last round needs verdicts, which the second did not keep.
                for who, checkout in checkouts.items():
                    taken = child(checkout, roots[who], name)
                    if name == ROUNDS[2]:
                        shutil.rmtree(roots[who] / name)
                        taken = child(checkout, roots[who], name)
                    rounds.setdefault(who, {}).setdefault(name, []).append(taken)
        finally:
            for root in roots.values():
                shutil.rmtree(root, ignore_errors=True)
    for who, of_one in rounds.items():
        for name, several in of_one.items():
            best = min(several, key=lambda taken: taken["elapsed_s"])
            rate = best["answers"] / best["elapsed_s"]
            per_core = best["answers"] / max(best["cpu_s"], 1e-9)
            print(
                f"{who:7} {name:14} {best['elapsed_s']:7.2f} s wall, {best['cpu_s']:7.2f} s processor: "
                f"{rate:8.2f} a second, {per_core:8.2f} a processor second"
            )
            for title, value in sorted(best["stages_s"].items(), key=lambda pair: -pair[1]):
                print(f"        {title:40} {value:7.2f} s")
    if "before" in rounds:
        for name in ROUNDS:
            least = {who: min(t["elapsed_s"] for t in rounds[who][name]) for who in rounds}
            least_cpu = {who: min(t["cpu_s"] for t in rounds[who][name]) for who in rounds}
            print(
                f"{name}: {least['before'] / least['ours']:.2f} times faster, "
                f"{least_cpu['before'] / least_cpu['ours']:.2f} in processor time"
            )
    record = {
        "benchmark": "hpc_coder_throughput",
        "jobs": JOBS,
        "load_before": round(load, 1),
        "rounds": rounds,
        "hardware": hardware(),
    }
    with Path(__file__).with_suffix(".jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
