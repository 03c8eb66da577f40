"""Experiments side by side: one process a package, with its share of the cores.

Small models gain little from a second thread and lose much where two of them wait for one another, so
a machine of few cores reproduces two papers at a time faster than two papers in turn.
"""

import logging
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path

import torch
from rich.console import Console

from fourfold_parallel.common.progress import Progress
from fourfold_parallel.common.sinks import OpenSink
from fourfold_parallel.reproduce.claims import LedgerRow
from fourfold_parallel.reproduce.experiment import Stage, experiment_of, perform
from fourfold_parallel.reproduce.scale import Scale
from fourfold_parallel.reproduce.terminal import Bars, console, start

Message = tuple[str, int, int, str]
"""Which stage; done; of how many; a note."""
EVERY_S = 0.2
"""Seconds between two messages of one stage, and between two looks at all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """The outcome of one package: its ledger's rows, or why there are none."""

    rows: tuple[LedgerRow, ...] = ()
    error: str = ""


def perform_all(
    names: Sequence[str],
    scale: Scale,
    folder: Path,
    *,
    resume: bool,
    jobs: int,
    target: Console,
    sinks: Sequence[OpenSink] = (),
) -> dict[str, Judged]:
    """Perform the experiments of packages. One that is refused (`ValueError`) does not stop the others.

    Args:
        names: packages with an experiment that has stages at this scale.
        scale: how large.
        folder: receives a folder for each package.
        resume: as in `perform`.
        jobs: packages at a time.
        target: shows the progress bars.
        sinks: get every event of the records.

    Raises:
        ValueError: for fewer than one job, or a worker that was killed.
    """
    if jobs < 1:
        raise ValueError(f"--jobs {jobs} works on nothing; use 1 or more")
    workers = max(1, min(jobs, len(names)))
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # for what a worker starts in its turn
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars; a worker's are drawn here
    context = multiprocessing.get_context("spawn")
    messages: Queue[Message] = context.Queue()
    stages = sum(len(experiment_of(name).stages(scale)) for name in names)
    bars, drawn = Bars(target, stages), dict[str, Progress]()
    outcomes: dict[str, Judged] = {}
    with (
        bars.running(),
        ProcessPoolExecutor(
            workers, mp_context=context, initializer=_begin, initargs=(messages, threads)
        ) as pool,
    ):
        futures: dict[Future[tuple[LedgerRow, ...]], str] = {
            pool.submit(_perform, name, scale, folder / name, resume, sinks): name for name in names
        }
        waiting = set(futures)
        while waiting:
            ended, waiting = wait(waiting, timeout=EVERY_S, return_when=FIRST_COMPLETED)
            _show(messages, drawn, bars)
            for future in ended:
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise ValueError(
                        f"{futures[future]}: its process was killed, perhaps for want of memory; "
                        "--resume --jobs 1 goes on with one package at a time"
                    )
                if error is None:
                    outcomes[futures[future]] = Judged(rows=future.result())
                elif isinstance(error, ValueError):
                    outcomes[futures[future]] = Judged(error=str(error))
                else:
                    raise error
    return outcomes


def _show(messages: "Queue[Message]", drawn: dict[str, Progress], bars: Bars) -> None:
    """Draw what the workers have said since the last look."""
    while True:
        try:
            stage, done, total, note = messages.get_nowait()
        except queue.Empty:
            return
        if stage not in drawn:
            drawn[stage] = bars.named(stage)
        drawn[stage](done, total, note)


_messages: "Queue[Message]"
"""Of a worker: where it says how far it has come."""


def _begin(messages: "Queue[Message]", threads: int) -> None:
    """A worker starts."""
    global _messages  # noqa: PLW0603 - a pool's initializer can leave its arguments nowhere else
    _messages = messages
    torch.set_num_threads(threads)
    start(console())
    logging.getLogger("fourfold_parallel").setLevel(logging.WARNING)  # the bars say where it is
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Nobody is left to tell: a worker whose parent was killed does not go on alone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _perform(
    name: str, scale: Scale, folder: Path, resume: bool, sinks: Sequence[OpenSink]
) -> tuple[LedgerRow, ...]:
    """A worker's task."""

    def progress(stage: Stage) -> Progress:
        title = f"{name} {stage.name}"
        last_s = time.monotonic()
        _messages.put((title, 0, 1, ""))

        def report(done: int, total: int, note: str) -> None:
            nonlocal last_s
            now_s = time.monotonic()
            if done == total or now_s - last_s >= EVERY_S:
                last_s = now_s
                _messages.put((title, done, total, note))

        return report

    experiment = experiment_of(name)
    return perform(experiment, scale, folder, resume=resume, progress=progress, sinks=sinks).rows
