"""Time the scorer beside ParEval's own runner, on the same outputs, sizes, launches and machine.

    scripts/env python benchmarks/hpc_coder_score.py CHECKOUT [REPEATS]

Needs a checkout of ParEval (MIT licence), of which `drivers/run-all.py` runs as it is, without a sandbox,
after the `make` that its manual asks for first, which is timed apart. Rounds, in turn: ParEval's runner; ours
with two jobs from an empty cache, then from one that holds only what is beneath every answer, as `make`
leaves it to ParEval's; the checkout's problems from an empty cache; ours again from the warm cache; then once
more from the first. OpenMP answers are checked for races by ours only. Times are wall and processor seconds
of each round, compilers and programs included: a sandbox ends before the processes in it are counted, so
this process adopts them. Wall times need an idle machine; processor times only lengthen on a busy one.
"""

import contextlib
import ctypes
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fourfold_hpc_coder.judge.bench import Bench, JudgeSettings, precompile, ready
from fourfold_hpc_coder.pareval.checkout import open_checkout
from fourfold_hpc_coder.problems.library import own_problems
from fourfold_hpc_coder.sandbox.process import find_sandbox
from fourfold_hpc_coder.sandbox.scratch import scratch_folder
from fourfold_hpc_coder.score import score
from fourfold_hpc_coder.score.schedule import AnyProblem
from fourfold_hpc_coder.vocabulary import Model, Processors
from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.records import hardware

NAMES = ("55_transform_relu", "27_reduce_average")
MODELS: tuple[Model, ...] = ("serial", "omp")
SAMPLES = 10
"""Per prompt, of which three repeat another, as a code model's do at temperature 0.2."""
REPEATS = 2
"""Of every round, unless told otherwise."""
PATIENCE_S = 120
"""For builds and calls, here and there: every answer ends, and a busy machine must not fail one."""
LAUNCHES: dict[Model, tuple[Processors, ...]] = {
    "serial": (Processors(),),
    "omp": (Processors(), Processors(threads=2), Processors(threads=4)),
}


def answers(name: str, model: Model) -> list[str]:
    """Right answers in different words, a wrong one, two that do not build, and repetitions."""
    right = own_problems()[name].answer(model)
    distinct = [right.replace("x.size()", f"x.size() + {n} - {n}") for n in range(4)]
    distinct += [right.replace("x[i]", "(1 + x[i])")]
    distinct += [right.replace("x[i]", "x[i", 1), right.replace("size_t i", "size_t j")]
    return [*distinct, *distinct[: SAMPLES - len(distinct)]]


def pareval(checkout: Path, outputs: Path, folder: Path) -> list[bool]:
    """The real runner; whether each output was found valid in every run."""
    folder.mkdir()
    launches = {
        "serial": {"format": "{exec_path} {args}", "params": [{}]},
        "omp": {
            "format": "{exec_path} {args} {num_threads}",
            "params": [{"num_threads": one.threads} for one in LAUNCHES["omp"]],
        },
    }
    (folder / "launches.json").write_text(json.dumps(launches))
    words = ["run-all.py", str(outputs), "-o", str(folder / "results.json"), "--yes-to-all"]
    words += ["--hide-progress", "--launch-configs", str(folder / "launches.json")]
    words += ["--problem-sizes", str(outputs.with_name("sizes.json")), "--log", "ERROR"]
    words += ["--scratch-dir", str(folder), "--include-models", *MODELS]
    words += ["--build-timeout", str(PATIENCE_S), "--run-timeout", str(PATIENCE_S)]
    subprocess.run(
        [sys.executable, *words], cwd=checkout / "drivers", check=True, capture_output=True
    )
    results = json.loads((folder / "results.json").read_text())
    return [one["are_all_valid"] for entry in results for one in entry["outputs"]]


def make(checkout: Path) -> list[bool]:
    """ParEval's own drivers, anew."""
    words = ["make", "--always-make", *(f"models/{model}-driver.o" for model in MODELS)]
    subprocess.run(words, cwd=checkout / "drivers" / "cpp", check=True, capture_output=True)
    return []


def lay(cache: Path) -> None:
    """What every answer of ours is compiled against and linked with, and no problem's driver."""
    os.environ["FOURFOLD_CACHE"] = str(cache)
    with scratch_folder() as scratch:
        sandbox = find_sandbox(allow_none=False)
        bench = Bench(sandbox=sandbox, scratch=scratch, settings=JudgeSettings(), secret=0)
        for model in MODELS:
            precompile(bench, model, ["int"], second_pass=True)
            ready(bench, model)


