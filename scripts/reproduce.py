"""Reproduce the papers: run every installed experiment at a scale, then write the report.

    scripts/env python scripts/reproduce.py --scale smoke

Finished stages are kept with --resume; an interrupted stage goes on from its last checkpoint.
"""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

import report
import side_by_side
from fourfold_parallel.reproduce.claims import LedgerRow
from fourfold_parallel.reproduce.cli import Bars, console, ledger_table, print_launches, start
from fourfold_parallel.reproduce.experiment import Experiment, installed
from fourfold_parallel.reproduce.scale import Scale

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Reproduce the papers at a scale and write a report of every claim."""

    scale: Scale = "laptop"
    """smoke: a few minutes on 2 cores. laptop: up to 45 minutes. paper: print, for each
    paper, the launch lines with the paper's own hyper-parameters."""
    only: str = "all"
    """Packages, separated by commas: goldfish,loki."""
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Keep what is finished and go on from checkpoints, instead of starting over."""
    jobs: int = os.cpu_count() or 1
    """Packages worked on at a time; they share the cores."""
    out: Path = ROOT / "out"
    """Folder for records, ledgers, figures and the report."""


def packages() -> tuple[str, ...]:
    """Every package of the workspace, in order of the names."""
    return tuple(sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml")))


def chosen(only: str) -> tuple[str, ...]:
    """The packages that `--only` names.

    Raises:
        ValueError: for a name that is no package.
    """
    if only == "all":
        return packages()
    names = tuple(name.strip() for name in only.split(","))
    unknown = [name for name in names if name not in packages()]
    if unknown:
        raise ValueError(
            f"--only {only}: no package {unknown[0]!r}; there are {', '.join(packages())}"
        )
    return names


def main() -> None:
    """Run, judge, report."""
    options = tyro.cli(Options, prog="scripts/reproduce.py")
    target = console()
    start(target)
    try:
        names = chosen(options.only)
        reproduce(options, {name: installed().get(name) for name in names})
    except ValueError as error:
        target.print(f"[red]{error}[/red]", soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        target.print("interrupted; the same command with --resume goes on from here")
        sys.exit(130)


def reproduce(options: Options, experiments: dict[str, Experiment | None]) -> None:
    """Perform what there is at this scale, and say what there is not."""
    target = console()
    present = {name: one for name, one in experiments.items() if one is not None}
    missing = [name for name, one in experiments.items() if one is None]
    if options.scale == "paper":
        for one in present.values():
            print_launches(target, one.title, one.launches())
    ready = {name: one for name, one in present.items() if one.stages(options.scale)}
    missing += [name for name in present if name not in ready]
    started_s = time.perf_counter()
    rows, errors = perform_all(options, ready, target)
    if rows:
        target.print(ledger_table(rows))
    for name in sorted(missing):
        target.print(
            f"[dim]{name}: nothing to reproduce at scale {options.scale!r} in this version[/dim]"
        )
    if ready:
        elapsed_s = time.perf_counter() - started_s
        page = report.write(options.out / options.scale, scale=options.scale, elapsed_s=elapsed_s)
        target.print(
            f"{len(rows)} claims judged in {elapsed_s:.0f} s. Report: {page}", soft_wrap=True
        )
    if errors:
        raise ValueError("\n".join(errors))


def perform_all(
    options: Options, ready: dict[str, Experiment], target: Console
) -> tuple[list[LedgerRow], list[str]]:
    """The ledger rows of every package that went to its end, and what stopped the others."""
    bars = Bars(target, sum(len(one.stages(options.scale)) for one in ready.values()))
    rows: dict[str, Sequence[LedgerRow]] = {}
    errors: list[str] = []
    with bars.running():
        outcomes = side_by_side.perform_all(
            list(ready),
            options.scale,
            options.out / options.scale,
            resume=options.resume,
            jobs=options.jobs,
            bar=bars.named,
        )
        for name, outcome in outcomes:
            if isinstance(outcome, ValueError):
                errors.append(f"{name}: {outcome}")
            else:
                rows[name] = outcome
    return [row for name in ready if name in rows for row in rows[name]], errors


if __name__ == "__main__":
    main()
