"""Compilers: what is on this machine, how each model is built, and what is built once and kept.

A candidate is one translation unit. It is compiled against a precompiled prelude and linked with objects
that were compiled before: the driver of its problem, and the runtime beneath it. All of that is kept in the
cache under a name made of its contents, of the flags and of the compiler's version.

There are two preludes. At the end of every unit GCC instantiates what the inline functions of the standard
headers refer to, streams and special functions above all, used or not: two thirds of the time of compiling an
answer. The short prelude leaves out the headers that do so. It serves answers that could not tell the
difference: that have no name which only the whole prelude's headers hold.
"""

import hashlib
import importlib.resources
import re
import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

from fourfold_hpc_coder.judge.openmp_calls import REGIONS, SYNCHRONISED
from fourfold_hpc_coder.judge.parallelism import without_comments
from fourfold_hpc_coder.sandbox.backends import Landlock, Sandbox
from fourfold_hpc_coder.sandbox.job import Job, JobResult, Limits, Mount
from fourfold_hpc_coder.sandbox.process import run
from fourfold_hpc_coder.vocabulary import Model
from fourfold_parallel.common.files import cache_folder, whole_folder

GIB = 1 << 30
COMPILING = Limits(
    wall_s=120, cpu_s=25, memory_bytes=3 * GIB // 2, processes=64, file_bytes=256 << 20
)
"""A compile bomb ends here; an honest answer takes half a second."""

KOKKOS_HEADERS = Path("/usr/include/trilinos")
"""Where Debian's libtrilinos-kokkos-dev puts Kokkos."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flavour:
    """How the programs of a model are compiled and linked."""

    compiler: str
    prelude: tuple[str, ...]
    """Flags of the answer, the prelude and what of ours lies beneath; equal ones have one prelude."""
    flags: tuple[str, ...]
    """What the answer is compiled under beside them; nothing here may make GCC refuse the prelude."""
    libraries: tuple[str, ...]
    runtime: tuple[str, ...]
    """Our sources beneath every driver of this flavour."""


_PLAIN = ("-std=c++17", "-O3")
# One prelude serves with and without OpenMP, with and without lines. GCC refuses one made under other
# macros, so OpenMP's two are defined after it; it lacks what OpenMP's pragmas need unless made with OpenMP;
# it may have lines where an answer has none. The last flag, of memory, saves a tenth of the time.
_MACROS = ("-U_OPENMP", "-U_REENTRANT")
_PRECOMPILED = ("-g1", "-fopenmp", *_MACROS, "--param", "ggc-min-heapsize=1000000")
_OPENMP = ("-fopenmp", *_MACROS, "-include", "/prelude/openmp.hpp")


def _gcc(
    *flags: str,
    prelude: tuple[str, ...] = _PLAIN,
    libraries: Sequence[str] = (),
    runtime: Sequence[str],
    wrapped: Sequence[str] = (),
) -> Flavour:
    return Flavour(
        compiler="g++",
        prelude=prelude,
        flags=flags,
        libraries=(*(f"-Wl,--wrap={name}" for name in wrapped), *libraries),
        runtime=tuple(runtime),
    )


ANSWERING_S = 30
"""How long a compiler gets to say which it is."""


@cache
def _said(*words: str) -> tuple[str, str]:
    """What a compiler says of itself, or why it says nothing."""
    try:
        shown = subprocess.run(  # noqa: S603 - fixed names
            words, capture_output=True, text=True, check=True, timeout=ANSWERING_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        return "", str(error)
    return shown.stdout, ""


@cache
def _mpi_flags() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Compile and link flags as the MPI's own wrapper states them, without the C++ bindings of MPI-2."""
    compiled, linked = (
        _said("mpicxx", f"--showme:{what}")[0].split() for what in ("compile", "link")
    )
    libraries = tuple(word for word in linked if word != "-lmpi_cxx")
    return ("-DOMPI_SKIP_MPICXX", *compiled, "-include", "mpi.h"), libraries


def flavour(model: Model) -> Flavour:
    """How programs of a model are built here; call `missing` first."""
    match model:
        case "serial":
            return _gcc(runtime=("alone.cc",))
        case "omp":
            return _gcc(*_OPENMP, runtime=("alone.cc", "threads.cc"), wrapped=REGIONS)
        case "mpi":
            flags, libraries = _mpi_flags()
            return _gcc(*flags, libraries=libraries, runtime=("ranks.cc",))
        case "mpi+omp":
            flags, libraries = _mpi_flags()
            return _gcc(
                *_OPENMP,
                *flags,
                libraries=libraries,
                runtime=("ranks.cc", "threads.cc"),
                wrapped=REGIONS,
            )
        case "kokkos":
            return _gcc(
                prelude=(*_PLAIN, "-DFOURFOLD_KOKKOS", f"-isystem{KOKKOS_HEADERS}"),
                libraries=("-ltrilinos_kokkoscore", "-ldl"),
                runtime=("alone.cc",),
            )
        case "cuda":
            return Flavour(compiler="nvcc", prelude=_PLAIN, flags=(), libraries=(), runtime=())
        case "hip":
            return Flavour(compiler="hipcc", prelude=_PLAIN, flags=(), libraries=(), runtime=())


