"""The deterministic teacher's tasks: small kernels, each with words, C++ and a NumPy oracle of its own.

A task is a shape (map, reduce, count, zip, scan), an element type, and one or two elementwise steps. From
one task come a problem that the scorer can judge, its answers in every parallel model, and the sequential
program that a parallelisation starts from. The oracle is NumPy, not the C++ it judges.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from fourfold_hpc_coder.problems import kernels
from fourfold_hpc_coder.problems.problem import Problem
from fourfold_hpc_coder.problems.signature import parse_signature
from fourfold_hpc_coder.vocabulary import Model

Shape = Literal["map", "replace", "sum", "largest", "smallest", "count", "zip", "scan"]
Element = Literal["double", "int"]

Values = np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One elementwise step in words, in C++ with `@` for the value, and in NumPy."""

    words: str
    code: str
    oracle: Callable[[Values], Values]


def _steps() -> tuple[Step, ...]:
    steps = [
        Step(words="the square of {}", code="@ * @", oracle=lambda v: v * v),
        Step(words="the absolute value of {}", code="std::abs(@)", oracle=np.abs),
        Step(words="the negative of {}", code="-@", oracle=np.negative),
        Step(words="{} itself", code="@", oracle=lambda v: v),
    ]
    for c in (2, 3, 5, 7):
        steps += [
            Step(words=f"{c} times {{}}", code=f"{c} * @", oracle=lambda v, c=c: c * v),
            Step(words=f"{{}} plus {c}", code=f"@ + {c}", oracle=lambda v, c=c: v + c),
            Step(words=f"{{}} minus {c}", code=f"@ - {c}", oracle=lambda v, c=c: v - c),
            Step(
                words=f"the larger of {{}} and {c}",
                code=f"@ > {c} ? @ : {c}",
                oracle=lambda v, c=c: np.maximum(v, c),
            ),
            Step(
                words=f"the smaller of {{}} and {c}",
                code=f"@ < {c} ? @ : {c}",
                oracle=lambda v, c=c: np.minimum(v, c),
            ),
        ]
    return tuple(steps)


STEPS = _steps()

_SIGNATURES: Mapping[Shape, str] = {
    "map": "void compute(std::vector<{0}> const& x, std::vector<{0}> &y)",
    "replace": "void compute(std::vector<{0}> &x)",
    "sum": "{0} compute(std::vector<{0}> const& x)",
    "largest": "{0} compute(std::vector<{0}> const& x)",
    "smallest": "{0} compute(std::vector<{0}> const& x)",
    "count": "int compute(std::vector<{0}> const& x)",
    "zip": "void compute(std::vector<{0}> const& x, std::vector<{0}> const& y, std::vector<{0}> &z)",
    "scan": "void compute(std::vector<{0}> const& x, std::vector<{0}> &y)",
}

