"""Compilers: what is on this machine, how each model is built, and what is built once and kept.

A candidate is one translation unit. It is compiled against a precompiled prelude and linked with objects
that were compiled before: the driver of its problem, and the runtime beneath it. All of that is kept in the
cache under a name made of its contents, of the flags and of the compiler's version.
"""

import hashlib
import importlib.resources
import re
import shutil
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fourfold_hpc_coder.evaluation import Model
from fourfold_hpc_coder.sandbox import Job, Limits, Mount, Outcome, Sandbox, run
from fourfold_parallel.run.files import cache_folder, whole_folder

GIB = 1 << 30
COMPILING = Limits(
    wall_s=120, cpu_s=25, memory_bytes=3 * GIB // 2, processes=64, file_bytes=256 << 20
)
"""A compile bomb ends here; an honest answer takes half a second."""

REGIONS = (
    "GOMP_parallel",
    "GOMP_parallel_sections",
    "GOMP_parallel_loop_static",
    "GOMP_parallel_loop_dynamic",
    "GOMP_parallel_loop_guided",
    "GOMP_parallel_loop_nonmonotonic_dynamic",
    "GOMP_parallel_loop_nonmonotonic_guided",
    "GOMP_parallel_loop_runtime",
    "GOMP_parallel_loop_nonmonotonic_runtime",
    "GOMP_parallel_loop_maybe_nonmonotonic_runtime",
    "GOMP_parallel_reductions",
)
"""GCC's calls into a parallel region; the linker sends them through `threads.cc`."""

SYNCHRONISED = (
    "GOMP_barrier",
    "GOMP_critical_start",
    "GOMP_critical_end",
    "GOMP_critical_name_start",
    "GOMP_critical_name_end",
    "GOMP_atomic_start",
    "GOMP_atomic_end",
    "GOMP_ordered_start",
    "GOMP_ordered_end",
    "GOMP_loop_end",
    "GOMP_sections_end",
    "GOMP_single_start",
    "GOMP_task",
    "GOMP_taskloop",
    "omp_set_lock",
    "omp_unset_lock",
)
"""What orders accesses; sent through `race.cc` when a program is checked for races."""