def racing() -> Flavour:
    """Like OpenMP's, with every memory access of the answer reported to the checker in `race.cc`."""
    return _gcc(
        *_OPENMP,
        "-g1",
        "-O1",
        "-fsanitize=thread",
        # The one name that the flag defines; with it GCC would refuse the prelude.
        "-U__SANITIZE_THREAD__",
        libraries=("-no-pie",),
        runtime=("alone.cc", "race.cc"),
        wrapped=(*REGIONS, *SYNCHRONISED),
    )


def missing(model: Model) -> str:
    """What a model needs and this machine lacks, with the package's name; empty where nothing is missing.

    A compiler that is there and does not answer is missing too.
    """
    needs = {
        "serial": [("g++", "g++")],
        "omp": [("g++", "g++")],
        "mpi": [("g++", "g++"), ("mpicxx", "libopenmpi-dev"), ("mpirun", "openmpi-bin")],
        "mpi+omp": [("g++", "g++"), ("mpicxx", "libopenmpi-dev"), ("mpirun", "openmpi-bin")],
        "kokkos": [("g++", "g++")],
        "cuda": [("nvcc", "nvidia-cuda-toolkit")],
        "hip": [("hipcc", "hipcc")],
    }[model]
    for program, package in needs:
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian: {package})"
    if mute := _said(needs[0][0], "--version")[1]:
        return f"{needs[0][0]} is installed, and does not work: {mute}"
    if model in ("mpi", "mpi+omp") and (mute := _said("mpicxx", "--showme:link")[1]):
        return f"mpicxx is not Open MPI's (Debian: libopenmpi-dev), or does not work: {mute}"
    if model == "kokkos" and not (KOKKOS_HEADERS / "Kokkos_Core.hpp").exists():
        return "Kokkos is not installed (Debian: libtrilinos-kokkos-dev)"
    return ""


def barred(model: Model, sandbox: Sandbox) -> str:
    """Why answers in a model cannot be judged here: what is missing, or the sandbox; empty where they can."""
    if model in ("mpi", "mpi+omp") and isinstance(sandbox, Landlock):
        return (
            "MPI's launcher needs sockets, which the sandbox `landlock` cannot keep on this machine; "
            "install Debian's bubblewrap, or allow user namespaces"
        )
    return missing(model)


def runs_here(model: Model) -> bool:
    """Whether programs of a model can also be run: GPU kernels are compiled only."""
    return model not in ("cuda", "hip")


def identity(model: Model) -> str:
    """The compiler and its version, for cache keys and records."""
    compiler = flavour(model).compiler
    shown = _said(compiler, "--version")[0].strip()
    return shown.splitlines()[-1 if compiler == "nvcc" else 0]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildInputs:
    """What answers to a problem are compiled against and linked with, in the cache."""

    flavour: Flavour
    prelude: Path
    """Folder with the precompiled prelude."""
    objects: tuple[Path, ...]
    """The driver and the runtime beneath it, each in a folder of its own."""


def prepare(flavoured: Flavour, driver: str, text: str, sandbox: Sandbox) -> BuildInputs:
    """The precompiled prelude, the runtime and a problem's driver; from the cache where there.

    Args:
        flavoured: compiler and flags.
        driver: source of the problem's driver; empty for none.
        text: what is to be compiled against them.
        sandbox: ours are the sources, yet compilers are better kept apart.

    Raises:
        RuntimeError: where our own source does not compile, with the compiler's words.
    """
    # The prelude last: what lies beneath needs none, and another thread may be at it.
    beneath = objects(flavoured, driver, sandbox)
    whole = needs_whole(flavoured, text, sandbox)
    return BuildInputs(
        flavour=flavoured, prelude=prelude(flavoured, sandbox, whole=whole), objects=beneath
    )


def objects(flavoured: Flavour, driver: str, sandbox: Sandbox) -> tuple[Path, ...]:
    """The runtime and, where there is one, the driver; arguments and errors as of `prepare`."""
    sources = {name: _texts()[name] for name in flavoured.runtime}
    if driver:
        sources["driver.cc"] = driver
    return tuple(_object(flavoured, name, text, sandbox) for name, text in sources.items())


@cache
def _texts() -> dict[str, str]:
    folder = importlib.resources.files("fourfold_hpc_coder.judge") / "drivers"
    return {one.name: one.read_text(encoding="utf-8") for one in folder.iterdir() if one.is_file()}