def ours(
    outputs: Path, folder: Path, jobs: int, find: Callable[..., AnyProblem] = score.built_in
) -> list[bool]:
    """Our scorer on the same outputs and launches."""
    plan = score.Scoring(
        outputs=outputs,
        folder=folder,
        models=MODELS,
        settings=JudgeSettings(time_limit_s=PATIENCE_S).with_launches(LAUNCHES),
        sandbox=find_sandbox(allow_none=False),
        jobs=jobs,
        ks=(1,),
        is_cached=True,
        find=find,
    )
    scored = score.score_file(plan, silent)
    return [judgement.sample.right for one in scored.judged for judgement in one.judgements]


PR_SET_CHILD_SUBREAPER = 36
"""Of prctl(2): processes whose parent ended become ours, and their processor time with them."""


def timed(work: Callable[[], list[bool]]) -> tuple[list[bool], float, float]:
    """Verdicts, wall seconds, processor seconds of this process and everything below it."""

    def cpu_s() -> float:
        with contextlib.suppress(ChildProcessError):  # none is left
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used)

    began_s, began_cpu_s = time.perf_counter(), cpu_s()
    found = work()
    return found, time.perf_counter() - began_s, cpu_s() - began_cpu_s


def entries() -> list[dict[str, object]]:
    """The outputs file."""
    return [
        {
            "problem_type": own_problems()[name].problem_type,
            "language": "cpp",
            "name": name,
            "parallelism_model": model,
            "prompt": own_problems()[name].prompt(model),
            "outputs": answers(name, model),
        }
        for name in NAMES
        for model in MODELS
    ]


def main() -> None:
    """Run the rounds, print ratios, append a record."""
    if len(sys.argv) not in (2, 3):
        sys.exit(f"usage: {sys.argv[0]} CHECKOUT (of ParEval) [REPEATS]")
    repeats = int(sys.argv[2]) if len(sys.argv) == 3 else REPEATS
    checkout = Path(sys.argv[1]).resolve()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    load = os.getloadavg()[0]
    root = Path(tempfile.mkdtemp(prefix="fourfold-benchmark-"))
    outputs = root / "outputs.json"
    asked = entries()
    outputs.write_text(json.dumps(asked))
    sizes = {name: dict.fromkeys(MODELS, f"({own_problems()[name].timing_size})") for name in NAMES}
    (root / "sizes.json").write_text(json.dumps(sizes))
    find = open_checkout(checkout, root / "sizes.json").find
    _, *made = timed(partial(make, checkout))
    rounds: dict[str, list[tuple[float, float]]] = {}
    verdicts: list[bool] = []

    def work(title: str, jobs: int, cache: str, repeat: int) -> list[bool]:
        if title.startswith("ParEval"):
            return pareval(checkout, outputs, root / f"theirs-{repeat}")
        os.environ["FOURFOLD_CACHE"] = str(root / f"{cache}-{repeat}")
        folder = root / f"{cache}-{jobs}-{repeat}"
        source = find if "checkout" in title else score.built_in
        return ours(outputs, folder, jobs, source)

    try:
        for repeat in range(repeats):
            for title, jobs, cache in (
                ("ParEval's runner", 1, ""),
                ("ours, cold, 2 jobs", 2, "own"),
                ("ours, cold above what `make` makes, 2 jobs", 2, "beneath"),
                ("ours, the checkout's problems, cold, 2 jobs", 2, "theirs"),
                ("ours, warm", 1, "own"),
            ):
                if cache == "beneath":
                    lay(root / f"{cache}-{repeat}")
                found, *spent = timed(partial(work, title, jobs, cache, repeat))
                verdicts = verdicts or found
                if found != verdicts:
                    sys.exit(f"verdicts of {title} differ: {found} and {verdicts}")
                rounds.setdefault(title, []).append((spent[0], spent[1]))
    finally:
        shutil.rmtree(root, ignore_errors=True)
    best = {title: tuple(map(min, zip(*spent, strict=True))) for title, spent in rounds.items()}
    wall_s, cpu_s = best["ParEval's runner"]
    print(f"{'its make':44} {made[0]:7.2f} s wall, {made[1]:7.2f} s processor")
    for title, (ours_s, ours_cpu_s) in best.items():
        print(
            f"{title:44} {ours_s:7.2f} s wall, {ours_cpu_s:7.2f} s processor; "
            f"{wall_s / ours_s:5.1f} and {cpu_s / max(ours_cpu_s, 1e-3):5.1f} times faster"
        )
    record = {
        "benchmark": "hpc_coder_score",
        "outputs": len(verdicts),
        "distinct": sum(len({*answers(name, model)}) for name in NAMES for model in MODELS),
        "load_before": round(load, 1),
        "make": {"elapsed_s": round(made[0], 3), "cpu_s": round(made[1], 3)},
        "rounds": {
            title: [{"elapsed_s": round(a, 3), "cpu_s": round(b, 3)} for a, b in spent]
            for title, spent in rounds.items()
        },
        "hardware": hardware(),
    }
    with Path(__file__).with_suffix(".jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
