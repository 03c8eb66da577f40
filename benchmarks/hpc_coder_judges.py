"""Hold ParEval's runner and this package's judge to the suite of judges, and write the table.

    scripts/env python benchmarks/hpc_coder_judges.py CHECKOUT

Needs a checkout of ParEval (MIT licence), of which `drivers/run-all.py` runs as it is, without a sandbox:
each program of the suite is harmless. Launches are one thread and two.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from fourfold_hpc_coder.judge.bench import JudgeSettings
from fourfold_hpc_coder.judges.suite import cases, judged_here, read_findings, table, write_suite
from fourfold_hpc_coder.problems.library import own_problems
from fourfold_hpc_coder.vocabulary import Processors
from fourfold_parallel.common.records import hardware

PATIENCE_S = 10
"""For a call: one program never answers."""
THREADS = (1, 2)


def pareval(checkout: Path, outputs: Path, folder: Path) -> Path:
    """The real runner's file of results."""
    launches = {
        "serial": {"format": "{exec_path} {args}", "params": [{}]},
        "omp": {
            "format": "{exec_path} {args} {num_threads}",
            "params": [{"num_threads": count} for count in THREADS],
        },
    }
    sizes = {
        case.problem: dict.fromkeys(
            ("serial", "omp"), f"({own_problems()[case.problem].check_size})"
        )
        for case in cases()
    }
    (folder / "launches.json").write_text(json.dumps(launches))
    (folder / "sizes.json").write_text(json.dumps(sizes))
    make = ["make", "--always-make", "models/serial-driver.o", "models/omp-driver.o"]
    subprocess.run(make, cwd=checkout / "drivers" / "cpp", check=True, capture_output=True)
    results = folder / "results.json"
    words = ["run-all.py", str(outputs), "-o", str(results), "--yes-to-all", "--hide-progress"]
    words += ["--launch-configs", str(folder / "launches.json"), "--log", "ERROR"]
    words += ["--problem-sizes", str(folder / "sizes.json"), "--scratch-dir", str(folder)]
    words += ["--include-models", "serial", "omp", "--build-timeout", "120"]
    words += ["--run-timeout", str(PATIENCE_S)]
    subprocess.run([sys.executable, *words], cwd=checkout / "drivers", check=True)
    return results


def main() -> None:
    """Run both, print the table, append a record."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} CHECKOUT (of ParEval)")
    settings = JudgeSettings(time_limit_s=PATIENCE_S).with_launches(
        {"omp": tuple(Processors(threads=count) for count in THREADS)}
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        outputs = write_suite(folder / "suite")
        findings = {
            "this package": judged_here(settings),
            "ParEval's runner": read_findings(
                pareval(Path(sys.argv[1]).resolve(), outputs, folder)
            ),
        }
    print(table(findings))
    record = {
        "benchmark": "hpc_coder_judges",
        "findings": {
            judge: [
                {
                    "case": finding.case.name,
                    "may_count": finding.case.counts,
                    "counted": finding.counted,
                    "verdict": finding.verdict,
                }
                for finding in of_judge
            ]
            for judge, of_judge in findings.items()
        },
        "hardware": hardware(),
    }
    with Path(__file__).with_suffix(".jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
