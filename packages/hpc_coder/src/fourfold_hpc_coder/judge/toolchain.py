"""Compilers: what is on this machine, and with which flags each parallel model is built."""

import importlib.resources
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fourfold_hpc_coder.judge.openmp_calls import REGIONS, SYNCHRONISED
from fourfold_hpc_coder.sandbox.backends import Landlock, Sandbox
from fourfold_hpc_coder.vocabulary import Model
from fourfold_parallel.common.files import named_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Flavour:
    """The compiler and the flags of a model's programs."""

    compiler: str
    prelude: tuple[str, ...]
    """Flags of the answer, the prelude and what of ours lies beneath; equal ones have one prelude."""
    flags: tuple[str, ...]
    """Further flags of the answer; none of them may make GCC refuse the prelude."""
    libraries: tuple[str, ...]
    runtime: tuple[str, ...]
    """Our sources beneath every driver of this flavour."""
    given: tuple[Path, ...] = ()
    """Folders outside of /usr that its compiler and its programs read, each at its own place."""


PLAIN = ("-std=c++17", "-O3")
NO_MACROS = ("-U_OPENMP", "-U_REENTRANT")
"""Undefines the macros of OpenMP's flag; a prelude made under one of them would serve nothing else."""
_OPENMP = ("-fopenmp", *NO_MACROS, "-include", "/prelude/openmp.hpp")


def _gcc(
    *flags: str,
    prelude: tuple[str, ...] = PLAIN,
    libraries: Sequence[str] = (),
    runtime: Sequence[str],
    wrapped: Sequence[str] = (),
    given: tuple[Path, ...] = (),
) -> Flavour:
    return Flavour(
        compiler="g++",
        prelude=prelude,
        flags=flags,
        libraries=(*(f"-Wl,--wrap={name}" for name in wrapped), *libraries),
        runtime=tuple(runtime),
        given=given,
    )


ONE_TBB = Path("/usr/include/oneapi/tbb/task.h")
"""Of TBB 2021 or later, whose names are those of `DIVIDED`."""
DIVIDED = (
    "_ZN3tbb6detail2r116execute_and_waitERNS0_2d14taskERNS2_18task_group_contextERNS2_12wait_contextES6_",
    "_ZN3tbb6detail2r15spawnERNS0_2d14taskERNS2_18task_group_contextE",
)
"""TBB's calls that do a piece of work, and offer a part to other threads; sent through `policies.cc`."""
KOKKOS = "FOURFOLD_KOKKOS"
"""Environment variable that names the prefix of an installed Kokkos; without it, the system's is sought."""
_KOKKOS_PLACES = (
    ("include", "libkokkoscore"),
    ("include/kokkos", "libkokkoscore"),
    ("include/trilinos", "libtrilinos_kokkoscore"),
)
"""Under a prefix: by its own installation, by Debian's libkokkos-dev, and by its libtrilinos-kokkos-dev."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kokkos:
    """An installed Kokkos."""

    prefix: Path
    headers: Path
    library: Path
    """Its core; what else it has lies beside."""
    settings: str
    """The text of its `KokkosCore_config.h`."""

    @property
    def number(self) -> int:
        """Its version: 40601 for 4.6.1."""
        return int(re.findall(r"#define KOKKOS_VERSION (\d+)", self.settings)[0])

    @property
    def version(self) -> str:
        """As people write it: 4.6.1."""
        return f"{self.number // 10000}.{self.number // 100 % 100}.{self.number % 100}"

    def has(self, setting: str) -> bool:
        """Whether it was built with something: `OPENMP`, `CXX20`."""
        return re.search(rf"#define KOKKOS_ENABLE_{setting}\b", self.settings) is not None

    def flavour(self) -> Flavour:
        """Compiler and flags of its programs."""
        place = self.library.parent
        containers = self.library.with_name(self.library.name.replace("core", "containers"))
        is_seen = self.prefix.is_relative_to("/usr")
        return _gcc(
            prelude=(
                *PLAIN,
                *(["-std=c++20"] if self.has("CXX20") else []),
                *(["-fopenmp"] if self.has("OPENMP") else []),
                f"-DFOURFOLD_KOKKOS={self.number}",  # what is made beneath one version serves no other
                f"-isystem{self.headers}",
            ),
            libraries=(
                *([str(containers)] if containers.exists() else []),
                str(self.library),
                f"-Wl,-rpath,{place}",
                "-ldl",
            ),
            runtime=("serve.cc", "alone.cc"),
            given=() if is_seen else (self.prefix,),
        )


@cache
def kokkos() -> Kokkos | None:
    """The Kokkos that `FOURFOLD_KOKKOS` names, else /usr/local's, else /usr's; None where there is none."""
    named = named_folder(KOKKOS)
    for prefix in [named.resolve()] if named else [Path("/usr/local"), Path("/usr")]:
        for folder, name in _KOKKOS_PLACES:
            config = prefix / folder / "KokkosCore_config.h"
            for place in ("lib", "lib64", "lib/*-linux-gnu"):
                for library in sorted(prefix.glob(f"{place}/{name}.*")):
                    if library.suffix in (".a", ".so") and config.exists():
                        return Kokkos(
                            prefix=prefix,
                            headers=config.parent,
                            library=library,
                            settings=config.read_text(encoding="utf-8"),
                        )
    return None


def nvcc() -> Path | None:
    """CUDA's compiler: the one on PATH, else that of the wheel `nvidia-cuda-nvcc`; None where neither is."""
    if held := shutil.which("nvcc"):
        return Path(held).resolve()
    places = (place for entry in sys.path for place in Path(entry).glob("nvidia/cu[0-9]*/bin/nvcc"))
    return next(places, None)


