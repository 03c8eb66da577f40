"""Time the scorer beside ParEval's way of running outputs, on the same outputs and machine.

    scripts/env python benchmarks/hpc_coder_score.py

No ParEval checkout is needed: its driver loop is written out below as its sources do it. One translation
unit per output with answer, oracle and harness; one cold compilation; one output at a time; for every launch
a process that checks on one size, then times five calls of the answer and five of the baseline, with fresh
`rand()` data between. No sandbox, no cache. Four rounds run in turn: ParEval's loop, ours from an empty cache
on one job and on two, ours again from the warm cache. Times are wall and processor seconds of each round.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fourfold_hpc_coder import score
from fourfold_hpc_coder.evaluation import Launch, Model
from fourfold_hpc_coder.judge import Settings
from fourfold_hpc_coder.problems import own_problems
from fourfold_hpc_coder.sandbox import find_sandbox
from fourfold_parallel.run.progress import silent
from fourfold_parallel.run.records import hardware

NAMES = ("55_transform_relu", "27_reduce_average")
MODELS: tuple[Model, ...] = ("serial", "omp")
SAMPLES = 16
"""Per prompt, of which about three in ten repeat another, as a code model's do at temperature 0.2."""
LAUNCHES: dict[Model, tuple[Launch, ...]] = {
    "serial": (Launch(),),
    "omp": (Launch(), Launch(threads=2), Launch(threads=4)),
}

LOOP = """
#include <algorithm>
#include <chrono>
#include <cmath>
#include <complex>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <numeric>
#include <random>
#include <string>
#include <vector>
{prompt}
{answer}
namespace oracle {{
{reference}
}}
static void fill(std::vector<double> &x) {{ for (auto &v : x) v = 20.0 * rand() / RAND_MAX - 10; }}
static double seconds() {{
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}}
int main() {{
    for (int attempt = 0; attempt < 2; ++attempt) {{
        std::vector<double> x(1024);
        fill(x);
        auto y = x;
        if (!({compare})) {{ std::printf("Validation: FAIL\\n"); return 0; }}
    }}
    std::printf("Validation: PASS\\n");
    std::vector<double> x({size});
    fill(x);
    double total = 0;
    for (int i = 0; i < 5; ++i) {{
        double began = seconds(); {call}; total += seconds() - began; fill(x);
    }}
    std::printf("Time: %.14f\\n", total / 5);
    total = 0;
    for (int i = 0; i < 5; ++i) {{
        double began = seconds(); oracle::{call}; total += seconds() - began; fill(x);
    }}
    std::printf("BestSequential: %.14f\\n", total / 5);
}}
"""
CALLS = {
    "55_transform_relu": ("relu(x)", "(relu(x), oracle::relu(y), x == y)"),
    "27_reduce_average": ("average(x)", "std::abs(average(x) - oracle::average(y)) < 1e-6"),
}


def answers(name: str, model: Model) -> list[str]:
    """Right answers in different words, wrong ones, ones that do not build, and repetitions."""
    problem = own_problems()[name]
    right = problem.answer(model)
    distinct = [right.replace("x.size()", f"x.size() + {n} - {n}") for n in range(7)]
    distinct += [right.replace("x[i]", f"({n} + x[i])") for n in (1, 2)]
    distinct += [right.replace("x[i]", "x[i", 1), right.replace("size_t i", "size_t j")]
    return [*distinct, *distinct[: SAMPLES - len(distinct)]]


def pareval(folder: Path) -> list[bool]:
    """Their loop; whether each output was found valid in every run."""
    valid = []
    for name in NAMES:
        problem = own_problems()[name]
        call, compare = CALLS[name]
        reference = f"{problem.declaration('serial')} {{\n{problem.answer('serial')}"
        for model in MODELS:
            for answer in answers(name, model):
                text = LOOP.format(
                    prompt=problem.prompt(model),
                    answer=answer,
                    reference=reference,
                    compare=compare,
                    call=call,
                    size=problem.timing_size,
                )
                (folder / "driver.cc").write_text(text)
                flags = ["-std=c++17", "-O3", *(["-fopenmp"] if model == "omp" else [])]
                built = subprocess.run(
                    ["g++", *flags, "driver.cc", "-o", "driver"],
                    cwd=folder,
                    capture_output=True,
                    check=False,
                )
                runs = []
                for launch in LAUNCHES[model] if built.returncode == 0 else ():
                    environment = {**os.environ, "OMP_NUM_THREADS": str(launch.threads)}
                    found = subprocess.run(
                        [folder / "driver"], env=environment, capture_output=True, check=False
                    )
                    runs.append(found.returncode == 0 and b"PASS" in found.stdout)
                valid.append(bool(runs) and all(runs))
    return valid


def ours(outputs: Path, folder: Path, jobs: int, *, is_cached: bool) -> list[bool]:
    """Our scorer on the same outputs and launches."""
    settings = score.with_launches(Settings(), LAUNCHES)
    plan = score.Plan(
        outputs=outputs,
        folder=folder,
        models=MODELS,
        settings=settings,
        sandbox=find_sandbox(allow_none=False),
        jobs=jobs,
        ks=(1,),
        is_cached=is_cached,
    )
    scored = score.score(plan, silent)
    return [judgement.sample.right for one in scored.judged for judgement in one.judgements]


def timed(work) -> tuple[list[bool], float, float]:
    """Verdicts, wall seconds, processor seconds of this process and its children."""

    def cpu_s() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used)

    began_s, began_cpu_s = time.perf_counter(), cpu_s()
    found = work()
    return found, time.perf_counter() - began_s, cpu_s() - began_cpu_s


def main() -> None:
    """Run the rounds, print ratios, append a record."""
    root = Path(tempfile.mkdtemp(prefix="fourfold-benchmark-"))
    entries = [
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
    outputs = root / "outputs.json"
    outputs.write_text(json.dumps(entries))
    rounds = {}
    try:
        verdicts, *rounds["pareval's loop"] = timed(lambda: pareval(root))
        for jobs in (1, 2):
            os.environ["FOURFOLD_CACHE"] = str(root / f"cache-{jobs}")
            title = f"ours, cold, {jobs} job{'s' * (jobs > 1)}"
            found, *rounds[title] = timed(
                lambda jobs=jobs: ours(outputs, root / f"scores-{jobs}", jobs, is_cached=True)
            )
            if found != verdicts:
                sys.exit(f"verdicts differ: {found} and {verdicts}")
        found, *rounds["ours, warm"] = timed(
            lambda: ours(outputs, root / "scores-warm", 1, is_cached=True)
        )
        if found != verdicts:
            sys.exit(f"verdicts differ: {found} and {verdicts}")
    finally:
        shutil.rmtree(root, ignore_errors=True)
    wall_s, cpu_s = rounds["pareval's loop"]
    for title, (ours_s, ours_cpu_s) in rounds.items():
        print(
            f"{title:22} {ours_s:7.2f} s wall, {ours_cpu_s:7.2f} s processor; "
            f"{wall_s / ours_s:5.1f} and {cpu_s / max(ours_cpu_s, 1e-3):5.1f} times faster"
        )
    record = {
        "benchmark": "hpc_coder_score",
        "outputs": len(verdicts),
        "distinct": sum(len(set(entry["outputs"])) for entry in entries),
        "rounds": {
            title: {"elapsed_s": round(a, 3), "cpu_s": round(b, 3)}
            for title, (a, b) in rounds.items()
        },
        "hardware": hardware(),
    }
    with Path(__file__).with_suffix(".jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
