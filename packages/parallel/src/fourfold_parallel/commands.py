"""Subcommands of `fourfold`, over all installed packages: reproduce them, write the report, list them."""

import os
import time
from pathlib import Path

from fourfold_parallel.common.sinks import SinkName, named
from fourfold_parallel.reproduce.cli import Switch
from fourfold_parallel.reproduce.scale import Scale


def reproduce(
    *,
    scale: Scale = "smoke",
    only: str = "all",
    resume: Switch = False,
    jobs: int = os.cpu_count() or 1,
    sink: tuple[SinkName, ...] = (),
    out: Path = Path("out"),
) -> None:
    """Reproduce the papers at a scale and write a report: what was found, and beside it this run.

    Args:
        scale: smoke: a few minutes on 2 cores. laptop: what the committed findings rest on; it says first
            what that took. paper: write, for each paper, job files with the paper's own hyper-parameters,
            and print how to start them.
        only: Packages, separated by commas: goldfish,loki.
        resume: Keep what is finished and go on from checkpoints, instead of starting over.
        jobs: Packages worked on at a time; they share the cores.
        sink: Where the events of the records go too, as they are written.
        out: Folder for records, ledgers, figures and the report.
    """
    sinks = named(sink)  # what is missing is said before anything heavy is imported
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
    if scale != "smoke":
        terminal.print_costs(target, names, scale)
    ready = [name for name, experiment in experiments.items() if experiment.stages(scale)]
    started_s = time.perf_counter()
    outcomes = side_by_side.perform_all(
        ready, scale, out / scale, resume=resume, jobs=jobs, target=target, sinks=sinks
    )
    judged = [name for name in ready if outcomes[name].rows]
    if judged:
        elapsed_s = time.perf_counter() - started_s
        page = report.write(out / scale, scale=scale, elapsed_s=elapsed_s)
        for name in judged:
            entries = report.compare(name, out / scale / name)
            target.print(terminal.compared(name, entries), soft_wrap=True)
        terminal.print_next(target, page, scale, elapsed_s)
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


def watch(record: Path, /, *, once: Switch = False, patience_s: float = 600.0) -> None:
    """Follow a record while its run goes on: loss, tokens a second, time left, memory.

    Args:
        record: The .jsonl file that the run writes.
        once: Show how it stands and end.
        patience_s: A run that writes nothing for so many seconds is taken for dead.
    """
    from rich.console import Console

    from fourfold_parallel.reproduce.watch import watch as follow

    follow(record, Console(highlight=False), once=once, patience_s=patience_s)


def packages() -> None:
    """List the installed papers, with the command that says what each can do."""
    from importlib.metadata import metadata

    from fourfold_parallel.reproduce.experiment import installed

    for name in installed():
        summary = metadata(f"fourfold-{name.replace('_', '-')}")["Summary"]
        print(f"{summary}\n    python -m fourfold_{name} --help")  # noqa: T201 - the answer
