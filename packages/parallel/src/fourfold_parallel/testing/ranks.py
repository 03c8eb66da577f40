"""Run a law on n ranks: processes of this machine that talk through gloo.

A law is a function that every rank calls with the same arguments and that raises where the law
does not hold. The processes of a world size are started once and kept, with one process group,
for the laws that follow; each runs on one thread.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import importlib.util
import inspect
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from fourfold_parallel.grid.collectives import refuse_under_way

COLLECTIVE_TIMEOUT_S = 60
"""A collective that takes longer was not called by every rank."""
LAW_TIMEOUT_S = 240

LAWS_A_LIFE = 30
"""Laws after which ranks start anew: each mesh leaves communicators, whose threads cost time."""

_PRELOADED = ["fourfold_parallel.testing.preload"]
"""What the server imports once, so that a rank starts in the time of a fork."""


class LawBrokenError(AssertionError):
    """A law does not hold on some rank; the message is that rank's traceback."""


def run_on_ranks(ranks: int, law: Callable[..., Any], **arguments: Any) -> list[Any]:
    """Call `law(**arguments)` on `ranks` ranks at once; gives what each returned, in their order.

    Args:
        ranks: Number of processes.
        law: A function at the top of a module.
        arguments: What it is called with; they are pickled.

    Raises:
        LawBrokenError: The law raised on some rank, or did not end.
    """
    return _workplace(ranks).run(law, arguments)


def close_ranks(ranks: int) -> None:
    """End the processes of a world size; the next law on it starts new ones."""
    _workplace(ranks).close()


class _Workplace:
    """The processes of one world size."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._processes: list[ForkServerProcess] = []
        self._pipes: list[Connection] = []
        self._laws = 0
        atexit.register(self.close)

    def run(self, law: Callable[..., Any], arguments: dict[str, Any]) -> list[Any]:
        if self._laws >= LAWS_A_LIFE:
            self.close()
        if not self._processes:
            self._open()
        self._laws += 1
        source = inspect.getsourcefile(law)
        assert source is not None
        for pipe in self._pipes:
            pipe.send((source, law.__module__, law.__name__, arguments))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        open_pipes = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        while open_pipes:
            ready = wait(list(open_pipes), timeout=5 if failures else LAW_TIMEOUT_S)
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = open_pipes.pop(pipe)
                try:
                    has_held, value = pipe.recv()
                except EOFError:
                    has_held, value = False, "the process ended"
                (results if has_held else failures)[rank] = value
        if failures or open_pipes:
            self.close()
        for rank, failure in sorted(failures.items(), key=lambda item: "gloo" in item[1]):
            others = f" (ranks that failed: {sorted(failures)})"
            raise LawBrokenError(f"rank {rank} of {self._ranks}{others}:\n{failure}")
        if open_pipes:
            silent = sorted(open_pipes.values())
            raise LawBrokenError(f"{law.__name__}: ranks {silent} did not end in {LAW_TIMEOUT_S} s")
        return [results[rank] for rank in range(self._ranks)]

    def close(self) -> None:
        """End the processes; the next law starts new ones."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes, self._laws = [], [], 0

    def _open(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(self._ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self._ranks, port, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            assert isinstance(ours, Connection)
            self._pipes.append(ours)


@lru_cache
def _workplace(ranks: int) -> _Workplace:
    return _Workplace(ranks)


def _serve(rank: int, ranks: int, port: int, pipe: Connection) -> None:
    """The life of a rank: join the group, then run laws until the other end closes."""
    torch.set_num_threads(1)
    # What a launcher leaves: accelerate asks the environment, not the process group, whether there are ranks.
    number, size = str(rank), str(ranks)
    os.environ.update(
        RANK=number, LOCAL_RANK=number, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size,
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            source, module, name, arguments = pipe.recv()
            try:
                result = (True, getattr(_module(source, module), name)(**arguments))
                refuse_under_way(when=f"after {name}")  # the next law would be blamed
            except Exception:  # noqa: BLE001 - whatever a law raises is its result
                result = (False, traceback.format_exc())
            pipe.send(result)


@lru_cache
def _module(source: str, name: str) -> ModuleType:
    """The module of a law: an installed one by its name, a test's file whatever its runner called it."""
    path = Path(source)
    if name.startswith("fourfold_"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(f"laws_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