ANSWERING_S = 30
"""Longest that a compiler gets to say which it is."""


@cache
def _said(*words: str) -> tuple[str, str]:
    """A compiler's words on itself, or the reason why it says nothing."""
    try:
        shown = subprocess.run(  # noqa: S603 - fixed names
            words, capture_output=True, text=True, check=True, timeout=ANSWERING_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        return "", str(error)
    return shown.stdout, ""


@cache
def mpi_flags() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Compile and link flags as the MPI's own wrapper states them, without the C++ bindings of MPI-2."""
    compiled, linked = (
        _said("mpicxx", f"--showme:{what}")[0].split() for what in ("compile", "link")
    )
    libraries = tuple(word for word in linked if word != "-lmpi_cxx")
    return ("-DOMPI_SKIP_MPICXX", *compiled, "-include", "mpi.h"), libraries


def flavour_of(model: Model) -> Flavour:
    """The compiler and flags of a model here; call `missing` first."""
    match model:
        case "serial":
            return _gcc(runtime=("serve.cc", "alone.cc"))
        case "omp":
            return _gcc(*_OPENMP, runtime=("serve.cc", "alone.cc", "threads.cc"), wrapped=REGIONS)
        case "mpi":
            flags, libraries = mpi_flags()
            return _gcc(*flags, libraries=libraries, runtime=("serve.cc", "ranks.cc"))
        case "mpi+omp":
            flags, libraries = mpi_flags()
            return _gcc(
                *_OPENMP,
                *flags,
                libraries=libraries,
                runtime=("serve.cc", "ranks.cc", "threads.cc"),
                wrapped=REGIONS,
            )
        case "kokkos":
            held = kokkos()
            assert held is not None
            return held.flavour()
        case "stdpar":
            return _gcc(
                prelude=(*PLAIN, "-DFOURFOLD_POLICIES"),
                libraries=("-ltbb",),
                runtime=("serve.cc", "alone.cc", "policies.cc"),
                wrapped=DIVIDED,
            )
        case "cuda":
            compiler = nvcc() or Path("nvcc")
            is_seen = compiler.is_relative_to("/usr")
            return Flavour(
                compiler=str(compiler),
                prelude=PLAIN,
                flags=(),
                libraries=(),
                runtime=(),
                given=() if is_seen else (compiler.parents[1],),
            )
        case "hip":
            return Flavour(compiler="hipcc", prelude=PLAIN, flags=(), libraries=(), runtime=())


_DEFAULT_LIBRARIES = ("-lstdc++", "-lm", "-lgomp", "-lgcc_s", "-lgcc", "-lpthread", "-lc", "-lgcc")
"""The libraries that GCC links by itself; with `-fsanitize=thread` it would add one."""


def racing() -> Flavour:
    """Like OpenMP's, with every memory access of the answer reported to the checker in `race.cc`."""
    return _gcc(
        *_OPENMP,
        "-g1",
        "-O1",
        "-fsanitize=thread",
        # The one name that the flag defines; with it GCC would refuse the prelude.
        "-U__SANITIZE_THREAD__",
        # Without the sanitizer's own library: `race.cc` defines what instrumented code calls.
        libraries=("-no-pie", "-nodefaultlibs", *_DEFAULT_LIBRARIES),
        runtime=("serve.cc", "alone.cc", "race.cc"),
        wrapped=(*REGIONS, *SYNCHRONISED),
    )


def missing(model: Model) -> str:
    """The program that a model needs and this machine lacks, with its package; empty for none.

    A compiler that is there and does not answer is missing too.
    """
    needs = {
        "serial": [("g++", "g++")],
        "omp": [("g++", "g++")],
        "mpi": [("g++", "g++"), ("mpicxx", "libopenmpi-dev"), ("mpirun", "openmpi-bin")],
        "mpi+omp": [("g++", "g++"), ("mpicxx", "libopenmpi-dev"), ("mpirun", "openmpi-bin")],
        "kokkos": [("g++", "g++")],
        "stdpar": [("g++", "g++")],
        "cuda": [],
        "hip": [("hipcc", "hipcc")],
    }[model]
    if model == "cuda" and nvcc() is None:
        return (
            "nvcc is not installed (pip: nvidia-cuda-nvcc, nvidia-cuda-runtime, nvidia-cuda-cccl; Debian: "
            "nvidia-cuda-toolkit)"
        )
    for program, package in needs:
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian: {package})"
    compiler = flavour_of(model).compiler if model == "cuda" else needs[0][0]
    if mute := _said(compiler, "--version")[1]:
        return f"{compiler} is installed, and does not work: {mute}"
    if model in ("mpi", "mpi+omp") and (mute := _said("mpicxx", "--showme:link")[1]):
        return f"mpicxx is not Open MPI's (Debian: libopenmpi-dev), or does not work: {mute}"
    if model == "stdpar" and not ONE_TBB.exists():
        return (
            "oneTBB, by which GCC's parallel algorithms run, is not installed (Debian: libtbb-dev)"
        )
    if model == "kokkos" and kokkos() is None:
        if named := named_folder(KOKKOS):
            return f"{KOKKOS}={named} holds no Kokkos; name the prefix under which it is installed"
        return (
            f"Kokkos is not installed (Debian: libtrilinos-kokkos-dev; elsewhere: {KOKKOS}=PREFIX)"
        )
    return ""


