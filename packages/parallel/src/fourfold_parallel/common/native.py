"""C++ beside Python: one source file and its headers, compiled for this processor when first needed.

The shared library is kept in fourfold's cache under a name made of its source, the flags, the compiler and
the processor, and called through ctypes. Whoever loads one has a way in torch's operations too: without a
compiler there is no library, which is said once in the log.
"""

import ctypes
import hashlib
import importlib.resources
import itertools
import logging
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path

import torch

from fourfold_parallel.common.files import cache_folder, whole_file

FLAGS = (
    "-std=c++20",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
)
"""Not `-ffast-math`: a library linked with it switches denormals off for the whole process."""
COMPILERS = ("c++", "g++", "clang++")

log = logging.getLogger(__name__)


@cache
def load(package: str, source: str) -> ctypes.CDLL | None:
    """The compiled source file of a package, or None where nothing here can compile it."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        log.info(
            "none of %s is here; torch's operations stand for %s", ", ".join(COMPILERS), source
        )
        return None
    try:
        return ctypes.CDLL(str(build(package, source, Path(compiler))))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        log.warning("%s cannot compile %s, using torch's operations: %s", compiler, source, said)
        return None


def build(package: str, source: str, compiler: Path) -> Path:
    """The shared library for this processor, from the cache or compiled now (seconds).

    `FOURFOLD_CXXFLAGS` adds flags behind ours; `scripts/sanitize.py` gives it a sanitizer's.

    Raises:
        OSError: The cache cannot be written.
        subprocess.SubprocessError: where the compiler fails.
    """
    text = whole_source(package, source)
    version = subprocess.run(  # noqa: S603 - a compiler from PATH
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    flags = [*FLAGS, *os.environ.get("FOURFOLD_CXXFLAGS", "").split()]
    named = "\0".join([text, *flags, str(compiler), version, processor()])
    folder = cache_folder() / "native" / package
    built = folder / f"{hashlib.sha256(named.encode()).hexdigest()}.so"
    if not built.exists():
        with whole_file(built) as partial:
            subprocess.run(  # noqa: S603 - as above
                [compiler, *flags, "-x", "c++", "-", "-o", partial],
                input=text, capture_output=True, text=True, check=True, timeout=300,
            )  # fmt: skip
    return built


def whole_source(package: str, source: str) -> str:
    """A source file with the package's own headers in the place of the lines that include them."""
    text = importlib.resources.files(package).joinpath(source).read_text("utf-8")
    return re.sub(
        r'^#include "(.+)"$', lambda line: whole_source(package, line[1]), text, flags=re.MULTILINE
    )


def processor() -> str:
    """The properties that `-march=native` looks at; homes are shared by machines that differ in it."""
    described = Path("/proc/cpuinfo")
    if not described.exists():
        return platform.processor() + platform.machine()
    lines = described.read_text("utf-8").splitlines()
    told = ("model name", "flags", "Features", "CPU part")
    return "\n".join(
        [platform.machine(), *sorted({line for line in lines if line.startswith(told)})]
    )


def share(units: int, work: Callable[[int, int], None]) -> None:
    """`work(first, last)` on every part of `range(units)`, one part for each of torch's threads.

    A call of a library releases Python's lock, so the parts run at the same time. None runs any more when
    this returns or raises: what a part computes with is freed by whoever called.
    """
    threads = max(1, min(torch.get_num_threads(), units))
    bounds = [units * i // threads for i in range(threads + 1)]
    others: list[Future[None]] = []
    try:
        others.extend(
            _threads(threads).submit(work, *part) for part in itertools.pairwise(bounds[1:])
        )
        work(*bounds[:2])
    finally:
        _await(others)
    for other in others:
        other.result()


def _await(parts: list[Future[None]]) -> None:
    """Return when all have ended; so it does before it passes on what interrupts the wait."""
    try:
        wait(parts)
    except BaseException:
        _await(parts)
        raise


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="native")


# The threads of a pool stay behind where a process forks; what is handed to it there would wait for ever.
os.register_at_fork(after_in_child=_threads.cache_clear)
