"""The view of long work in a terminal: log lines, progress bars, tables."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

from fourfold_parallel.common.files import write_text
from fourfold_parallel.common.progress import DONE, Progress
from fourfold_parallel.launch import adopt_slurm
from fourfold_parallel.reproduce.costs import cost_of
from fourfold_parallel.reproduce.experiment import committed_results
from fourfold_parallel.reproduce.launches import Launch
from fourfold_parallel.reproduce.report import ORDER, Entry
from fourfold_parallel.reproduce.scale import Scale

VERDICT_STYLE = {
    "reproduced": "green",
    "contradicted": "red",
    "inconclusive": "yellow",
    "not tested": "dim",
}


def console() -> Console:
    """Standard error, so that a record or a table on standard output stays clean."""
    return Console(stderr=True, highlight=False)


def start(target: Console) -> None:
    """Take the ranks that srun started, send log lines to the console, keep libraries' own words away."""
    adopt_slurm()
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=target, show_path=False)],
        force=True,
    )
    logging.getLogger("fourfold_parallel").setLevel(logging.INFO)
    # DeepSpeed and transformers announce the absence of a GPU; a laptop's user knows.
    for noisy in ("DeepSpeed", "transformers", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
        # DeepSpeed sets its level when it is imported, later than this.
        logging.getLogger(noisy).addFilter(lambda record: record.levelno >= logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


class Bars:
    """One progress bar per piece of work, with time left; plain lines where nobody watches a terminal."""

    def __init__(self, target: Console, stages: int) -> None:
        self._console = target
        self._stages = stages
        self._begun = self._ended = 0
        self._bars = RichProgress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=target,
            disable=not target.is_terminal,
        )
        self._all = self._bars.add_task("stages", total=stages, note="", visible=stages > 1)

    @contextmanager
    def running(self) -> Iterator["Bars"]:
        """Draw for the length of a block."""
        with self._bars:
            yield self

    def named(self, name: str) -> Progress:
        """A bar for a piece of work."""
        self._begun += 1
        title = f"{self._begun}/{self._stages} {name}"
        bar = self._bars.add_task(title, total=None, note="")
        if not self._console.is_terminal:
            self._console.print(title)

        def report(done: int, total: int, note: str) -> None:
            is_done = note == DONE
            self._bars.update(bar, completed=done, total=total, note=note, visible=not is_done)
            if is_done:
                self._ended += 1
                self._bars.update(self._all, completed=self._ended)

        return report


def compared(package: str, entries: Sequence[Entry]) -> Text:
    """A package's line after a run: what it judged, and where that is not what is committed."""
    rows = [entry.run for entry in entries if entry.run]
    differing = ", ".join(entry.claim.id for entry in entries if entry.differs)
    both = [entry for entry in entries if entry.run and entry.committed]
    counts = Counter(row.verdict for row in rows)
    line = Text.assemble((f"{package:16}", "bold"), f"{len(rows):2} of {len(entries):2} claims: ")
    for verdict in ORDER:
        if counts[verdict]:
            line.append(f"{counts[verdict]} {verdict} ", VERDICT_STYLE[verdict])
    if both:
        line.append(f" not as committed: {differing}" if differing else " all as committed", "dim")
    return line


def write_launches(target: Console, package: str, launches: Sequence[Launch], folder: Path) -> None:
    """Write a job file for each of a paper's own runs, and say how else to start it."""
    if not launches:
        target.print(f"[dim]{package} has no run at the paper's scale; its README says why[/dim]")
    for launch in launches:
        path = folder / f"{launch.name}.sbatch"
        write_text(path, launch.sbatch)
        target.print(f"[bold]{package}: {launch.title}[/bold]  (needs: {launch.needs})")
        target.print(f"  sbatch {path}", soft_wrap=True)
        target.print(f"  {launch.torchrun}", soft_wrap=True)


def print_costs(target: Console, packages: Sequence[str], scale: Scale) -> None:
    """Say what a scale took when it was last timed."""
    target.print(f"[bold]what the {scale} scale took[/bold]")
    for package in packages:
        if cost := cost_of(committed_results(package), scale):
            target.print(f"  {package:16}{cost}", markup=False, soft_wrap=True)


def print_next(target: Console, page: Path, scale: Scale, elapsed_s: float) -> None:
    """Say where the report lies, and what to type next."""
    target.print(f"report ({elapsed_s:.0f} s): {page.resolve().as_uri()}", soft_wrap=True)
    again = (
        "next: the same with --scale laptop (it says first what it costs), or"
        if scale == "smoke"
        else "next:"
    )
    target.print(again)
    target.print(
        "      fourfold packages (in a checkout: scripts/env fourfold packages), which says how to use each "
        "on something of yours",
        soft_wrap=True,
    )