def lacks_sockets(sandbox: Sandbox) -> bool:
    """Whether programs there have no socket, by which `mpirun` speaks to its ranks."""
    return isinstance(sandbox, Landlock)


def barred(model: Model, sandbox: Sandbox) -> str:
    """The reason why answers in a model cannot be judged here; empty where they can."""
    if reason := missing(model):
        return reason
    is_mpi = model in ("mpi", "mpi+omp")
    if is_mpi and lacks_sockets(sandbox) and not _starts_without_sockets():
        return (
            "this MPI starts ranks through sockets alone, which the sandbox `landlock` refuses; use Open MPI "
            "4 (its component for the launcher Flux needs none), install Debian's bubblewrap, or allow user "
            "namespaces"
        )
    return ""


def _starts_without_sockets() -> bool:
    """Whether this Open MPI has the component that `drivers/starter.cc` answers; 5 has none."""
    return "MCA pmix: flux" in _said("ompi_info")[0]


def runs_here(model: Model) -> bool:
    """Whether programs of a model can also be run: GPU kernels are compiled only."""
    return model not in ("cuda", "hip")


def identity(model: Model) -> str:
    """The compiler and its version, and a library's, for cache keys and records."""
    compiler = flavour_of(model).compiler
    shown = _said(compiler, "--version")[0].strip()
    line = shown.splitlines()[-1 if model == "cuda" else 0]
    held = kokkos() if model == "kokkos" else None
    return f"{line}, Kokkos {held.version}" if held else line


def gcc_version() -> str:
    """GCC's version and machine, for the names of what it makes."""
    return _said("g++", "-dumpfullversion", "-dumpmachine")[0]


@cache
def driver_texts() -> dict[str, str]:
    """Our C++ sources beneath every answer, by file name."""
    folder = importlib.resources.files("fourfold_hpc_coder.judge") / "drivers"
    return {
        file.name: file.read_text(encoding="utf-8") for file in folder.iterdir() if file.is_file()
    }
