"""C++ beside Python: one source file and its headers, compiled for this processor when first needed.

The shared library is kept in fourfold's cache under a name made of its source, the flags, the compiler and
the processor, and called through ctypes. Whoever loads one has a way in torch's operations too: without a
compiler there is no library, which is said once in the log, with the way to get one.

What kernels share lies beside this file: `vectors.h`, which they include as "fourfold/vectors.h".
"""

import ctypes
import hashlib
import importlib.resources
import importlib.util
import itertools
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fourfold_parallel.common.files import cache_folder, whole_file

FLAGS = (
    "-std=c++20",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
)
"""Not `-ffast-math`: a library linked with it switches denormals off for the whole process."""
COMPILERS = ("c++", "g++", "clang++")
WHEEL = "ziglang"
"""The wheel that brings a compiler (Clang, with its own C++ library) where the machine has none."""
NATIVE = "native"
PATIENCE_S = 900
"""The wheel's compiler makes its C++ library first, once: half a minute on two idle cores."""
SHARED = "fourfold/"
"""Before the name of a header that lies beside this file."""

log = logging.getLogger(__name__)


def instruction_set() -> str:
    """The target of compilation: this processor, or the one of GCC's names in FOURFOLD_INSTRUCTIONS.

    A benchmark measures `x86-64-v3` (AVX2) beside the native one; torch is held to the same by
    ATEN_CPU_CAPABILITY=avx2.
    """
    return os.environ.get("FOURFOLD_INSTRUCTIONS") or NATIVE


def compiler() -> tuple[str, ...] | None:
    """The command of the first compiler here: on PATH, else the wheel's; None where there is none."""
    on_path = next(filter(None, map(shutil.which, COMPILERS)), None)
    if on_path is not None:
        return (on_path,)
    if importlib.util.find_spec(WHEEL) is not None:
        return (sys.executable, "-m", WHEEL, "c++")
    return None


