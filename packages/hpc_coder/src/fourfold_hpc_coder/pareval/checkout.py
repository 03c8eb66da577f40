"""The problems of a ParEval checkout, as exercises for our judge.

Of a checkout are used its problems' drivers (`drivers/cpp/benchmarks/TYPE/NAME/cpu.cc` or `gpu.cu`, with
`baseline.hpp` and `utilities.hpp`) and its `problem-sizes.json`. Its `main` is not: the driver's functions
are called by our server, in our sandbox, under our clock, and nothing that a program prints is
believed. An answer still shares its process with the check and the right answer, as ParEval wants it; what
that leaves open is closed where text allows: comparisons are turned round so that NaN fails them, an answer
that names the checkout's right answer is a cheat, and the check is repeated after the timed calls.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import numpy as np

from fourfold_hpc_coder.judge.bench import ANSWER_BEGINS, Bench
from fourfold_hpc_coder.judge.reference import Reference, Round, allowed, trusted_answers
from fourfold_hpc_coder.judge.toolchain import runs_here
from fourfold_hpc_coder.pareval.files import Question
from fourfold_hpc_coder.problems.signature import Parameter, Signature, parse_signature
from fourfold_hpc_coder.vocabulary import Model, Tolerance

VALIDATE, COMPUTE, BEST, RESET = map(np.int32, range(4))
"""The four things that a request asks of a driver."""
_CHECK = Parameter(
    name="the checkout's own check",
    declared="bool&",
    dtype=np.dtype("?"),
    holds="one",
    is_output=True,
)
_PERFORM = parse_signature("void perform(int what, bool &check)", {})
REQUEST = replace(_PERFORM, parameters=(_PERFORM.parameters[0], _CHECK))

SERVER = """#include "server.hpp"
struct Context;
Context *init();
void compute(Context *), best(Context *), reset(Context *);
bool validate(Context *);
static Context *context;
static void perform(int what, bool &check) {
    if (!context) context = init();
    check = true;
    switch (what) {
    case 0: check = validate(context); break;
    case 1: compute(context); break;
    case 2: best(context); break;
    case 3: reset(context); break;
    }
}
int main(int count, char **words) { return fourfold::serve(&perform, count, words); }
"""

MACROS: Mapping[Model, str] = {
    "serial": "USE_SERIAL",
    "omp": "USE_OMP",
    "mpi": "USE_MPI",
    "mpi+omp": "USE_MPI_OMP",
    "cuda": "USE_CUDA",
    "hip": "USE_HIP",
}
DEFAULT_SIZE = "(1<<18)"
"""ParEval's, for a problem that its file of sizes does not name."""

HOPELESS: Mapping[str, str] = {
    "07_fft_fft_conjugate": "its check conjugates at every level of the transform, and refuses ParEval's own "
    "fast answer",
    "48_sparse_la_sparse_axpy": "its check empties the result before the call and then wants its old size",
}
"""Problems of ParEval (at 4c9877f) that no answer passes on processors, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckoutProblem:
    """A problem of a checkout in one parallel model: an exercise."""

    name: str
    model: Model
    size: str
    """On which it is timed, as C++ text: `(1<<18)`."""
    text: str
    """The driver, made one text, from which only the answer is missing."""
    signature: Signature = REQUEST

    def unit(self, prompt: str, body: str) -> str:
        """The driver with the answer in its place, whose lines count from 1."""
        *above, opening = prompt.rstrip().splitlines()
        words = opening.lstrip().split(" ")
        # As ParEval does: otherwise the compiler may see through the timed calls.
        patched = "\n".join([*above, " ".join([words[0], "NO_INLINE", *words[1:]])])
        before, after = self.text.split(_GENERATED)
        defined = f"#define {MACROS[self.model]} 1\n#define DRIVER_PROBLEM_SIZE {self.size}\n"
        answer = f'{ANSWER_BEGINS}{patched}\n{body}\n#line 1 "driver"\n'
        return f"{defined}{before}{answer}{after}"

    def driver(self, model: Model) -> str:  # noqa: ARG002 - the protocol's
        """Our server around the driver's functions."""
        return SERVER

    def tolerance(self, parameter: Parameter) -> Tolerance:  # noqa: ARG002 - the protocol's
        """The driver compares; its check is a yes or a no."""
        return Tolerance(relative=0, absolute=0)

    def forbidden(self) -> frozenset[str]:
        """The driver's right answers."""
        return frozenset(re.findall(r"\b(correct[A-Z]\w*)\s*\(", self.text))


_GENERATED = "\x00generated\x00"
_INCLUDED = re.compile(r'^[ \t]*#include[ \t]+"([\w.-]+)".*$', re.MULTILINE)
_GREATER = re.compile(
    r"(?<=[(|&])(\s*)(std::f?abs\((?:[^()]|\([^()]*\))*\))\s*>\s*([\w.-]+)(?=\s*[)|&])"
)


