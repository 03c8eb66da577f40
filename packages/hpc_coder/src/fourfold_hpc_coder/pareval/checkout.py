"""The problems of a ParEval checkout, as exercises for our judge.

Of a checkout are used its problems' drivers (`drivers/cpp/benchmarks/TYPE/NAME/cpu.cc`, `kokkos.cc` or
`gpu.cu`, with `baseline.hpp` and `utilities.hpp`) and its `problem-sizes.json`. Its `main` is not: the
driver's functions are called by our server, in our sandbox, under our clock, and nothing that a program
prints is believed. An answer still shares its process with the check and the right answer, as ParEval wants
it; what that leaves open is closed where text allows: comparisons are made in our file, so that NaN fails
them where the right answer has none, an answer that names the checkout's right answer or redefines a word of
its driver is a cheat, the check is made on sizes of ours as well, and repeated after the timed calls. Where
we have inputs of our own for a problem, the answer is looked at a second time (`second_look.py`).
"""

import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import numpy as np

from fourfold_hpc_coder.judge.bench import ANSWER_BEGINS, Bench
from fourfold_hpc_coder.judge.protocol import Reply
from fourfold_hpc_coder.judge.reference import Reference, Round, allowed, trusted_answers
from fourfold_hpc_coder.judge.toolchain import KOKKOS, kokkos, runs_here
from fourfold_hpc_coder.pareval.files import Question
from fourfold_hpc_coder.pareval.second_look import DECLARED, HELPERS, problem_of, second_look
from fourfold_hpc_coder.problems.problem import Problem
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
_PERFORM = parse_signature("void perform(int what, size_t size, bool &check)", {})
REQUEST = replace(_PERFORM, parameters=(*_PERFORM.parameters[:2], _CHECK))
OWN_SIZE = np.uint64(0)
"""Asks for the size that a driver checks answers on by itself."""

