"""The view of long work in a terminal: log lines, progress bars, tables."""

import logging
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
from rich.table import Table
from rich.text import Text

from fourfold_parallel.common.files import write_text
from fourfold_parallel.common.progress import Progress
from fourfold_parallel.launch import adopt_slurm
from fourfold_parallel.reproduce.claims import LedgerRow
from fourfold_parallel.reproduce.launches import Launch

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
    """Take the ranks that srun started, send log lines to the console, keep libraries' bars away."""
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
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


class Bars:
    """One progress bar per piece of work, with time left; plain lines where nobody watches a terminal."""

    def __init__(self, target: Console, stages: int) -> None:
        self._console = target
        self._stages = stages
        self._begun = 0
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
            self._bars.update(bar, completed=done, total=total, note=note)

        return report


def ledger_table(rows: Sequence[LedgerRow]) -> Table:
    """The ledger as a terminal shows it."""
    table = Table(show_lines=False, expand=False)
    for column in ("claim", "paper", "ours", "verdict"):
        table.add_column(column)
    for row in rows:
        verdict = Text(row.verdict, style=VERDICT_STYLE[row.verdict])
        table.add_row(
            f"{row.id} {row.statement}", row.paper_value, row.ours or row.because, verdict
        )
    return table


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