_WORDS: Mapping[Shape, str] = {
    "map": "Set y[i] to {step}.",
    "replace": "Replace x[i] by {step}.",
    "sum": "Return the sum of {step} over all i.",
    "largest": "Return the largest of {step} over all i.",
    "smallest": "Return the smallest of {step} over all i.",
    "count": "Count the i for which {step} is above 4.",
    "zip": "Set z[i] to y[i] plus {step}.",
    "scan": "Set y[i] to the sum of {step} over all j up to i.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One kernel of the grammar."""

    shape: Shape
    element: Element
    step: int
    """Index into `STEPS`."""

    @property
    def name(self) -> str:
        """Unique among tasks."""
        return f"{self.shape}-{self.element}-{self.step}"

    def words(self) -> str:
        """The task in a sentence."""
        place = "x[j]" if self.shape == "scan" else "x[i]"
        return _WORDS[self.shape].format(step=STEPS[self.step].words.format(place))

    def kernel(self) -> kernels.Kernel:
        """The task in the four shapes that every model can render."""
        value = re.sub("@", "x[i]", STEPS[self.step].code)
        kind, count = self.element, "x.size()"
        match self.shape:
            case "map":
                return kernels.Map(count=count, each=f"y[i] = {value};", writes=("y",), kind=kind)
            case "replace":
                return kernels.Map(count=count, each=f"x[i] = {value};", writes=("x",), kind=kind)
            case "zip":
                each = f"z[i] = y[i] + ({value});"
                return kernels.Map(count=count, each=each, writes=("z",), kind=kind)
            case "sum":
                return _reduce(kind, "+", "0", f"result += {value};")
            case "count":
                return _reduce("int", "+", "0", f"result += ({value}) > 4;")
            case "largest":
                each = f"result = std::max<{kind}>(result, {value});"
                return _reduce(kind, "max", f"std::numeric_limits<{kind}>::lowest()", each)
            case "smallest":
                each = f"result = std::min<{kind}>(result, {value});"
                return _reduce(kind, "min", f"std::numeric_limits<{kind}>::max()", each)
            case "scan":
                return kernels.Scan(
                    count=count, source=value, target="y", kind=kind, operation="+", initial="0"
                )

    def problem(self) -> Problem:
        """The task as the scorer takes it."""
        low, high = (-9, 9) if self.element == "double" else (-20, 20)
        kind = "uniform" if self.element == "double" else "integers"
        drawn = {"kind": kind, "low": low, "high": high}
        signature = parse_signature(_SIGNATURES[self.shape].format(self.element), {})
        inputs = {
            parameter.name: {"kind": "garbage"}
            if parameter.is_output and self.shape != "replace"
            else drawn
            for parameter in signature.parameters
        }
        stored = {"map": "y", "replace": "x", "zip": "z", "scan": "y"}.get(self.shape)
        return Problem(
            name=self.name,
            problem_type=self.shape,
            task=self.words(),
            signature=signature,
            prelude="",
            kernel=self.kernel(),
            inputs=inputs,
            check_size=96,
            timing_size=20_000,
            minimum_size=1,
            is_power_of_two=False,
            held="x",
            answered=f"Store the result in {stored} on rank 0."
            if stored
            else "Return it on every rank.",
            has_kokkos=True,
            example={},
        )

    def expected(self, arguments: Mapping[str, Values]) -> dict[str, Values]:
        """The outputs of a right program, computed by NumPy, in their order and types."""
        x = arguments["x"]
        values = np.asarray(STEPS[self.step].oracle(x))
        match self.shape:
            case "map":
                outputs = {"y": values}
            case "replace":
                outputs = {"x": values}
            case "zip":
                outputs = {"z": arguments["y"] + values}
            case "scan":
                outputs = {"y": np.cumsum(values)}
            case "sum":
                outputs = {"result": values.sum()}
            case "largest":
                outputs = {"result": values.max()}
            case "smallest":
                outputs = {"result": values.min()}
            case "count":
                outputs = {"result": np.count_nonzero(values > 4)}
        dtypes = {parameter.name: parameter.dtype for parameter in self.problem().signature.outputs}
        return {
            name: np.atleast_1d(np.asarray(value)).astype(dtypes[name])
            for name, value in outputs.items()
        }

    def prompt(self, model: Model) -> str:
        """A short prompt: the model, the task, the opened function."""
        named = {
            "serial": "",
            "omp": "Use OpenMP. ",
            "mpi": "Use MPI. ",
            "mpi+omp": "Use MPI and OpenMP. ",
        }
        how = named.get(model, f"Use {model}. ")
        return f"/* {how}{self.words()} */\n{self.problem().declaration(model)} {{"


def _reduce(kind: str, operation: kernels.Operation, initial: str, each: str) -> kernels.Reduce:
    return kernels.Reduce(
        count="x.size()",
        each=each,
        kind=kind,
        operation=operation,
        initial=initial,
        finish="return result;",
    )


SHAPES: tuple[Shape, ...] = get_args(Shape)
SHORT: tuple[Shape, ...] = tuple(shape for shape in SHAPES if shape != "scan")
"""Shapes whose parallel answers are a loop and a line: what a very small model can learn."""


def all_tasks(shapes: Sequence[Shape] = SHAPES) -> tuple[Task, ...]:
    """Every task of the shapes, in a fixed order."""
    elements: tuple[Element, ...] = ("double", "int")
    return tuple(
        Task(shape=shape, element=element, step=step)
        for shape, element, step in itertools.product(shapes, elements, range(len(STEPS)))
    )