SERVER = (
    HELPERS
    + """#include "server.hpp"
struct Context;
Context *init();
void compute(Context *), best(Context *), reset(Context *);
bool validate(Context *);
static Context *context;
static void perform(int what, std::size_t size, bool &check) {
    fourfold::size = size;
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
)

MACROS: Mapping[Model, str] = {
    "serial": "USE_SERIAL",
    "omp": "USE_OMP",
    "mpi": "USE_MPI",
    "mpi+omp": "USE_MPI_OMP",
    "kokkos": "USE_KOKKOS",
    "stdpar": "USE_SERIAL",
    "cuda": "USE_CUDA",
    "hip": "USE_HIP",
}
_DRIVERS: Mapping[Model, str] = {"kokkos": "kokkos.cc", "cuda": "gpu.cu", "hip": "gpu.cu"}
"""File of a problem's driver; `cpu.cc` for the other models."""
DEFAULT_SIZE = "(1<<18)"
"""ParEval's, for a problem that its file of sizes does not name."""

HOPELESS: Mapping[str, str] = {
    "07_fft_fft_conjugate": "its check conjugates at every level of the transform, and refuses ParEval's own "
    "fast answer",
    "48_sparse_la_sparse_axpy": "its check empties the result before the call and then wants its old size",
}
"""Problems of ParEval (at 4c9877f) that no answer passes on processors, and why."""
UNSTEADY: Mapping[str, str] = {
    "49_sparse_la_sparse_lu_decomp": "it eliminates without pivots in a sparse matrix, so that half of its "
    "own answer is NaN, and two right answers agree at the checkout's own size alone",
}
"""Problems of ParEval whose check says little, and why; they are checked on no further size."""


UNBUILT: Mapping[str, str] = {
    "39_search_xor_contains": "it gives a vector where its context wants a view",
    "48_sparse_la_sparse_axpy": "it names a variable that it has not",
}
"""Problems of ParEval (at 4c9877f) whose driver for Kokkos compiles with no answer, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckoutProblem:
    """A problem of a checkout in one parallel model: an exercise."""

    name: str
    model: Model
    size: str
    """On which it is timed, as C++ text: `(1<<18)`."""
    text: str
    """The driver, made one text, from which only the answer is missing."""
    sequential: str
    """The same for a sequential answer: another text where the model has a driver of its own."""
    second_look: Problem | None
    """Asks for the same function, by inputs of ours; None where we have none."""
    signature: Signature = REQUEST

    def unit(self, prompt: str, body: str) -> str:
        """The driver with the answer in its place, whose lines count from 1."""
        *above, opening = prompt.rstrip().split("\n")
        words = opening.lstrip().split(" ")
        # As ParEval does: otherwise the compiler may see through the timed calls.
        patched = "\n".join([*above, " ".join([words[0], "NO_INLINE", *words[1:]])])
        before, after = self.text.split(_GENERATED)
        defined = f"#define {MACROS[self.model]} 1\n#define DRIVER_PROBLEM_SIZE {self.size}\n"
        answer = f'{ANSWER_BEGINS}{patched}\n{body}\n#line 1 "driver"\n'
        return f"{defined}{DECLARED}{before}{answer}{after}"

    def alone(self, prompt: str) -> tuple["CheckoutProblem", str]:
        """The problem for a sequential answer, and its prompt.

        A driver shows at its head what it asks for. It is read where another driver's types are not its own.
        """
        problem = replace(self, model="serial", text=self.sequential)
        if self.text == self.sequential:
            return problem, prompt
        head = re.match(r"(?://.*\n)*", self.sequential)
        assert head is not None
        shown = [line.removeprefix("//").removeprefix(" ") for line in head.group().splitlines()]
        return problem, "\n".join(shown[1:])

    def own_answer(self, prompt: str) -> tuple[str, str]:
        """The prompt and a body that call the checkout's right answer; a trap where it is not known."""
        plain = re.sub(r'^#include\s*[<"](?:mpi|omp)\.h[>"]', "", prompt, flags=re.MULTILINE)
        above, _, opening = plain.rstrip().rpartition("\n")
        function = re.fullmatch(r"(.*?)\b(\w+)\s*\((.*)\)\s*\{", opening.strip())
        if function is None:
            return plain, "__builtin_trap(); }"
        returned, name, parameters = function.groups()
        named = f"correct{name[:1].upper()}{name[1:]}"
        rights = {named} & self.forbidden() or self.forbidden()
        if len(rights) != 1:
            return plain, "__builtin_trap(); }"
        [right] = rights
        names = ", ".join(re.findall(r"(\w+)\s*(?:,(?![^<]*>)|$)", parameters))
        declared = f"{returned.strip()} {right}({parameters});"
        return f"{above}\n{declared}\n{opening}", f"return {right}({names}); }}"

    def driver(self, model: Model) -> str:  # noqa: ARG002 - the protocol's
        """Our server around the driver's functions."""
        return SERVER

    def tolerance(self, parameter: Parameter) -> Tolerance:  # noqa: ARG002 - the protocol's
        """The driver compares; its check is a yes or a no."""
        return Tolerance(relative=0, absolute=0)

    def forbidden(self) -> frozenset[str]:
        """The driver's right answers."""
        return frozenset(re.findall(r"\b(correct[A-Z]\w*)\s*\(", self.text))

    def fixed(self) -> frozenset[str]:
        """The words of the driver after the answer."""
        return frozenset(re.findall(r"[A-Za-z_]\w*", self.text.partition(_GENERATED)[2]))

    def sizes(self, generator: np.random.Generator) -> tuple[np.uint64, ...]:
        """Sizes other than the driver's own to check answers on; transforms want powers of two."""
        own = re.search(r"fourfold::sized\((\d+)\)", self.text)
        if self.name in UNSTEADY or own is None or (most := int(own.group(1))) < SMALLEST_CHECK:
            return ()
        if re.search(r"\bfft\b", self.name.replace("_", " ")):
            return (np.uint64(most // 4), np.uint64(most // 2))
        odd = generator.integers(most // 4, most // 2) * 2 + 1
        even = generator.integers(most // 16, most // 8) * 2
        return (np.uint64(even), np.uint64(odd))


_GENERATED = "\x00generated\x00"
_INCLUDED = re.compile(r'^[ \t]*#include[ \t]+"([\w.-]+)".*$', re.MULTILINE)
_TEST_SIZE = re.compile(
    r"(\bsize_t\s+TEST_SIZE\s*=\s*|std::vector<[\w:<>]+>\s+\w+\()(\d+)(?=\)?\s*;)"
)
"""The size that a driver checks answers on, under a name or where an array is made."""
SMALLEST_CHECK = 32
"""Below it a driver's own size has no smaller ones that mean anything."""
_PART = r"(?:[^(),]|\([^()]*\))+?"
_DIFFERENCE = re.compile(
    rf"(?<=[(|&])(\s*)std::f?abs\(({_PART})\s+-\s+({_PART})\)\s*>\s*([\w.-]+)(?=\s*[)|&])"
)


def strict(text: str) -> str:
    """A driver's text that compares `abs(a - b) > epsilon` by our function: NaN is no right number."""
    return _DIFFERENCE.sub(r"\1fourfold::apart(\2, \3, \4)", text)


def _lacking(text: str) -> str:
    """The headers of a driver that the installed Kokkos has not, and the way out; empty for none."""
    held = kokkos()
    if held is None:  # which is said where the model is asked for
        return ""
    included = re.findall(r"^[ \t]*#include[ \t]*<(Kokkos_\w+\.hpp)>", text, re.MULTILINE)
    lacking = [name for name in dict.fromkeys(included) if not (held.headers / name).exists()]
    if not lacking:
        return ""
    return (
        f"its driver includes {', '.join(lacking)}, which Kokkos {held.version} in {held.headers} lacks; "
        f"install Kokkos 4 under /usr/local or name its prefix ({KOKKOS}=PREFIX), or score these outputs "
        "without --pareval, on the built-in problems"
    )


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
        if "{" not in question.prompt.rstrip().rpartition("\n")[2]:
            raise ValueError(f"the prompt of {name} does not end by opening a function")
        folder = self.drivers / "cpp" / "benchmarks" / problem_type / name
        file = folder / _DRIVERS.get(model, "cpu.cc")
        if not re.fullmatch(r"[\w-]+", problem_type) or not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"{problem_type}/{name} is no name of a problem")
        if not file.is_file():
            raise ValueError(f"the checkout has no {file.relative_to(self.drivers)}")
        size = self.sizes.get(name, {}).get(model, DEFAULT_SIZE)
        if not re.fullmatch(r"[\d\s()<*+-]+", size):
            raise ValueError(
                f"the size {size!r} of {name} is no constant; write one such as (1<<18)"
            )
        if model == "kokkos" and name in UNBUILT:
            raise ValueError(f"the checkout's Kokkos driver does not compile: {UNBUILT[name]}")
        text = self._whole(file)
        if model == "kokkos" and (lacking := _lacking(text)):
            raise ValueError(lacking)
        return CheckoutProblem(
            name=name,
            model=model,
            size=size,
            text=text,
            sequential=self._whole(folder / "cpu.cc") if model == "kokkos" else text,
            second_look=problem_of(question),
        )

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
        return _TEST_SIZE.sub(r"\1fourfold::sized(\2)", strict(text))


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

    generator = np.random.default_rng((bench.secret, zlib.crc32(problem.name.encode())))
    further, best_s = _of_the_checkout(bench, problem, prompt, problem.sizes(generator))

    def asked(what: np.int32, where: str, size: np.uint64, *, is_timed: bool = False) -> Round:
        return Round(
            where=where,
            arguments=(np.asarray(what), np.asarray(size), np.asarray(False)),
            expected={_CHECK.name: np.ones(1, dtype=bool)},
            moving_cpu_s=(allowed(0), allowed(0)),
            is_timed=is_timed,
        )

    validated = asked(VALIDATE, "in `validate`", OWN_SIZE)
    timed = [
        asked(RESET, "while its inputs were drawn", OWN_SIZE),
        asked(COMPUTE, f"for an input of size {problem.size}", OWN_SIZE, is_timed=True),
    ]
    checks = [asked(VALIDATE, f"in `validate` at a TEST_SIZE of {n}", n) for n in further]
    return Reference(
        exercise=problem,
        checks=(*checks, validated),
        timed=(*timed * bench.settings.repetitions, validated),
        best_s=best_s,
        again=second_look(bench, problem, problem.second_look),
    )


def _of_the_checkout(
    bench: Bench, problem: CheckoutProblem, prompt: str, sizes: Sequence[np.uint64]
) -> tuple[tuple[np.uint64, ...], float]:
    """The sizes at which the checkout's own answer passes the checkout's own check, and its shortest time.

    Raises:
        RuntimeError: where the driver does not build here, or its own answer fails.
    """
    alone, asked = problem.alone(prompt)
    text = alone.unit(*alone.own_answer(asked))

    def answers(whats: Sequence[tuple[np.int32, np.uint64]]) -> list[Reply]:
        calls = [(np.asarray(what), np.asarray(size), np.asarray(False)) for what, size in whats]
        return trusted_answers(bench, alone, text, calls)

    timed = answers([(RESET, OWN_SIZE), (BEST, OWN_SIZE)] * bench.settings.repetitions)
    try:
        checked = answers([(VALIDATE, size) for size in sizes])
    except RuntimeError:  # an answer that is not ours may want a size of its own
        checked = []
    passed = [
        size
        for size, answer in zip(sizes, checked, strict=False)
        if answer.outputs[_CHECK.name].all()
    ]
    return tuple(passed), min(answer.runtime_s for answer in timed[1::2])
