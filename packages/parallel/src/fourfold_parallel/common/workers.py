"""Work on many items in as many processes as are worth starting."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """Processes for minutes of work, one thread each: at these sizes two threads are slower than two runs."""
    return min(2, torch.get_num_threads())


def each(
    work: Callable[[Item], Result], items: Sequence[Item], *, processes: int
) -> Iterator[Result]:
    """Results in the order of the items.

    The items are done in this process where they are no more than the processes, since to start one costs
    seconds. `work` and the items must pickle.
    """
    if processes == 1 or len(items) <= processes:
        yield from map(work, items)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(work, items)
