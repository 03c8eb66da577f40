"""Triton kernels compiled for GPUs that are not here, and what their machine code needs.

A GPU's compiler needs no GPU. What a caller launches is caught (`launches`), so that a kernel is compiled for
the arguments that it really gets, specialised as Triton does at a launch: sizes that are one become
constants, pointers and sizes that sixteen divides are known to be.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile  # noqa: A004 - Triton's name
from triton.runtime.jit import JITFunction

SHARED_LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory that one program may have (CUDA's table of compute capabilities; CDNA 3)."""
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""A100, H100 and H200, B200, MI300."""
_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
    torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KernelLaunch:
    """One launch of a kernel, caught before it began."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's."""
        return self.kernel.fn.__name__


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """Machine code of a kernel for one target, by what it needs."""

    target: str
    registers: int
    """Of a thread; vector registers on AMD."""
    spilled_bytes: int
    """Of a thread, in memory; registers times four on AMD."""
    shared_bytes: int
    warps: int
    assembly: str
    """PTX, or AMD's."""

    def has(self, instruction: str) -> bool:
        """True where the assembly holds an instruction, given as a regular expression."""
        return re.search(instruction, self.assembly) is not None


@contextmanager
def launches() -> Iterator[list[KernelLaunch]]:
    """Catch the launches of a block, none of which begins: what they would write stays as it is."""
    caught: list[KernelLaunch] = []

    def run(kernel: Any, *positional: Any, grid: Any, warmup: bool, **named: Any) -> None:
        del warmup
        arguments = dict(
            zip([parameter.name for parameter in kernel.params], positional, strict=False)
        )
        caught.append(
            KernelLaunch(kernel=kernel, grid=tuple(grid), arguments={**arguments, **named})
        )

    with mock.patch.object(JITFunction, "run", run):
        yield caught


def compiled(launch: KernelLaunch, target: str) -> Code:
    """The machine code of a launch's kernel for one of `TARGETS`."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    hints: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[parameter.name], constants[index,] = "constexpr", value
            continue
        is_aligned = isinstance(value, Tensor) or value % 16 == 0
        if isinstance(value, Tensor):
            signature[parameter.name] = f"*{_TYPES[value.dtype]}"
        else:
            signature[parameter.name] = "i32" if abs(value) < 1 << 31 else "i64"
        if is_aligned:
            hints[index,] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=hints)
    options = set(launch.arguments) - {parameter.name for parameter in launch.kernel.params}
    made: Any = compile(
        source, target=TARGETS[target], options={name: launch.arguments[name] for name in options}
    )
    is_amd = "amdgcn" in made.asm
    assembly = made.asm["amdgcn" if is_amd else "ptx"]
    registers, spilled = _amd(assembly) if is_amd else _nvidia(made.asm["cubin"])
    return Code(
        target=target,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=made.metadata.shared,
        warps=made.metadata.num_warps,
        assembly=assembly,
    )


def _amd(assembly: str) -> tuple[int, int]:
    told = {name: int(number) for name, number in re.findall(r"\.(\w+_count):\s+(\d+)", assembly)}
    return told["vgpr_count"], 4 * (told["vgpr_spill_count"] + told["sgpr_spill_count"])


def _nvidia(cubin: bytes) -> tuple[int, int]:
    """From NVIDIA's own reader of its files, which Triton brings."""
    reader = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with _file(cubin) as path:
        said = subprocess.run(  # noqa: S603 - Triton's own
            [reader, "--dump-resource-usage", path], capture_output=True, text=True, check=True
        ).stdout
    told = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", said))
    return int(told["REG"]), int(told["STACK"]) + int(told["LOCAL"])


@contextmanager
def _file(content: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(content)
        yield path
