"""Our own problems: a file each, with the task, the signature, the inputs and the kernel that solves it.

Names and signatures are those of ParEval, so that outputs generated for its prompts are scored here without
its files; wording, references, inputs and drivers are ours. A problem's sequential reference and its answers
in the parallel models come from one kernel.
"""

import importlib.resources
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from fourfold_hpc_coder.problems import kernels
from fourfold_hpc_coder.problems.inputs import draw
from fourfold_hpc_coder.vocabulary import MODELS, Model, Tolerance

DTYPES = {
    "double": "f8",
    "float": "f4",
    "int": "i4",
    "size_t": "u8",
    "bool": "?",
    "std::complex<double>": "c16",
}
"""C++ element types as NumPy sees their bytes."""

SINGLE = Tolerance(relative=1e-4, absolute=1e-4)
DOUBLE = Tolerance(relative=1e-6, absolute=1e-6)
"""Wide enough for any order of at most 4 million additions of numbers of one size, and no wider."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of a function, or its result (named `result`)."""

    name: str
    declared: str
    """The C++ type as written: `std::vector<double> const&`."""
    dtype: np.dtype
    """Of an element."""
    holds: Literal["one", "many"]
    is_output: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """A function's declaration, taken apart."""

    text: str
    """Without the opening brace: `void relu(std::vector<double> &x)`."""
    function: str
    parameters: tuple[Parameter, ...]
    result: tuple[Parameter, ...]
    """The returned value, if any."""

    @property
    def outputs(self) -> tuple[Parameter, ...]:
        """What a call gives back, in the order in which a driver sends it."""
        return (*self.result, *(one for one in self.parameters if one.is_output))


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
    """What every rank holds before the call."""
    answered: str
    """Where the answer must be after it, on rank 0."""
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
        """What a code model is shown: includes, helpers, the task in a comment, the opened function."""
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
        numbers = "complex" in declaration or self.prelude
        headers = "#include <cmath>\n#include <complex>\n" if numbers else ""
        return (
            f'#include "server.hpp"\n{headers}'
            f"{_inline(self.prelude)}\n{_unnamed(declaration)};\n"
            "int main(int count, char **words) {\n"
            f"    return fourfold::serve(&{self.signature.function}, count, words);\n}}\n"
        )

    def tolerance(self, parameter: Parameter) -> Tolerance:
        """How close an output must be."""
        return SINGLE if parameter.dtype == np.float32 else DOUBLE

    def forbidden(self) -> frozenset[str]:
        """Nothing: the reference is in another process."""
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
    "cuda": ("Use CUDA. The kernel is launched with at least as many threads as there is work.",),
    "hip": ("Use HIP. The kernel is launched with at least as many threads as there is work.",),
}

