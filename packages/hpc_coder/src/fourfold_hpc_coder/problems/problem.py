"""A problem: the task, the signature, the inputs and the kernel that solves it in every parallel model."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fourfold_hpc_coder.problems import kernels
from fourfold_hpc_coder.problems.inputs import draw
from fourfold_hpc_coder.problems.signature import Parameter, Signature
from fourfold_hpc_coder.vocabulary import MODELS, Model, Tolerance

SINGLE = Tolerance(relative=1e-4, absolute=1e-4)
DOUBLE = Tolerance(relative=1e-6, absolute=1e-6)
"""Wide enough for any order of at most 4 million additions of numbers of one size, and no wider."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A function to write, and everything that decides whether an answer is right."""

    name: str
    """As in ParEval: `55_transform_relu`."""
    problem_type: str
    task: str
    signature: Signature
    prelude: str
    """Structures and helpers that the prompt shows before the task."""
    kernel: kernels.Kernel
    inputs: Mapping[str, Mapping[str, Any]]
    check_size: int
    timing_size: int
    minimum_size: int
    is_power_of_two: bool
    held: str
    """The data that every rank holds before the call."""
    answered: str
    """The place of the answer after it, on rank 0."""
    has_kokkos: bool
    example: Mapping[str, Any]

    @property
    def models(self) -> tuple[Model, ...]:
        """The models in which the problem has a prompt and a reference."""
        return tuple(
            model
            for model in MODELS
            if model not in ("cuda", "hip", "kokkos")
            or (model == "kokkos" and self.has_kokkos)
            or (model == "cuda" and self._has_cuda)
        )

    @property
    def _has_cuda(self) -> bool:
        kernel = self.kernel
        return isinstance(kernel, kernels.Map) and "std::" not in kernel.each + kernel.setup

    def answer(self, model: Model) -> str:
        """A right answer in a model, as a generator would return it: the body with its closing brace."""
        return kernels.body(self.kernel, model)

    def declaration(self, model: Model) -> str:
        """The signature in a model's types."""
        text = self.signature.text
        match model:
            case "kokkos":
                text = re.sub(
                    r"std::vector<([\w:<>]+?)> const ?&", r"Kokkos::View<const \1 *> const &", text
                )
                text = re.sub(r"std::vector<([\w:<>]+?)> ?&", r"Kokkos::View<\1 *> &", text)
                return re.sub(r"std::array<([\w:]+), \d+> ?&", r"Kokkos::View<\1 *> &", text)
            case "cuda" | "hip":
                text = re.sub(r"std::vector<([\w:]+)> const ?&", r"const \1 *", text)
                text = re.sub(r"std::vector<([\w:]+)> ?&", r"\1 *", text)
                sized = text if re.search(r"size_t N\b", text) else f"{text[:-1]}, size_t N)"
                return f"__global__ {sized}"
            case _:
                return text

    def prompt(self, model: Model) -> str:
        """The text that a code model continues: includes, helpers, the task, the opened head."""
        sentences = [self.task, *_HOW[model]]
        if model in ("mpi", "mpi+omp"):
            sentences += [f"Every rank has a complete copy of {self.held}. {self.answered}"]
        if self.example:
            sentences += [f"Example: {_shown(self.example)}."]
        comment = "\n   ".join(sentences)
        includes = "".join(f"#include <{name}>\n" for name in _INCLUDES[model])
        parts = [includes, self.prelude.strip(), f"/* {comment}\n*/\n{self.declaration(model)} {{"]
        return "\n".join(part.strip("\n") + "\n" for part in parts if part).rstrip("\n")

    def unit(self, prompt: str, body: str) -> str:
        """The translation unit of an answer: the body follows the brace that ends the prompt."""
        return f"{prompt}\n{body}\n"

    def driver(self, model: Model) -> str:
        """Source of the program that calls an answer: our server around a declaration."""
        declaration = self.declaration(model)
        # Half of a driver's compilation, where nothing asks for them.
        text = declaration + self.prelude
        headers = "#include <cmath>\n" if self.prelude else ""
        headers += "#include <complex>\n" if "complex" in text else ""
        return (
            f'#include "server.hpp"\n{headers}'
            f"{_inline(self.prelude)}\n{_unnamed(declaration)};\n"
            "int main(int count, char **words) {\n"
            f"    return fourfold::serve(&{self.signature.function}, count, words);\n}}\n"
        )

    def tolerance(self, parameter: Parameter) -> Tolerance:
        """The tolerance of an output."""
        return SINGLE if parameter.dtype == np.float32 else DOUBLE

    def forbidden(self) -> frozenset[str]:
        """Nothing: the reference is in another process."""
        return frozenset()

    def fixed(self) -> frozenset[str]:
        """Nothing: no text of ours follows an answer in its file."""
        return frozenset()

    def sizes(self, generator: np.random.Generator) -> tuple[int, ...]:
        """Sizes at which an answer is checked: the smallest, some that nothing divides, one that many do."""
        top = self.check_size
        if self.is_power_of_two:
            return (2, int(2 ** generator.integers(3, int(np.log2(top)))), top)
        odd = int(generator.integers(top // 4, top // 2)) * 2 + 1
        few = int(generator.integers(max(self.minimum_size, 3), 9))
        return (self.minimum_size, few, odd, top // 12 * 12)

    def checks(self, generator: np.random.Generator) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        """Inputs on which an answer is checked, each with the end of a sentence about it.

        Where few elements decide an answer, chance hardly ever puts them at an end, or where the blocks
        of two threads or ranks meet: they are planted there.
        """
        sizes = self.sizes(generator)
        odd, even = sizes[-2:]
        if any("decisive" in rule for rule in self.inputs.values()):
            for size, place in ((odd, 0), (odd, odd - 1), (even, even // 2 - 1), (even, even // 2)):
                where = f"for an input of size {size} that is decided at element {place}"
                yield where, self.arguments(size, generator, decided_at=place)
        for size in sizes:
            yield f"for an input of size {size}", self.arguments(size, generator)
        # An answer that is kept by the size of its input is another input's.
        yield f"for another input of size {even}", self.arguments(even, generator)

    def mirrored(self, generator: np.random.Generator) -> Iterator[dict[str, np.ndarray]]:
        """Inputs that decide an answer twice, once in each half: two threads then write where one would.

        None where nothing decides, or what does is no element of a vector.
        """
        kinds = {rule["kind"] for rule in self.inputs.values() if "decisive" in rule}
        if not kinds or "adjacency" in kinds:
            return
        size = self.check_size // 12 * 12
        drawn = self.arguments(size, generator, decided_at=size // 2 - 1)
        for parameter in self.signature.parameters:
            values = drawn[parameter.name]
            if parameter.holds == "many" and not parameter.is_output and values.size == size:
                values[size // 2 :] = values[: size // 2]
        yield drawn

    def arguments(
        self, size: int, generator: np.random.Generator, *, decided_at: int | None = None
    ) -> dict[str, np.ndarray]:
        """Inputs of a call, one array per parameter (of shape () for a scalar), in order.

        Args:
            size: the `n` of the rules.
            generator: decides everything else.
            decided_at: element at which what the rules call decisive is planted; None for nowhere.
        """
        drawn: dict[str, np.ndarray] = {}
        for parameter in self.signature.parameters:
            rule = self.inputs[parameter.name]
            drawn[parameter.name] = draw(
                rule,
                parameter.dtype,
                size,
                drawn,
                generator,
                is_scalar=parameter.holds == "one",
                decided_at=decided_at,
            )
        return drawn


_HOW: dict[Model, tuple[str, ...]] = {
    "serial": (),
    "omp": ("Use OpenMP to compute in parallel.",),
    "mpi": ("Use MPI to compute in parallel. MPI has already been initialized.",),
    "mpi+omp": ("Use MPI and OpenMP to compute in parallel. MPI has already been initialized.",),
    "kokkos": ("Use Kokkos to compute in parallel. Kokkos has already been initialized.",),
    "stdpar": (
        "Use algorithms of the C++ standard library with std::execution::par to compute in parallel.",
    ),
    "cuda": ("Use CUDA. The kernel is launched with at least as many threads as there is work.",),
    "hip": ("Use HIP. The kernel is launched with at least as many threads as there is work.",),
}

_INCLUDES: dict[Model, tuple[str, ...]] = {
    "serial": (),
    "omp": ("omp.h",),
    "mpi": ("mpi.h",),
    "mpi+omp": ("mpi.h", "omp.h"),
    "kokkos": ("Kokkos_Core.hpp",),
    "stdpar": ("algorithm", "execution", "numeric", "vector"),
    "cuda": (),
    "hip": ("hip/hip_runtime.h",),
}


def _unnamed(declaration: str) -> str:
    """Without the parameters' names, so that functions of one type have one driver."""
    return re.sub(r"([&*>\w]) ?\b\w+(?=[,)])", r"\1", declaration)


def _inline(prelude: str) -> str:
    """Helpers are defined in the answer's file as well; two inline ones are one."""
    return re.sub(
        r"^(?=(?:double|int|bool|float) \w+\()", "static inline ", prelude, flags=re.MULTILINE
    )


def _shown(example: Mapping[str, Any]) -> str:
    shown = ", ".join(f"{key} = {_text(value)}" for key, value in example.items() if key != "gives")
    gives = example["gives"]
    if not isinstance(gives, Mapping):
        return f"{shown} gives {_text(gives)}"
    return f"{shown} gives " + ", ".join(f"{key} = {_text(value)}" for key, value in gives.items())


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