KOKKOS_HEADERS = Path("/usr/include/trilinos")
"""Where Debian's libtrilinos-kokkos-dev puts Kokkos."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flavour:
    """How the programs of a model are compiled and linked."""

    compiler: str
    flags: tuple[str, ...]
    libraries: tuple[str, ...]
    runtime: tuple[str, ...]
    """Our sources beneath every driver of this flavour."""


def _gcc(
    *flags: str, libraries: Sequence[str] = (), runtime: Sequence[str], wrapped: Sequence[str] = ()
) -> Flavour:
    return Flavour(
        compiler="g++",
        flags=("-std=c++17", *flags),
        libraries=(*(f"-Wl,--wrap={name}" for name in wrapped), *libraries),
        runtime=tuple(runtime),
    )


_OPENMP = ("-fopenmp", "-DFOURFOLD_OPENMP")


def _mpi_flags() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Compile and link flags as the MPI's own wrapper states them, without the C++ bindings of MPI-2."""

    def show(what: str) -> list[str]:
        words = ["mpicxx", f"--showme:{what}"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()  # noqa: S603

    linked = [word for word in show("link") if word != "-lmpi_cxx"]
    return ("-DOMPI_SKIP_MPICXX", "-DFOURFOLD_MPI", *show("compile")), tuple(linked)


def flavour(model: Model) -> Flavour:
    """How programs of a model are built here; call `missing` first."""
    match model:
        case "serial":
            return _gcc("-O3", runtime=("alone.cc",))
        case "omp":
            return _gcc("-O3", *_OPENMP, runtime=("alone.cc", "threads.cc"), wrapped=REGIONS)
        case "mpi":
            flags, libraries = _mpi_flags()
            return _gcc("-O3", *flags, libraries=libraries, runtime=("ranks.cc",))
        case "mpi+omp":
            flags, libraries = _mpi_flags()
            return _gcc(
                "-O3",
                *_OPENMP,
                *flags,
                libraries=libraries,
                runtime=("ranks.cc", "threads.cc"),
                wrapped=REGIONS,
            )
        case "kokkos":
            return _gcc(
                "-O3",
                "-DFOURFOLD_KOKKOS",
                f"-isystem{KOKKOS_HEADERS}",
                libraries=("-ltrilinos_kokkoscore", "-ldl"),
                runtime=("alone.cc",),
            )
        case "cuda":
            return Flavour(compiler="nvcc", flags=("-std=c++17", "-O3"), libraries=(), runtime=())
        case "hip":
            return Flavour(compiler="hipcc", flags=("-std=c++17", "-O3"), libraries=(), runtime=())


def racing() -> Flavour:
    """Like OpenMP's, with every memory access reported to the checker in `race.cc`."""
    return _gcc(
        "-O1",
        "-g",
        "-fno-pie",
        *_OPENMP,
        "-fsanitize=thread",
        libraries=("-no-pie",),
        runtime=("alone.cc", "race.cc"),
        wrapped=(*REGIONS, *SYNCHRONISED),
    )


def missing(model: Model) -> str:
    """What a model needs and this machine lacks, with the package's name; empty where nothing is missing."""
    needs = {
        "serial": [("g++", "g++")],
        "omp": [("g++", "g++")],
        "mpi": [("g++", "g++"), ("mpicxx", "libopenmpi-dev"), ("mpirun", "openmpi-bin")],
        "mpi+omp": [("g++", "g++"), ("mpicxx", "libopenmpi-dev"), ("mpirun", "openmpi-bin")],
        "kokkos": [("g++", "g++")],
        "cuda": [("nvcc", "the CUDA toolkit")],
        "hip": [("hipcc", "hipcc")],
    }[model]
    for program, package in needs:
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian: {package})"
    if model == "kokkos" and not (KOKKOS_HEADERS / "Kokkos_Core.hpp").exists():
        return "Kokkos is not installed (Debian: libtrilinos-kokkos-dev)"
    return ""


def runs_here(model: Model) -> bool:
    """Whether programs of a model can also be run: GPU kernels are compiled only."""
    return model not in ("cuda", "hip")


