"""An answer becomes a program: compiled under a precompiled prelude, linked with objects compiled before.

An answer is one translation unit; the driver of its problem and the runtime beneath it are kept in the cache.
"""

import hashlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from fourfold_hpc_coder.judge.artifacts import Artifact, compiling, in_their_places
from fourfold_hpc_coder.judge.prelude import INCLUDED, needs_whole, prelude
from fourfold_hpc_coder.judge.toolchain import (
    PLAIN,
    Flavour,
    driver_texts,
    flavour_of,
    gcc_version,
    mpi_flags,
)
from fourfold_hpc_coder.sandbox.backends import Sandbox
from fourfold_hpc_coder.sandbox.job import JobResult, Mount
from fourfold_hpc_coder.vocabulary import Model
from fourfold_parallel.common.files import cache_folder, whole_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildInputs:
    """The prelude and the objects that answers to a problem need, in the cache."""

    flavour: Flavour
    prelude: Path
    """Folder with the precompiled prelude."""
    objects: tuple[Path, ...]
    """The driver and the runtime beneath it, each in a folder of its own."""


def prepare(flavour: Flavour, driver: str, text: str, sandbox: Sandbox) -> BuildInputs:
    """The precompiled prelude, the runtime and a problem's driver; from the cache where there.

    Args:
        flavour: compiler and flags.
        driver: source of the problem's driver; empty for none.
        text: what is to be compiled against them.
        sandbox: where the compiler runs.

    Raises:
        RuntimeError: where our own source does not compile, with the compiler's words.
    """
    # The prelude last: what lies beneath needs none, and another thread may be at it.
    beneath = objects(flavour, driver, sandbox)
    whole = needs_whole(flavour, text, sandbox)
    return BuildInputs(
        flavour=flavour, prelude=prelude(flavour, whole=whole).make(sandbox), objects=beneath
    )


def objects(flavour: Flavour, driver: str, sandbox: Sandbox) -> tuple[Path, ...]:
    """The runtime and, where there is one, the driver; arguments and errors as of `prepare`."""
    sources = {name: driver_texts()[name] for name in flavour.runtime}
    if driver:
        sources["driver.cc"] = driver
    return tuple(_object(flavour, name, text, sandbox) for name, text in sources.items())


def _object(flavour: Flavour, name: str, text: str, sandbox: Sandbox) -> Path:
    """A source of ours, compiled; what is not timed need not be fast, and -O3 takes thrice as long."""
    own = [*flavour.prelude, "-O1"]
    own += ["-fopenmp"] if "regions.hpp" in text else []
    own += mpi_flags()[0] if "mpi.h" in text else []
    headers = {key: value for key, value in driver_texts().items() if key.endswith(".hpp")}
    compiled = Artifact(
        compiler=flavour.compiler,
        command=(*own, "-c", f"/in/{name}", "-o", "/out/object.o"),
        sources={**headers, name: text},
        given=flavour.given,
    )
    # No need to wait for a prelude; where one is there, it halves the time.
    preludes = [prelude(flavour, whole=whole).folder for whole in (False, True)]
    ready = [folder for folder in preludes if folder.exists()]
    if name != "driver.cc" or not ready:
        return compiled.make(sandbox)
    mount = Mount(source=ready[0], target="/prelude")
    return compiled.make(sandbox, sooner=("-g0", *INCLUDED), mounts=(mount,))


def starting(sandbox: Sandbox) -> tuple[Path, Path]:
    """The folders with `start`, which starts ranks without a socket, and with `pmi.so`, their library.

    Raises:
        RuntimeError: where our own source does not compile.
    """
    program, library = (
        Artifact(
            compiler="g++",
            command=(*PLAIN, "-O1", "-pthread", *words, "/in/starter.cc", "-o", f"/out/{name}"),
            sources={"starter.cc": driver_texts()["starter.cc"]},
        ).make(sandbox)
        for name, words in (("start", ()), ("pmi.so", ("-shared", "-fPIC")))
    )
    (program / "start").chmod(0o755)  # a compiler behind seccomp has no say in modes
    return program, library


def compile_candidate(
    sandbox: Sandbox, inputs: BuildInputs, source: Path, program: Path
) -> JobResult:
    """Compile and link an answer.

    Args:
        sandbox: where the compiler runs: it reads the answer, which may include files or loop forever.
        inputs: from `prepare`.
        source: folder with `answer.cpp`.
        program: folder that receives `answer`.
    """
    flavour = inputs.flavour
    objects = [f"/object{number}/object.o" for number, _ in enumerate(inputs.objects)]
    command = (
        flavour.compiler,
        *flavour.prelude,
        "-g0",
        *INCLUDED,
        *flavour.flags,
        "/in/answer.cpp",
        *objects,
        *_linking(flavour),
    )
    mounts = (
        Mount(source=inputs.prelude, target="/prelude"),
        *(Mount(source=folder, target=f"/object{n}") for n, folder in enumerate(inputs.objects)),
        Mount(source=source, target="/in"),
        Mount(source=program, target="/out", writable=True),
        *in_their_places(flavour.given),
    )
    result = compiling(sandbox, command, mounts)
    if not result.code:
        (program / "answer").chmod(0o755)  # a job behind seccomp has no say in modes
    return result


def kept_program(
    sandbox: Sandbox, inputs: BuildInputs, text: str, source: Path, program: Path
) -> JobResult:
    """Compile and link a unit of ours, or copy what an earlier call made of it.

    Args:
        sandbox: where the compiler runs.
        inputs: from `prepare`; the names of their folders say what they hold.
        text: the unit.
        source: folder with it.
        program: folder that receives `answer`.
    """
    flavour = inputs.flavour
    beneath = (inputs.prelude, *inputs.objects)
    words = (gcc_version(), repr(flavour), text, *(folder.parent.name for folder in beneath))
    key = hashlib.sha256("\0".join(words).encode("utf-8", "surrogatepass")).hexdigest()[:24]
    kept = cache_folder() / "hpc_coder" / "programs" / key
    if kept.exists():
        shutil.copy(kept / "answer", program)
        return JobResult(code=0, stdout="", stderr="", elapsed_s=0, cpu_s=0, limit="nothing")
    result = compile_candidate(sandbox, inputs, source, program)
    if not result.code and result.limit == "nothing":
        with whole_folder(kept) as partial:
            shutil.copy(program / "answer", partial)
    return result


def _linking(flavour: Flavour) -> list[str]:
    fast = ["-fuse-ld=mold"] if shutil.which("mold") else []
    return [*fast, *flavour.libraries, "-o", "/out/answer"]


def source_line(sandbox: Sandbox, program: Path, address: str) -> int:
    """1-based line of `answer.cpp` that holds an instruction's address; 0 where that is unknown."""
    command = ("addr2line", "-e", "/job/answer", hex(int(address, 16) - 1))
    result = compiling(sandbox, command, (Mount(source=program, target="/job"),))
    line = re.search(r"answer\.cpp:(\d+)", result.stdout)
    return int(line.group(1)) if line else 0


def compile_kernel(sandbox: Sandbox, model: Model, source: Path, program: Path) -> JobResult:
    """Compile a GPU kernel to an object: all that can be checked without a GPU."""
    gpu = flavour_of(model)
    command = (gpu.compiler, *gpu.prelude, "-c", "/in/answer.cu", "-o", "/out/answer.o")
    mounts = (
        Mount(source=source, target="/in"),
        Mount(source=program, target="/out", writable=True),
        *in_their_places(gpu.given),
    )
    return compiling(sandbox, command, mounts)