@cache
def load(package: str, source: str) -> ctypes.CDLL | None:
    """The compiled source file of a package, or None where nothing here can compile it."""
    command = compiler()
    if command is None:
        log.warning(
            "none of %s is here, so torch's operations stand for %s of %s, which are several times "
            "slower; the faster form needs a C++ compiler: Debian's g++, or pip install %s",
            ", ".join(COMPILERS), source, package, WHEEL,
        )  # fmt: skip
        return None
    try:
        library = ctypes.CDLL(str(build(package, source, command)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        log.warning(
            "%s cannot compile %s, using torch's operations: %s", " ".join(command), source, said
        )
        return None
    log.info("%s of %s runs compiled for %s", source, package, instruction_set())
    return library


def build(package: str, source: str, command: Sequence[str]) -> Path:
    """The shared library for `instruction_set()`, from the cache or compiled now (seconds).

    `FOURFOLD_CXXFLAGS` adds flags behind ours; `scripts/sanitize.py` gives it a sanitizer's.

    Args:
        package: whose source file.
        source: its name in the package.
        command: the compiler's, as `compiler` gives it.

    Raises:
        OSError: The cache cannot be written.
        subprocess.SubprocessError: where the compiler fails.
    """
    text = whole_source(package, source)
    version = subprocess.run(  # noqa: S603 - a compiler from PATH, or of an installed wheel
        [*command, "--version"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    target = instruction_set()
    if WHEEL in command:
        target = target.replace("-", "_")  # Zig's spelling of the same names
    more = os.environ.get("FOURFOLD_CXXFLAGS", "").split()
    flags = [*FLAGS, f"-march={target}", *more]
    # A library for a named instruction set is the same on every processor.
    made_for = processor() if target == NATIVE else platform.machine()
    named = "\0".join([text, *flags, *command, version, made_for])
    folder = cache_folder() / "native" / package
    built = folder / f"{hashlib.sha256(named.encode()).hexdigest()}.so"
    if not built.exists():
        with whole_file(built) as partial:
            subprocess.run(  # noqa: S603 - as above
                [*command, *flags, "-x", "c++", "-", "-o", partial],
                input=text, capture_output=True, text=True, check=True, timeout=PATIENCE_S,
            )  # fmt: skip
    return built


def whole_source(package: str, source: str) -> str:
    """A source file with headers in the place of the lines that include them: the package's, and ours."""
    text = importlib.resources.files(package).joinpath(source).read_text("utf-8")

    def included(line: re.Match[str]) -> str:
        name = line[1].removeprefix(SHARED)
        return whole_source(package if name == line[1] else "fourfold_parallel.common", name)

    return re.sub(r'^#include "(.+)"$', included, text, flags=re.MULTILINE)


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


Work = Callable[[int, int], None]
"""What is done with the units from the first number to the last, which it leaves out."""
_OPENMP = re.compile(r"/lib(gomp|iomp5|omp)[^/]*$")
_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def share(units: int, work: Work) -> None:
    """`work(first, last)` on every part of `range(units)`, one part for each of torch's threads.

    They are torch's own threads where torch has OpenMP's: those wait for their next work by spinning, and
    others beside them would wait for a core. A call of a library releases Python's lock, so the parts run at
    the same time. None runs any more when this returns or raises: what a part computes with is freed by
    whoever called.
    """
    threads = torch.get_num_threads()
    if min(threads, units) <= 1:
        work(0, units)
        return
    team = _openmp()
    if team is None:
        _share_among(_threads(threads), min(threads, units), units, work)
        return
    errors: list[BaseException] = []

    def body(_: object) -> None:
        # A team may be smaller than what was asked for, as inside another one.
        part, parts = team.omp_get_thread_num(), team.omp_get_num_threads()
        first, last = units * part // parts, units * (part + 1) // parts
        try:
            if first < last:
                work(first, last)
        except BaseException as error:  # noqa: BLE001 - raised below, by the thread that called
            errors.append(error)

    team.GOMP_parallel(_Body(body), None, ctypes.c_uint(threads), ctypes.c_uint(0))
    if errors:
        raise errors[0]


class _Team(ctypes.Structure):
    _fields_ = (
        ("work", ctypes.c_void_p),
        ("call", ctypes.c_void_p),
        ("units", ctypes.c_int64),
        ("thread", ctypes.c_void_p),
        ("threads", ctypes.c_void_p),
    )


def share_call(
    library: ctypes.CDLL, function: str, call: ctypes.Structure, units: int, *, threads: int
) -> None:
    """`share` for a function of a library that includes "fourfold/team.h", without Python in its threads.

    A thread that calls from Python waits for Python's lock, which costs a tenth of a millisecond.

    Args:
        library: whose function.
        function: its name; it takes a pointer, the first unit and the one behind the last.
        call: what the pointer leads to.
        units: to share out.
        threads: one computes here alone; otherwise torch's.
    """
    work = getattr(library, function)
    team = _openmp() if min(threads, units) > 1 else None
    if team is not None:
        shared = _Team(
            _address(work), ctypes.addressof(call), units,
            _address(team.omp_get_thread_num), _address(team.omp_get_num_threads),
        )  # fmt: skip
        team.GOMP_parallel(
            library.fourfold_part, ctypes.byref(shared), ctypes.c_uint(threads), ctypes.c_uint(0)
        )
        return

    def some(first: int, last: int) -> None:
        work(ctypes.byref(call), ctypes.c_int64(first), ctypes.c_int64(last))

    if threads == 1:
        some(0, units)
    else:
        share(units, some)


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value


@cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP library that torch computes with, or None where there is none, or in a forked process."""
    is_own = (
        os.environ.get("FOURFOLD_THREADS") == "own"
    )  # a sanitizer does not see OpenMP's barriers
    if is_own or _is_forked or not Path("/proc/self/maps").exists():
        return None
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text("utf-8").splitlines()}
    # Of several, torch's lies in its own folder.
    runtimes = sorted(filter(_OPENMP.search, mapped), key=lambda path: "/torch/" not in path)
    try:
        library = ctypes.CDLL(runtimes[0])
        return library if hasattr(library, "GOMP_parallel") else None
    except (OSError, IndexError):
        return None


def _share_among(pool: ThreadPoolExecutor, threads: int, units: int, work: Work) -> None:
    bounds = [units * i // threads for i in range(threads + 1)]
    others: list[Future[None]] = []
    try:
        others.extend(pool.submit(work, *part) for part in itertools.pairwise(bounds[1:]))
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


def _after_fork() -> None:
    """The threads of a pool stay behind where a process forks; what is handed to them would wait for ever."""
    global _is_forked  # noqa: PLW0603 - a process is forked or not
    _is_forked = True
    _threads.cache_clear()
    _openmp.cache_clear()


_is_forked = False
os.register_at_fork(after_in_child=_after_fork)
