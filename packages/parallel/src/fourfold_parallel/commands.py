"""Subcommands of `fourfold`, over all installed packages: reproduce them, write the report, list them."""

import os
import sys
import time
from pathlib import Path
from typing import Literal

from fourfold_parallel.reproduce.cli import Switch
from fourfold_parallel.reproduce.scale import Scale


def reproduce(
    *,
    scale: Scale = "laptop",
    only: str = "all",
    resume: Switch = False,
    jobs: int = os.cpu_count() or 1,
    out: Path = Path("out"),
) -> None:
    """Reproduce the papers at a scale and write a report of every claim.

    Args:
        scale: smoke: a few minutes on 2 cores. laptop: up to 45 minutes. paper: write, for each paper,
            job files with the paper's own hyper-parameters, and print how to start them.
        only: Packages, separated by commas: goldfish,loki.
        resume: Keep what is finished and go on from checkpoints, instead of starting over.
        jobs: Packages worked on at a time; they share the cores.
        out: Folder for records, ledgers, figures and the report.
    """
    from fourfold_parallel.reproduce import report, side_by_side, terminal
    from fourfold_parallel.reproduce.experiment import experiment_of, installed

    target = terminal.console()
    terminal.start(target)
    names = installed() if only == "all" else [name.strip() for name in only.split(",")]
    experiments = {name: experiment_of(name) for name in names}
    if scale == "paper":
        for name, experiment in experiments.items():
            terminal.write_launches(target, name, experiment.launches(), out / scale / name)
        return
    ready = [name for name, experiment in experiments.items() if experiment.stages(scale)]
    started_s = time.perf_counter()
    outcomes = side_by_side.perform_all(
        ready, scale, out / scale, resume=resume, jobs=jobs, target=target
    )
    rows = [row for name in ready for row in outcomes[name].rows]
    if rows:
        target.print(terminal.ledger_table(rows))
        elapsed_s = time.perf_counter() - started_s
        page = report.write(out / scale, scale=scale, elapsed_s=elapsed_s)
        target.print(
            f"{len(rows)} claims judged in {elapsed_s:.0f} s. Report: {page}", soft_wrap=True
        )
    errors = [f"{name}: {outcomes[name].error}" for name in ready if outcomes[name].error]
    if errors:
        raise ValueError("\n".join(errors))


def report(folder: Path, /) -> None:
    """Write the report again from the ledgers, figures and records of `out/SCALE`.

    Args:
        folder: Such as `out/smoke`.
    """
    from fourfold_parallel.reproduce.report import write

    print(write(folder, scale=folder.name))  # noqa: T201 - where it lies is the answer


def packages() -> None:
    """List the installed papers, with the command that says what each can do."""
    from importlib.metadata import metadata

    from fourfold_parallel.reproduce.experiment import installed

    for name in installed():
        summary = metadata(f"fourfold-{name.replace('_', '-')}")["Summary"]
        print(f"{summary}\n    python -m fourfold_{name} --help")  # noqa: T201 - the answer


def probe(
    *,
    out: Path,
    ranks: int = 2,
    model: Path | Literal["llama"] = "llama",
    width: int = 512,
    batch: int = 8,
    sequence: int = 128,
    precision: Literal["fp32", "bf16"] = "fp32",
    clock: Literal["wall", "processor"] = "wall",
) -> None:
    """Measure this machine for the planner: products and collectives at a model's local shapes.

    Started by torchrun it measures the ranks of that launch, else it launches `ranks` here.

    Args:
        out: The file to write, such as machine.json.
        ranks: Processes that compute and communicate at once.
        model: A folder or file with a configuration of transformers; llama: four layers of `width`.
        width: Of that Llama's residual stream.
        batch: Sequences of a step, over all ranks.
        sequence: Tokens of a sequence.
        precision: Of the products.
        clock: wall, or processor where other work shares the cores of a CPU: what the ranks would take
            on all cores by themselves.
    """
    from fourfold_parallel import launch
    from fourfold_parallel.plan.probe import probe_launched

    if not launch.is_launched():
        launch.relaunch(sys.argv[1:], ranks=ranks)
        return
    machine = probe_launched(
        width if model == "llama" else model, name=out.stem, batch=batch, sequence=sequence,
        precision=precision, clock=clock,
    )  # fmt: skip
    if launch.is_main_rank():
        machine.save(out)
        print(  # noqa: T201 - what was written
            f"{out}: {len(machine.products)} products, {len(machine.parts)} pieces of a step and "
            f"{len(machine.curves)} kinds of collectives, measured on {launch.world_size()} ranks"
        )
