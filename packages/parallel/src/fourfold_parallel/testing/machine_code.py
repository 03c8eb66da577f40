"""C++ of the packages for other processors: its results under an emulator, and what its assembly says."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from fourfold_parallel.common import native

ARM = {
    "NEON": ("-march=armv8-a",),
    "SVE": ("-march=armv8-a+sve", "-msve-vector-bits=256"),
}
"""Flags by instruction set of 64-bit ARM processors."""
TOOLS = "aarch64-linux-gnu-g++", "qemu-aarch64"
READ = """
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

template <typename T>
std::vector<T> read(int64_t count) {
    std::vector<T> values(count);
    if (std::fread(values.data(), sizeof(T), count, stdin) != size_t(count)) std::abort();
    return values;
}
"""
"""C++ that a `main` reads its standard input by."""
NEED = "needs Debian's g++-aarch64-linux-gnu and qemu-user"


def can_emulate() -> bool:
    """True where a cross compiler and an emulator are here."""
    return all(map(shutil.which, TOOLS))


def built_for_arm(program: str, kind: str, folder: Path) -> Path:
    """A C++ program with a `main`, compiled for a 64-bit ARM processor.

    Args:
        program: whole source text; see `native.whole_source`.
        kind: one of `ARM`.
        folder: where it is put.

    Raises:
        subprocess.SubprocessError: where it does not compile.
    """
    built = folder / f"program-{kind}"
    flags = [flag for flag in native.FLAGS if flag not in ("-shared", "-fPIC")]
    subprocess.run(  # noqa: S603 - Debian's compiler
        [TOOLS[0], *flags, *ARM[kind], "-static", "-x", "c++", "-", "-o", built],
        input=program.encode(), check=True, timeout=600,
    )  # fmt: skip
    return built


def run_on_arm(built: Path, *, given: bytes = b"") -> bytes:
    """The output of such a program, given its standard input, on an emulated processor.

    Raises:
        subprocess.SubprocessError: where it fails.
    """
    return subprocess.run(  # noqa: S603 - Debian's emulator
        [TOOLS[1], "-cpu", "max,sve-default-vector-length=32", built],
        input=given, stdout=subprocess.PIPE, check=True, timeout=600,
    ).stdout  # fmt: skip


def stack_share(package: str, source: str, instructions: str, command: Sequence[str]) -> float:
    """The share of an x86 kernel's vector instructions that touch the stack: spilled registers, mostly.

    Args:
        package: whose source file.
        source: its name in the package.
        instructions: the instruction set, by GCC's name.
        command: the compiler's.
    """
    flags = [flag for flag in native.FLAGS if flag != "-shared"]
    assembly = subprocess.run(  # noqa: S603 - a compiler from PATH
        [*command, *flags, f"-march={instructions}", "-S", "-x", "c++", "-", "-o", "-"],
        input=native.whole_source(package, source), capture_output=True, text=True, check=True, timeout=600,
    ).stdout  # fmt: skip
    vectors = re.findall(r"^\t.*%[xyz]mm\d.*$", assembly, flags=re.MULTILINE)
    on_stack = [line for line in vectors if re.search(r"\(%r[sb]p", line)]
    return len(on_stack) / len(vectors)
