"""The bench on which answers are built and launched: settings, private folders, and quiet for timings."""

import contextlib
import math
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from fourfold_hpc_coder.judge import toolchain
from fourfold_hpc_coder.judge.artifacts import in_their_places
from fourfold_hpc_coder.judge.build import (
    compile_candidate,
    compile_kernel,
    kept_program,
    objects,
    prepare,
    starting,
)
from fourfold_hpc_coder.judge.prelude import includes_more, needs_whole, prelude
from fourfold_hpc_coder.judge.protocol import Channel, opened
from fourfold_hpc_coder.problems.problem import Problem
from fourfold_hpc_coder.problems.signature import Parameter, Signature
from fourfold_hpc_coder.sandbox.backends import Sandbox
from fourfold_hpc_coder.sandbox.job import Job, JobResult, Limits, Mount
from fourfold_hpc_coder.vocabulary import Model, Processors, Tolerance
from fourfold_parallel.common.values import formerly

ANSWER_BEGINS = '#line 1 "answer.cpp"\n'
"""The line from which an answer's lines count, in a unit that does not begin with it."""


class Exercise(Protocol):
    """A problem as the judge sees it: it makes programs of answers and says how close outputs must be."""

    @property
    def name(self) -> str:
        """As in ParEval: `55_transform_relu`."""
        ...

    @property
    def signature(self) -> Signature:
        """Of what a request calls."""
        ...

    def unit(self, prompt: str, body: str) -> str:
        """The translation unit of an answer."""
        ...

    def driver(self, model: Model) -> str:
        """Source of the program around it."""
        ...

    def tolerance(self, parameter: Parameter) -> Tolerance:
        """The tolerance of an output."""
        ...

    def forbidden(self) -> frozenset[str]:
        """Names that an answer has no business with."""
        ...

    def fixed(self) -> frozenset[str]:
        """Words of ours that follow an answer in its file, which it may not redefine."""
        ...


LAUNCHES: dict[Model, tuple[Processors, ...]] = {
    "serial": (Processors(),),
    "omp": (Processors(), Processors(threads=2), Processors(threads=4)),
    "mpi": (Processors(), Processors(ranks=2), Processors(ranks=3)),
    "mpi+omp": (Processors(), Processors(ranks=2, threads=2)),
    "kokkos": (Processors(),),
    "stdpar": (Processors(), Processors(threads=2), Processors(threads=4)),
    "cuda": (Processors(),),
    "hip": (Processors(),),
}
"""The launches of each model's programs by default; three ranks divide few sizes."""


@formerly("hpc_coder/Settings")
@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeSettings:
    """The settings that decide a verdict, beside the answer and the problem."""

    time_limit_s: float = 10.0
    """Longest that one call may take, and the processor time of a process."""
    memory_bytes: int = 1 << 30
    repetitions: int = 3
    """Timed calls, each on inputs of its own; the shortest counts, and every answer must be right."""
    races: bool = True
    """Whether OpenMP answers that are right are also checked for races."""
    launches: tuple[tuple[Model, tuple[Processors, ...]], ...] = tuple(LAUNCHES.items())
    sizes: tuple[tuple[str, int], ...] = ()
    """Timing sizes that differ from the problems' own, by name."""

    def of(self, model: Model) -> tuple[Processors, ...]:
        """The launches of a model."""
        return dict(self.launches)[model]

    def with_launches(self, chosen: Mapping[Model, tuple[Processors, ...]]) -> "JudgeSettings":
        """The same with other launches for some models."""
        launches: dict[Model, tuple[Processors, ...]] = {**dict(self.launches), **chosen}
        return replace(self, launches=tuple(launches.items()))

    def timing_size(self, problem: Problem) -> int:
        """The size on which a problem is timed."""
        return dict(self.sizes).get(problem.name, problem.timing_size)