def prelude(flavoured: Flavour, sandbox: Sandbox, *, whole: bool) -> Path:
    """The folder with a precompiled prelude; other arguments and errors as of `prepare`."""
    command, inputs = _of_prelude(flavoured, whole=whole)
    # Its text stays beside it: where GCC refuses what was precompiled, compiling is slow, not impossible.
    return _kept(flavoured.compiler, command, inputs, sandbox, beside=inputs)


def _of_prelude(flavoured: Flavour, *, whole: bool) -> tuple[tuple[str, ...], dict[str, str]]:
    """Its command and its sources."""
    command = (*flavoured.prelude, *_PRECOMPILED, "-x", "c++-header", "/in/prelude.hpp")
    return (*command, "-o", "/out/prelude.hpp.gch"), _prelude_texts(whole=whole)


def _prelude_texts(*, whole: bool) -> dict[str, str]:
    text = _texts()["prelude.hpp" if whole else "short.hpp"]
    return {"prelude.hpp": text, "openmp.hpp": _texts()["openmp.hpp"]}


def includes_more(flavoured: Flavour, text: str) -> bool:
    """Whether a text includes a header that the short prelude lacks, or its model has no short one."""
    if flavoured.prelude != _PLAIN:
        return True
    included = {one for one in _HEADER.findall(text) if "/" in one or not one.endswith(".h")}
    return not included <= set(_HEADER.findall(_texts()["short.hpp"]))


def needs_whole(flavoured: Flavour, text: str, sandbox: Sandbox) -> bool:
    """Whether a text might mean something else under the short prelude; the rest as of `prepare`."""
    if includes_more(flavoured, text):
        return True
    names = _NAME.findall(without_comments(text))
    return bool(names) and not _beyond(flavoured, sandbox).isdisjoint(names)


_HEADER = re.compile(r"#\s*include\s*<([\w/+.]+)>")
_NAME = re.compile(r"[A-Za-z_]\w+")
"""Of one letter no standard header names anything but members and parameters."""
_BEYOND: dict[Path, frozenset[str]] = {}
_BEYOND_GUARD = threading.Lock()


def _beyond(flavoured: Flavour, sandbox: Sandbox) -> frozenset[str]:
    """Names and macros in the headers of the whole prelude that are not in those of the short one."""
    with _BEYOND_GUARD:
        whole, short = (_names_file(flavoured, sandbox, whole=one) for one in (True, False))
        if whole not in _BEYOND:
            _BEYOND[whole] = _names(whole) - _names(short)
        return _BEYOND[whole]


def _names_file(flavoured: Flavour, sandbox: Sandbox, *, whole: bool) -> Path:
    words = ("-fopenmp", *_MACROS, "-E", "-dD", "-P", "-x", "c++", "/in/prelude.hpp")
    command = (*flavoured.prelude, *words, "-o", "/out/names")
    inputs = _prelude_texts(whole=whole)
    return _kept(flavoured.compiler, command, inputs, sandbox) / "names"


def _names(file: Path) -> frozenset[str]:
    text = file.read_text(encoding="utf-8", errors="replace")
    return frozenset(_NAME.findall(re.sub(r'"(?:\\.|[^"\\\n])*"\w*', " ", text)))


def _object(flavoured: Flavour, name: str, text: str, sandbox: Sandbox) -> Path:
    """A source of ours, compiled; what is not timed need not be fast, and -O3 takes thrice as long."""
    own = [*flavoured.prelude, "-O1"]
    own += ["-fopenmp"] if "regions.hpp" in text else []
    own += _mpi_flags()[0] if "mpi.h" in text else []
    headers = {key: value for key, value in _texts().items() if key.endswith(".hpp")}
    command = (*own, "-c", f"/in/{name}", "-o", "/out/object.o")
    inputs = {**headers, name: text}
    made = [
        _place(flavoured.compiler, *_of_prelude(flavoured, whole=one)) / "out"
        for one in (False, True)
    ]
    there = [one for one in made if one.exists()]
    if name != "driver.cc" or not there:
        return _kept(flavoured.compiler, command, inputs, sandbox)
    # No need to wait for the prelude; where it is there, it halves the time.
    return _kept(
        flavoured.compiler,
        command,
        inputs,
        sandbox,
        sooner=("-g0", *_INCLUDED),
        mounts=(Mount(source=there[0], target="/prelude"),),
    )


_INCLUDED = ("-include", "/prelude/prelude.hpp")
_LOCKS: dict[str, threading.Lock] = {}
_LOCKS_GUARD = threading.Lock()
"""Two jobs that need one thing build it once."""