def strict(text: str) -> str:
    """C++ text whose comparisons `abs(a - b) > epsilon` are turned round, so that NaN fails them."""
    return _GREATER.sub(r"\1!(\2 <= \3)", text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkout:
    """A ParEval checkout's folder `drivers`, and the sizes that its problems are timed on."""

    drivers: Path
    sizes: Mapping[str, Mapping[str, str]]

    def find(self, question: Question) -> CheckoutProblem:
        """The problem of a question, in the question's model.

        Raises:
            ValueError: where the checkout lacks it, or the model's drivers need what is not supported.
        """
        name, problem_type, model = question.name, question.problem_type, question.model
        if model not in MACROS:
            raise ValueError(
                f"ParEval's {model} drivers include Kokkos_StdAlgorithms.hpp and more that the Kokkos 3.4 of "
                "Debian's libtrilinos-kokkos-dev lacks; score these outputs without --pareval, on the "
                "built-in problems"
            )
        if "{" not in (question.prompt.rstrip().splitlines() or [""])[-1]:
            raise ValueError(f"the prompt of {name} does not end by opening a function")
        folder = self.drivers / "cpp" / "benchmarks" / problem_type / name
        file = folder / ("gpu.cu" if model in ("cuda", "hip") else "cpu.cc")
        if not re.fullmatch(r"[\w-]+", problem_type) or not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"{problem_type}/{name} is no name of a problem")
        if not file.is_file():
            raise ValueError(f"the checkout has no {file.relative_to(self.drivers)}")
        size = self.sizes.get(name, {}).get(model, DEFAULT_SIZE)
        if not re.fullmatch(r"[\d\s()<*+-]+", size):
            raise ValueError(
                f"the size {size!r} of {name} is no constant; write one such as (1<<18)"
            )
        return CheckoutProblem(name=name, model=model, size=size, text=self._whole(file))

    def _whole(self, file: Path) -> str:
        """A driver with the checkout's own headers put where they are included."""

        def included(include: re.Match[str]) -> str:
            name = include.group(1)
            if name.startswith("generated-code"):
                return _GENERATED
            for folder in (file.parent, self.drivers / "cpp"):
                if (folder / name).is_file():
                    text = (folder / name).read_text(encoding="utf-8")
                    return _INCLUDED.sub(included, text.replace("#pragma once", ""))
            raise ValueError(f"{file} includes {name}, which the checkout has not")

        text = _INCLUDED.sub(included, file.read_text(encoding="utf-8"))
        if text.count(_GENERATED) != 1:
            raise ValueError(f"{file} does not include the generated code once; is this ParEval?")
        return strict(text)


def open_checkout(path: str | PathLike[str], sizes: str | PathLike[str] | None = None) -> Checkout:
    """Find the drivers of a checkout.

    Args:
        path: the checkout.
        sizes: another file in the format of its `drivers/problem-sizes.json`.

    Raises:
        ValueError: where something that is needed is not there.
    """
    drivers = Path(path) / "drivers"
    for needed in (drivers / "cpp" / "benchmarks", drivers / "cpp" / "utilities.hpp"):
        if not needed.exists():
            raise ValueError(
                f"--pareval {path}: no {needed.relative_to(Path(path))}; name ParEval's checkout"
            )
    file = Path(sizes) if sizes else drivers / "problem-sizes.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        by_problem = {
            str(name): {str(model): str(size) for model, size in of_model.items()}
            for name, of_model in content.items()
        }
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{file} holds no sizes by problem and model ({error})") from None
    return Checkout(drivers=drivers, sizes=by_problem)


def checkout_reference(bench: Bench, problem: CheckoutProblem, prompt: str) -> Reference:
    """Time the checkout's own sequential answer, and lay down the rounds of an answer.

    Raises:
        RuntimeError: where the driver does not build here, or its own answer fails.
    """
    if not runs_here(problem.model):
        return Reference(exercise=problem, checks=(), timed=(), best_s=math.nan)

    def asked(what: np.int32, where: str, *, is_timed: bool = False) -> Round:
        return Round(
            where=where,
            arguments=(np.asarray(what), np.asarray(False)),
            expected={_CHECK.name: np.ones(1, dtype=bool)},
            moving_cpu_s=(allowed(0), allowed(0)),
            is_timed=is_timed,
        )

    validated = asked(VALIDATE, "in `validate`")
    timed = [
        asked(RESET, "while its inputs were drawn"),
        asked(COMPUTE, f"for an input of size {problem.size}", is_timed=True),
    ]
    alone = replace(problem, model="serial")
    calls = [
        (np.asarray(what), np.asarray(False))
        for _ in range(bench.settings.repetitions)
        for what in (RESET, BEST)
    ]
    plain = re.sub(r'^#include\s*[<"](?:mpi|omp)\.h[>"]', "", prompt, flags=re.MULTILINE)
    answers = trusted_answers(bench, alone, alone.unit(plain, "__builtin_trap(); }"), calls)
    return Reference(
        exercise=problem,
        checks=(validated,),
        timed=(*timed * bench.settings.repetitions, validated),
        best_s=min(answer.runtime_s for answer in answers[1::2]),
    )
