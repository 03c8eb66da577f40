"""The words of this package: what a code model is asked, what its programs do, and what is said of them."""

from dataclasses import dataclass
from typing import Literal, cast, get_args

from fourfold_parallel.common.values import formerly

Model = Literal["serial", "omp", "mpi", "mpi+omp", "kokkos", "stdpar", "cuda", "hip"]
"""A parallel programming model, in ParEval's words (`parallelism_model`); `stdpar`, which ParEval has not, is
C++'s own: algorithms of the standard library with a parallel policy."""
MODELS: tuple[Model, ...] = get_args(Model)


def chosen_models(text: str) -> tuple[Model, ...]:
    """The parallel models that a list names.

    Raises:
        ValueError: for a name that is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in MODELS]
    if unknown or not names:
        raise ValueError(
            f"--models {text}: {', '.join(unknown) or 'nothing'} is no model; "
            f"there are {', '.join(MODELS)}"
        )
    return tuple(cast("Model", name) for name in names)


Verdict = Literal[
    "correct",
    "not parallel",
    "race",
    "wrong",
    "not finite",
    "crash",
    "timeout",
    "cheat",
    "no answer",
    "no build",
    "compiled, not run",
]
"""The judge's word on a sample. Only "correct" counts; the others say why not:

`not parallel`: right, but does not use the model asked for. `race`: right in every run that was seen, but
two threads touch one address, at least one to write, with nothing in between. `wrong`: another answer than
the reference's. `not finite`: NaN or infinity where the reference is finite. `crash`: a signal, an uncaught
exception, an exit before the answer or a bad one after the last. `timeout`: the time or processor limit.
`cheat`: it wrote on the result channel, or names what is the judge's. `no answer`: nothing to compile. `no
build`: the compiler or linker refused. `compiled, not run`: what it needs to run is not on this machine.
"""


@formerly("hpc_coder/Launch")
@dataclass(frozen=True, slots=True, kw_only=True)
class Processors:
    """On how much of the machine a program is run."""

    ranks: int = 1
    threads: int = 1
    """Threads per rank."""

    @property
    def count(self) -> int:
        """N of speedup_n: ranks times threads."""
        return self.ranks * self.threads

    def __str__(self) -> str:
        """As in a sentence: `2 threads`, `4 ranks`, `4 ranks of 2 threads`."""
        ranks = f"{self.ranks} rank{'s' * (self.ranks != 1)}"
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        if self.ranks == 1:
            return threads
        return ranks if self.threads == 1 else f"{ranks} of {threads}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """One launch of a sample's program."""

    processors: Processors
    ran: bool
    """Whether it came to its end by itself."""
    valid: bool
    """Whether every answer it gave equals the reference's."""
    runtime_s: float
    """Time of one call on the timing input, NaN where it was not timed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One answer of a model to one prompt, as far as the metrics need it."""

    built: bool
    parallel: bool
    """Whether it really uses the model it was asked for; always true of a serial prompt."""
    runs: tuple[Execution, ...]
    best_sequential_s: float
    """T*: time of the best sequential program on the same input, NaN where unknown."""

    @property
    def right(self) -> bool:
        """Built, and every run ended with the right answer."""
        return self.built and bool(self.runs) and all(run.ran and run.valid for run in self.runs)

    @property
    def counts(self) -> bool:
        """Right, and parallel as asked."""
        return self.right and self.parallel


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A function asked for in one parallel model, and the samples that a code model gave."""

    name: str
    problem_type: str
    model: Model
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """The distance that a floating-point answer may have from the reference's; integers must be equal."""

    relative: float
    absolute: float