_INCLUDES: dict[Model, tuple[str, ...]] = {
    "serial": (),
    "omp": ("omp.h",),
    "mpi": ("mpi.h",),
    "mpi+omp": ("mpi.h", "omp.h"),
    "kokkos": ("Kokkos_Core.hpp",),
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


def parse_signature(text: str, structures: Mapping[str, Sequence[str]]) -> Signature:
    """Take a declaration apart.

    Args:
        text: `double average(std::vector<double> const& x)`.
        structures: fields of structures that it names, each `type name`.

    Raises:
        ValueError: for a type that no driver can send.
    """
    found = re.fullmatch(r"\s*([\w:<>]+)\s+(\w+)\s*\((.*)\)\s*", text, re.DOTALL)
    if not found:
        raise ValueError(f"{text!r} is not a function's declaration; write `type name(parameters)`")
    returned, function, inside = found.groups()
    parameters = tuple(
        _parameter(piece.strip(), structures) for piece in re.split(r",(?![^<]*>)", inside)
    )
    result = () if returned == "void" else (_parameter(f"{returned} result", structures),)
    return Signature(
        text=text.strip(),
        function=function,
        parameters=parameters,
        result=tuple(_as_output(one) for one in result),
    )


def _as_output(one: Parameter) -> Parameter:
    return Parameter(
        name=one.name, declared=one.declared, dtype=one.dtype, holds=one.holds, is_output=True
    )


def _parameter(text: str, structures: Mapping[str, Sequence[str]]) -> Parameter:
    found = re.fullmatch(r"(.*?)\s*(&?)\s*(\w+)", text)
    assert found is not None
    declared, reference, name = found.group(1).strip(), found.group(2), found.group(3)
    bare = re.sub(r"\s*\bconst\b\s*", "", declared)
    many = re.fullmatch(r"std::(?:vector|array)<(.+?)(?:, \d+)?>", bare)
    element = many.group(1) if many else bare
    return Parameter(
        name=name,
        declared=declared + reference,
        dtype=_dtype(element, structures),
        holds="many" if many else "one",
        is_output=bool(reference) and "const" not in declared,
    )


def _dtype(element: str, structures: Mapping[str, Sequence[str]]) -> np.dtype:
    if element in structures:
        fields = [field.split() for field in structures[element]]
        return np.dtype([(name, DTYPES[kind]) for kind, name in fields], align=True)
    if element not in DTYPES:
        raise ValueError(
            f"no driver sends elements of type {element!r}; there are {', '.join(DTYPES)}"
        )
    return np.dtype(DTYPES[element])


@lru_cache(maxsize=1)
def own_problems() -> Mapping[str, Problem]:
    """Every problem of this package, by name, in order of the names."""
    folder = importlib.resources.files("fourfold_hpc_coder") / "problems"
    files = sorted(
        (file for file in folder.iterdir() if file.name.endswith(".toml")), key=lambda one: one.name
    )
    return {
        file.name.removesuffix(".toml"): read_problem(
            file.name.removesuffix(".toml"), file.read_text(encoding="utf-8")
        )
        for file in files
    }


_SHAPES = {
    "map": kernels.Map,
    "reduce": kernels.Reduce,
    "accumulate": kernels.Accumulate,
    "scan": kernels.Scan,
}


def read_problem(name: str, text: str) -> Problem:
    """A problem from its file.

    Raises:
        ValueError: where the file does not describe every parameter.
    """
    held = tomllib.loads(text)
    signature = parse_signature(held["signature"], held.get("structures", {}))
    lacking = [one.name for one in signature.parameters if one.name not in held["inputs"]]
    if lacking:
        raise ValueError(f"problem {name} has no inputs for {', '.join(lacking)}; describe them")
    fields = {key: value for key, value in held["kernel"].items() if key != "shape"}
    if "writes" in fields:
        fields["writes"] = tuple(fields["writes"])
    stored, returned = held.get("stored"), held.get("returned")
    return Problem(
        name=name,
        problem_type=re.sub(r"^\d+_(sparse_la|dense_la|[a-z]+).*", r"\1", name),
        task=held["task"],
        signature=signature,
        prelude=held.get("prelude", ""),
        kernel=_SHAPES[held["kernel"]["shape"]](**fields),
        inputs=held["inputs"],
        check_size=held["sizes"]["check"],
        timing_size=held["sizes"]["timing"],
        minimum_size=held.get("minimum", 1),
        is_power_of_two=held["sizes"].get("power_of_two", False),
        held=held["held"],
        answered=f"Store the result in {stored} on rank 0." if stored else f"Return {returned}.",
        has_kokkos=held.get("kokkos", True),
        example=held.get("example", {}),
    )


def _linked(declaration: str, function: str) -> str:
    """What must be equal for a call to reach a function: its types, however they are spelt."""
    found = re.search(rf"([\w:<> *]+?)\b{function}\s*\((.*)\)", declaration)
    if found is None:
        return ""
    types = []
    for one in (f"{found.group(1)} result", *re.split(r",(?![^<]*>)", found.group(2))):
        unnamed = re.sub(r"^(.*[\s&*>])\w+$", r"\1", one.strip())
        trailing = re.sub(r"^const\b(.*?)(&?)\s*$", r"\1 const\2", unnamed)
        # A copy may be const or not.
        types.append(re.sub(r"(?<![&*])\bconst$", "", trailing.strip()))
    return re.sub(r"\s+|\bstd::", "", ",".join(types))


def find_problem(name: str, prompt: str, model: Model) -> Problem:
    """The problem that a prompt asks for: by name, with the same parameters.

    ParEval's Kokkos prompts often have other types than ours, whose answers our drivers could not call.

    Raises:
        ValueError: where there is none, or the prompt declares the function otherwise.
    """
    problem = own_problems().get(name)
    if problem is None:
        raise ValueError(
            f"{name} is not among the {len(own_problems())} built-in problems "
            f"({', '.join([*own_problems()][:3])}, ...); outputs of other problems need their drivers"
        )
    function = problem.signature.function
    if not re.search(
        rf"\b{function}\s*\(", prompt.rstrip().splitlines()[-1] if prompt.strip() else ""
    ):
        raise ValueError(
            f"the prompt of {name} does not end by opening {function}(...); "
            f"its last line must declare {problem.signature.text}"
        )
    declared, ours = prompt.rstrip().splitlines()[-1], problem.declaration(model)
    if model not in ("cuda", "hip") and _linked(declared, function) != _linked(ours, function):
        raise ValueError(
            f"the prompt of {name} declares `{declared.strip()}`, but the built-in {model} driver calls "
            f"`{ours}`; have the built-in prompt answered, as `generate` does"
        )
    return problem