def _kept(
    compiler: str,
    command: tuple[str, ...],
    inputs: dict[str, str],
    sandbox: Sandbox,
    *,
    beside: Mapping[str, str] = MappingProxyType({}),
    sooner: tuple[str, ...] = (),
    mounts: tuple[Mount, ...] = (),
) -> Path:
    """The folder with what a command makes of our sources; made on first use.

    Args:
        compiler: the command's first word.
        command: the others.
        inputs: our sources, by name.
        sandbox: where the compiler runs.
        beside: texts that are put next to what is made.
        sooner: words that change how soon it is made, not what.
        mounts: what those words name.
    """
    folder = _place(compiler, command, inputs)
    with _LOCKS_GUARD:
        lock = _LOCKS.setdefault(folder.name, threading.Lock())
    with lock:
        if not folder.exists():
            with whole_folder(folder) as partial:
                source, made = partial / "in", partial / "out"
                source.mkdir()
                made.mkdir()
                for place, texts in ((source, inputs), (made, beside)):
                    for name, text in texts.items():
                        (place / name).write_text(text, encoding="utf-8")
                job = Job(
                    command=(compiler, *sooner, *command),
                    mounts=(
                        Mount(source=source, target="/in"),
                        Mount(source=made, target="/out", writable=True),
                        *mounts,
                    ),
                    limits=COMPILING,
                )
                outcome = run(sandbox, job)
                if outcome.code:
                    raise RuntimeError(
                        f"{compiler} {' '.join(command)} failed ({outcome.limit}): {outcome.stderr}"
                    )
    return folder / "out"


def _place(compiler: str, command: tuple[str, ...], inputs: dict[str, str]) -> Path:
    words = [_version(), compiler, *command, *inputs, *inputs.values()]
    key = hashlib.sha256("\0".join(words).encode()).hexdigest()[:24]
    return cache_folder() / "hpc_coder" / "built" / key


@cache
def _version() -> str:
    return _said("g++", "-dumpfullversion", "-dumpmachine")[0]


def compile_candidate(
    sandbox: Sandbox, kept: BuildInputs, source: Path, program: Path
) -> JobResult:
    """Compile and link an answer.

    Args:
        sandbox: where the compiler runs: it reads the answer, which may include files or loop forever.
        kept: from `prepare`.
        source: folder with `answer.cpp`.
        program: folder that receives `answer`.
    """
    flavoured = kept.flavour
    is_watched = "-fsanitize=thread" in flavoured.flags
    objects = [f"/object{number}/object.o" for number, _ in enumerate(kept.objects)]
    linking = (*objects, *_linking(flavoured))
    command = (
        flavoured.compiler,
        *flavoured.prelude,
        "-g0",
        *_INCLUDED,
        *flavoured.flags,
        "/in/answer.cpp",
        *(("-c", "-o", "/out/answer.o") if is_watched else linking),
    )
    mounts = (
        Mount(source=kept.prelude, target="/prelude"),
        *(Mount(source=one, target=f"/object{n}") for n, one in enumerate(kept.objects)),
        Mount(source=source, target="/in"),
        Mount(source=program, target="/out", writable=True),
    )
    outcome = run(sandbox, Job(command=command, mounts=mounts, limits=COMPILING))
    if is_watched and not outcome.code:
        # Without the sanitizer's own library: `race.cc` defines what instrumented code calls.
        link = (flavoured.compiler, "-fopenmp", "/out/answer.o", *linking)
        outcome = run(sandbox, Job(command=link, mounts=mounts, limits=COMPILING))
    if not outcome.code:
        (program / "answer").chmod(0o755)  # a job behind seccomp has no say in modes
    return outcome


def _linking(flavoured: Flavour) -> list[str]:
    fast = ["-fuse-ld=mold"] if shutil.which("mold") else []
    return [*fast, *flavoured.libraries, "-o", "/out/answer"]


def source_line(sandbox: Sandbox, program: Path, address: str) -> int:
    """1-based line of `answer.cpp` that holds an instruction's address; 0 where that is unknown."""
    job = Job(
        command=("addr2line", "-e", "/job/answer", hex(int(address, 16) - 1)),
        mounts=(Mount(source=program, target="/job"),),
        limits=COMPILING,
    )
    found = re.search(r"answer\.cpp:(\d+)", run(sandbox, job).stdout)
    return int(found.group(1)) if found else 0


def compile_kernel(sandbox: Sandbox, model: Model, source: Path, program: Path) -> JobResult:
    """Compile a GPU kernel to an object: all that can be checked without a GPU."""
    flavoured = flavour(model)
    command = (flavoured.compiler, *flavoured.prelude, "-c", "/in/answer.cu", "-o", "/out/answer.o")
    mounts = (
        Mount(source=source, target="/in"),
        Mount(source=program, target="/out", writable=True),
    )
    return run(sandbox, Job(command=command, mounts=mounts, limits=COMPILING))
