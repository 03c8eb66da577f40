"""Experiments side by side: one process a package, with its share of the cores.

Small models gain little from a second thread and lose much where two of them wait for one another, so
a machine of few cores reproduces two papers at a time faster than two papers in turn.
"""

import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import Queue
from pathlib import Path

import torch

from fourfold_parallel.common.progress import Progress
from fourfold_parallel.reproduce.claims import LedgerRow
from fourfold_parallel.reproduce.cli import console, start
from fourfold_parallel.reproduce.experiment import Stage, installed, perform
from fourfold_parallel.reproduce.scale import Scale

Message = tuple[str, int, int, str]
"""Which stage; done; of how many; a note."""
EVERY_S = 0.2
"""Seconds between two messages of one stage, and between two looks at all of them."""


def perform_all(
    names: Sequence[str],
    scale: Scale,
    folder: Path,
    *,
    resume: bool,
    jobs: int,
    bar: Callable[[str], Progress],
) -> Iterator[tuple[str, Sequence[LedgerRow] | ValueError]]:
    """Perform the experiments of packages, and give what becomes of each as it ends.

    One that is refused (`ValueError`) does not stop the others.

    Args:
        names: packages with an experiment that has stages at this scale.
        scale: how large.
        folder: receives a folder for each package.
        resume: as in `perform`.
        jobs: packages at a time.
        bar: gives the progress bar of a stage by its name.

    Raises:
        ValueError: for fewer than one job, or a worker that was killed.
    """
    if jobs < 1:
        raise ValueError(f"--jobs {jobs} works on nothing; use 1 or more")
    workers = max(1, min(jobs, len(names)))
    threads = max(1, (os.cpu_count() or 1) // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # for what a worker starts in its turn
    context = multiprocessing.get_context("spawn")
    messages: Queue[Message] = context.Queue()
    bars: dict[str, Progress] = {}
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin, initargs=(messages, threads)
    ) as pool:
        futures: dict[Future[tuple[LedgerRow, ...]], str] = {
            pool.submit(_perform, name, scale, folder / name, resume): name for name in names
        }
        waiting = set(futures)
        while waiting:
            ended, waiting = wait(waiting, timeout=EVERY_S, return_when=FIRST_COMPLETED)
            _show(messages, bars, bar)
            for future in ended:
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise ValueError(
                        f"{futures[future]}: its process was killed, perhaps for want of memory; "
                        "--resume --jobs 1 goes on with one package at a time"
                    )
                if error is not None and not isinstance(error, ValueError):
                    raise error
                yield futures[future], error or future.result()


def _show(
    messages: "Queue[Message]", bars: dict[str, Progress], bar: Callable[[str], Progress]
) -> None:
    """Draw what the workers have said since the last look."""
    while True:
        try:
            stage, done, total, note = messages.get_nowait()
        except queue.Empty:
            return
        if stage not in bars:
            bars[stage] = bar(stage)
        bars[stage](done, total, note)


_messages: "Queue[Message]"
"""Of a worker: where it says how far it has come."""


def _begin(messages: "Queue[Message]", threads: int) -> None:
    """A worker starts."""
    global _messages  # noqa: PLW0603 - a pool's initializer can leave its arguments nowhere else
    _messages = messages
    torch.set_num_threads(threads)
    start(console())
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Nobody is left to tell: a worker whose parent was killed does not go on alone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _perform(name: str, scale: Scale, folder: Path, resume: bool) -> tuple[LedgerRow, ...]:
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

    return perform(installed()[name], scale, folder, resume=resume, progress=progress).rows