def identity(model: Model) -> str:
    """The compiler and its version, for cache keys and records."""
    compiler = flavour(model).compiler
    shown = subprocess.run(  # noqa: S603 - one of four fixed names
        [compiler, "--version"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return shown.splitlines()[-1 if compiler == "nvcc" else 0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A folder of the cache with the prelude and the objects that candidates of a problem are linked with."""

    folder: Path
    flavour: Flavour
    linked: tuple[str, ...]
    """File names of the objects."""


def prepare(flavoured: Flavour, driver: str, sandbox: Sandbox) -> tuple[Kept, Kept]:
    """The runtime with its precompiled prelude, and a problem's driver; from the cache where there.

    Args:
        flavoured: compiler and flags.
        driver: source of the problem's driver.
        sandbox: ours are the sources, yet compilers are better kept apart.

    Raises:
        RuntimeError: where our own source does not compile, with the compiler's words.
    """
    sources = importlib.resources.files("fourfold_hpc_coder") / "drivers"
    texts = {
        name: (sources / name).read_text(encoding="utf-8")
        for name in ("server.hpp", "regions.hpp", "prelude.hpp", *flavoured.runtime)
    }
    runtime = _kept(
        flavoured,
        texts,
        [
            ("-x", "c++-header", "/in/prelude.hpp", "-o", "/out/prelude.hpp.gch"),
            *(("-c", f"/in/{name}", "-o", f"/out/{name}.o") for name in flavoured.runtime),
        ],
        tuple(f"{name}.o" for name in flavoured.runtime),
        sandbox,
    )
    own = _kept(
        flavoured,
        {"server.hpp": texts["server.hpp"], "driver.cc": driver},
        [("-c", "/in/driver.cc", "-o", "/out/driver.o")],
        ("driver.o",),
        sandbox,
    )
    return runtime, own


_LOCKS: dict[str, threading.Lock] = {}
_LOCKS_GUARD = threading.Lock()
"""Two jobs that need one thing build it once."""


def _kept(
    flavoured: Flavour,
    texts: dict[str, str],
    steps: Sequence[tuple[str, ...]],
    linked: tuple[str, ...],
    sandbox: Sandbox,
) -> Kept:
    # What is ours is not checked for races; the prelude must match the candidate's flags.
    ours = tuple(flag for flag in flavoured.flags if flag != "-fsanitize=thread")
    words = [_version(), *flavoured.flags, *(word for step in steps for word in step)]
    key = hashlib.sha256("\0".join([*words, *texts, *texts.values()]).encode()).hexdigest()[:24]
    folder = cache_folder() / "hpc_coder" / "built" / key
    with _LOCKS_GUARD:
        lock = _LOCKS.setdefault(key, threading.Lock())
    with lock:
        if folder.exists():
            return Kept(folder=folder, flavour=flavoured, linked=linked)
        with whole_folder(folder) as partial:
            inputs = partial / "in"
            inputs.mkdir()
            for name, text in texts.items():
                (inputs / name).write_text(text, encoding="utf-8")
            outputs = partial / "out"
            outputs.mkdir()
            for step in steps:
                flags = flavoured.flags if "c++-header" in step else ours
                _compile_ours(sandbox, (flavoured.compiler, *flags, *step), inputs, outputs)
    return Kept(folder=folder, flavour=flavoured, linked=linked)


def _version() -> str:
    words = ["g++", "-dumpfullversion", "-dumpmachine"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout  # noqa: S603


def _compile_ours(sandbox: Sandbox, command: tuple[str, ...], inputs: Path, outputs: Path) -> None:
    mounts = (
        Mount(source=inputs, target="/in"),
        Mount(source=outputs, target="/out", writable=True),
    )
    outcome = run(sandbox, Job(command=command, mounts=mounts, limits=COMPILING))
    if outcome.code:
        raise RuntimeError(f"{' '.join(command)} failed ({outcome.limit}): {outcome.stderr}")


def compile_candidate(
    sandbox: Sandbox, kept: tuple[Kept, Kept], source: Path, program: Path
) -> Outcome:
    """Compile and link an answer.

    Args:
        sandbox: where the compiler runs: it reads the answer, which may include files or loop forever.
        kept: from `prepare`.
        source: folder with `answer.cpp`.
        program: folder that receives `answer`.
    """
    runtime, own = kept
    flavoured = runtime.flavour
    objects = [f"/runtime/{name}" for name in runtime.linked] + [
        f"/driver/{name}" for name in own.linked
    ]
    command = (
        flavoured.compiler,
        *flavoured.flags,
        "-include",
        "/runtime/prelude.hpp",
        "/in/answer.cpp",
        *(["-c", "-o", "/out/answer.o"] if "-fsanitize=thread" in flavoured.flags else []),
        *([] if "-fsanitize=thread" in flavoured.flags else [*objects, *_linking(flavoured)]),
    )
    mounts = (
        Mount(source=runtime.folder / "out", target="/runtime"),
        Mount(source=own.folder / "out", target="/driver"),
        Mount(source=source, target="/in"),
        Mount(source=program, target="/out", writable=True),
    )
    outcome = run(sandbox, Job(command=command, mounts=mounts, limits=COMPILING))
    if outcome.code or "-fsanitize=thread" not in flavoured.flags:
        return outcome
    # Without the sanitizer's own library: `race.cc` defines what instrumented code calls.
    link = (flavoured.compiler, "-fopenmp", "/out/answer.o", *objects, *_linking(flavoured))
    return run(sandbox, Job(command=link, mounts=mounts, limits=COMPILING))


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


def compile_kernel(sandbox: Sandbox, model: Model, source: Path, program: Path) -> Outcome:
    """Compile a GPU kernel to an object: all that can be checked without a GPU."""
    flavoured = flavour(model)
    command = (flavoured.compiler, *flavoured.flags, "-c", "/in/answer.cu", "-o", "/out/answer.o")
    mounts = (
        Mount(source=source, target="/in"),
        Mount(source=program, target="/out", writable=True),
    )
    return run(sandbox, Job(command=command, mounts=mounts, limits=COMPILING))