class Quiet:
    """Lets any number of jobs work, or one be timed: a timing waits until nothing else runs."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._working = 0
        self._wanted = 0
        self._timing = False

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """While something is built or checked; waits for those who wait to be timed."""
        with self._condition:
            self._condition.wait_for(lambda: not self._timing and not self._wanted)
            self._working += 1
        try:
            yield
        finally:
            self._leave()

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        """From within `working`: alone on the machine, as far as this scorer goes."""
        with self._condition:
            self._working -= 1
            self._wanted += 1
            self._condition.notify_all()
            self._condition.wait_for(lambda: not self._timing and self._working == 0)
            self._wanted -= 1
            self._timing = True
        try:
            yield
        finally:
            with self._condition:
                self._timing = False
                self._working += 1
                self._condition.notify_all()

    def _leave(self) -> None:
        with self._condition:
            self._working -= 1
            self._condition.notify_all()


@dataclass(slots=True)
class Bench:
    """The things that the judgements of one scorer share."""

    sandbox: Sandbox
    scratch: Path
    settings: JudgeSettings
    secret: int
    """Decides sizes and inputs; unknown to the candidates."""
    quiet: Quiet = field(default_factory=Quiet)
    _count: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """A private folder, gone after the block."""
        with self._lock:
            self._count += 1
            number = self._count
        path = self.scratch / f"job-{number}"
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def precompile(bench: Bench, model: Model, texts: Sequence[str], *, second_pass: bool) -> None:
    """Make the preludes that a model's answers need, unless they are in the cache.

    Args:
        bench: where.
        model: of the answers.
        texts: the answers' translation units.
        second_pass: whether to precompile the full prelude too, for the answers that the short one cannot
            serve; finding them takes the short one, which the first pass makes.

    Raises:
        RuntimeError: where our own source does not compile.
    """
    flavour = toolchain.flavour_of(model)
    with bench.quiet.working():
        if second_pass:
            needed = {needs_whole(flavour, text, bench.sandbox) for text in texts}
        else:
            needed = {includes_more(flavour, text) for text in texts}
        for whole in sorted(needed):
            prelude(flavour, whole=whole).make(bench.sandbox)


def ready(bench: Bench, model: Model) -> None:
    """Compile what lies beneath all answers in a model, unless it is in the cache.

    Raises:
        RuntimeError: where our own source does not compile.
    """
    flavours = [toolchain.flavour_of(model)]
    if model == "omp" and bench.settings.races:
        flavours.append(toolchain.racing())
    for flavour in flavours:
        with bench.quiet.working():
            objects(flavour, "", bench.sandbox)


def built(
    bench: Bench,
    exercise: Exercise,
    model: Model,
    text: str,
    folder: Path,
    *,
    watched: bool = False,
    is_kept: bool = False,
) -> JobResult:
    """Compile a translation unit; the program is in the folder's `out`.

    Args:
        bench: where and how.
        exercise: gives the driver.
        model: of the answer.
        text: the unit.
        folder: private and empty.
        watched: whether the program reports its memory accesses (OpenMP).
        is_kept: whether the program is kept in the cache and taken from there: for units of ours alone.
    """
    source, program = folder / "in", folder / "out"
    source.mkdir()
    program.mkdir()
    suffix = "cpp" if toolchain.runs_here(model) else "cu"
    (source / f"answer.{suffix}").write_text(text, encoding="utf-8", errors="replace")
    with bench.quiet.working():
        if not toolchain.runs_here(model):
            return compile_kernel(bench.sandbox, model, source, program)
        flavour = toolchain.racing() if watched else toolchain.flavour_of(model)
        inputs = prepare(flavour, exercise.driver(model), text, bench.sandbox)
        if is_kept:
            return kept_program(bench.sandbox, inputs, text, source, program)
        return compile_candidate(bench.sandbox, inputs, source, program)


@contextlib.contextmanager
def launched(
    bench: Bench, folder: Path, model: Model, processors: Processors, *, settings: JudgeSettings
) -> Iterator[Channel]:
    """Start the program in the folder's `out`; on leaving the block it is gone.

    Within, the bench counts as working: ask it for quiet around what is timed.
    """
    with bench.folder() as own, bench.quiet.working():
        job = _job(settings, bench.sandbox, folder / "out", model, processors)
        with opened(bench.sandbox, job, own, patience_s=settings.time_limit_s) as channel:
            yield channel


_OPEN_MPI = (
    ("OMPI_MCA_pml", "ob1"),
    ("OMPI_MCA_mpi_yield_when_idle", "1"),
    ("OMPI_MCA_btl", "self,vader"),
    ("OMPI_MCA_btl_vader_backing_directory", "/tmp"),  # noqa: S108 - the job's own
    ("OMPI_MCA_btl_vader_single_copy_mechanism", "none"),
    ("OMPI_MCA_orte_tmpdir_base", "/tmp"),  # noqa: S108
    # Its own handler of a crash asks for memory, and waits forever where the crash was in `free`.
    ("OMPI_MCA_opal_signal", ""),
    ("OMPI_MCA_plm_rsh_agent", "false"),
    ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
    ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
)
"""One machine, no network, no remote shell. Root is the case only where there is no sandbox."""


def _job(
    settings: JudgeSettings,
    sandbox: Sandbox,
    program: Path,
    model: Model,
    processors: Processors,
) -> Job:
    command, mounts = ("/job/answer", "/channel/"), [Mount(source=program, target="/job")]
    mounts += in_their_places(toolchain.flavour_of(model).given)
    if model in ("mpi", "mpi+omp"):
        ranks = str(processors.ranks)
        if toolchain.lacks_sockets(sandbox):
            starter, library = starting(sandbox)
            command = ("/starter/start", ranks, "/library/pmi.so", *command)
            mounts += [
                Mount(source=starter, target="/starter"),
                Mount(source=library, target="/library"),
            ]
        else:
            command = ("mpirun", "--oversubscribe", "--bind-to", "none", "-n", ranks, *command)
    return Job(
        command=command,
        mounts=(*mounts,),
        limits=Limits(
            wall_s=12 * settings.time_limit_s,
            cpu_s=math.ceil(2 * settings.time_limit_s * processors.threads),
            memory_bytes=settings.memory_bytes,
            processes=64 + 4 * processors.count,
            file_bytes=64 << 20,
        ),
        environment=(
            ("OMP_NUM_THREADS", str(processors.threads)),
            ("OMP_DYNAMIC", "false"),
            # A thread that waits by spinning looks like one that works.
            ("OMP_WAIT_POLICY", "passive"),
            # As it is by default; Kokkos wants it said.
            ("OMP_PROC_BIND", "false"),
            *_OPEN_MPI,
        ),
    )
