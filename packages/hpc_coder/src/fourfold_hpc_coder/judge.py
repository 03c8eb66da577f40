"""One answer, from text to verdict: compile, launch, compare, time, and ask whether it is parallel."""

import contextlib
import math
import re
import shutil
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fourfold_hpc_coder import failures, parallelism, toolchain
from fourfold_hpc_coder.channel import Answer, Channel, EndedError, Evidence, ForgedError, opened
from fourfold_hpc_coder.evaluation import Launch, Model, Run, Sample, Verdict
from fourfold_hpc_coder.problems import Problem
from fourfold_hpc_coder.sandbox import Job, Limits, Mount, Outcome, Sandbox

LAUNCHES: dict[Model, tuple[Launch, ...]] = {
    "serial": (Launch(),),
    "omp": (Launch(), Launch(threads=2), Launch(threads=4)),
    "mpi": (Launch(), Launch(ranks=2), Launch(ranks=3)),
    "mpi+omp": (Launch(), Launch(ranks=2, threads=2)),
    "kokkos": (Launch(),),
    "cuda": (Launch(),),
    "hip": (Launch(),),
}
"""What each model's programs are run on by default; three ranks divide few sizes."""

KEPT_CHARACTERS = 4000
"""Kept of what a compiler or program wrote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What decides a verdict, beside the answer and the problem."""

    time_limit_s: float = 10.0
    """Longest that one call may take, and the processor time of a process."""
    memory_bytes: int = 1 << 30
    repetitions: int = 3
    """Timed calls, each on inputs of its own; the shortest counts, and every answer must be right."""
    races: bool = True
    """Whether OpenMP answers that are right are also checked for races."""
    launches: tuple[tuple[Model, tuple[Launch, ...]], ...] = tuple(LAUNCHES.items())
    sizes: tuple[tuple[str, int], ...] = ()
    """Timing sizes that differ from the problems' own, by name."""

    def of(self, model: Model) -> tuple[Launch, ...]:
        """The launches of a model."""
        return dict(self.launches)[model]

    def timing_size(self, problem: Problem) -> int:
        """The size on which a problem is timed."""
        return dict(self.sizes).get(problem.name, problem.timing_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What became of an answer, and why."""

    verdict: Verdict
    because: str
    """One sentence."""
    sample: Sample
    output: str
    """The end of what the compiler or the program wrote, where that explains something."""
    proof: str
    """What decided whether it is parallel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One call: its inputs and what the reference answers."""

    size: int
    arguments: tuple[np.ndarray, ...]
    expected: dict[str, np.ndarray]


class Quiet:
    """Lets any number of jobs work, or one be timed: a timing waits until nothing else runs."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._working = 0
        self._timing = False

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """While something is built or checked."""
        with self._condition:
            self._condition.wait_for(lambda: not self._timing)
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
            self._condition.notify_all()
            self._condition.wait_for(lambda: not self._timing and self._working == 0)
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
    """What the judgements of one scorer share."""

    sandbox: Sandbox
    scratch: Path
    settings: Settings
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


@dataclass(slots=True)
class Reference:
    """A problem's sequential reference at work: right answers, and T*."""

    problem: Problem
    checks: tuple[Round, ...]
    timed: tuple[Round, ...]
    best_s: float


def reference(bench: Bench, problem: Problem) -> Reference:
    """Draw the rounds of a problem and have its reference answer them.

    Raises:
        RuntimeError: where our own reference fails, which is a bug of the problem.
    """
    generator = np.random.default_rng((bench.secret, zlib.crc32(problem.name.encode())))
    sizes = problem.sizes(generator)
    timed_size = bench.settings.timing_size(problem)
    wanted = [*sizes, *[timed_size] * bench.settings.repetitions]
    inputs = [problem.arguments(size, generator) for size in wanted]
    rounds, times_s = [], []
    with bench.folder() as folder:
        text = _unit(problem.prompt("serial"), problem.answer("serial"))
        outcome = _build(bench, problem, "serial", text, folder)
        if outcome.code:
            raise RuntimeError(f"the reference of {problem.name} does not build: {outcome.stderr}")
        with bench.quiet.timing(), _launched(bench, folder, "serial", Launch()) as channel:
            try:
                channel.connect()
                for size, drawn in zip(wanted, inputs, strict=True):
                    answer = _call(channel, problem, [*drawn.values()])
                    rounds.append(
                        Round(size=size, arguments=(*drawn.values(),), expected=answer.outputs)
                    )
                    times_s.append(answer.runtime_s)
            except EndedError:
                ended = channel.process.finish()
                raise RuntimeError(
                    f"the reference of {problem.name} ended early: {ended.code} {ended.stderr}"
                ) from None
    checks = len(sizes)
    return Reference(
        problem=problem,
        checks=tuple(rounds[:checks]),
        timed=tuple(rounds[checks:]),
        best_s=min(times_s[checks:]),
    )


def judge(bench: Bench, right: Reference, model: Model, prompt: str, body: str) -> Judgement:
    """Compile an answer, run it on every launch, and say what became of it.

    Call within `bench.quiet.working()`.

    Args:
        bench: sandbox, limits, secret.
        right: the problem's reference answers.
        model: parallel model asked for.
        prompt: what the code model was shown, up to the opening brace.
        body: what it wrote.
    """
    written = parallelism.in_text(body, model)
    if not body.strip():
        return _failed("no answer", "the answer is empty", built=False)
    with bench.folder() as folder:
        outcome = _build(bench, right.problem, model, _unit(prompt, body), folder)
        if outcome.code or outcome.limit != "nothing":
            verdict, because = failures.of_build(outcome)
            return _failed(verdict, because, built=False, output=outcome.stderr)
        if not toolchain.runs_here(model):
            return replace(
                _failed("not run", "it builds; running it needs a GPU", built=True),
                proof=written.because,
            )
        judgement, evidence = _run_all(bench, right, model, folder)
    if judgement.verdict != "correct":
        if model == "omp" and bench.settings.races and _right_alone(judgement):
            return _without_races(bench, right, prompt, body, judgement)
        return judgement
    acted = parallelism.in_action(evidence, model)
    proof = written if not written.parallel else acted
    judgement = replace(
        judgement,
        proof=proof.because,
        sample=replace(judgement.sample, parallel=proof.parallel),
    )
    if not proof.parallel:
        return replace(
            judgement,
            verdict="not parallel",
            because=f"its answers are right, but {proof.because}",
        )
    if model == "omp" and bench.settings.races:
        return _without_races(bench, right, prompt, body, judgement)
    return judgement


def _failed(verdict: Verdict, because: str, *, built: bool, output: str = "") -> Judgement:
    return Judgement(
        verdict=verdict,
        because=because,
        sample=Sample(built=built, parallel=True, runs=(), best_sequential_s=math.nan),
        output=output[:KEPT_CHARACTERS],
        proof="",
    )


def _unit(prompt: str, body: str) -> str:
    """The translation unit: the body follows the brace that ends the prompt."""
    return f"{prompt}\n{body}\n"


def _build(bench: Bench, problem: Problem, model: Model, text: str, folder: Path) -> Outcome:
    source, program = folder / "in", folder / "out"
    source.mkdir()
    program.mkdir()
    suffix = "cpp" if toolchain.runs_here(model) else "cu"
    (source / f"answer.{suffix}").write_text(text, encoding="utf-8", errors="replace")
    if not toolchain.runs_here(model):
        return toolchain.compile_kernel(bench.sandbox, model, source, program)
    flavoured = toolchain.flavour(model)
    kept = toolchain.prepare(flavoured, problem.driver(model), bench.sandbox)
    return toolchain.compile_candidate(bench.sandbox, kept, source, program)


def _run_all(
    bench: Bench, right: Reference, model: Model, folder: Path
) -> tuple[Judgement, dict[Launch, Evidence]]:
    """Every launch in order, up to the first that fails."""
    runs: list[Run] = []
    evidence: dict[Launch, Evidence] = {}
    verdict, because, output = "correct", "its answers are right", ""
    for launch in bench.settings.of(model):
        found = _run_one(bench, right, model, launch, folder)
        runs.append(found.run)
        if found.verdict != "correct":
            verdict, because, output = found.verdict, found.because, found.output
            break
        evidence[launch] = found.evidence
    ran_any = any(one.valid for one in runs)
    sample = Sample(
        built=True,
        parallel=True,
        runs=tuple(runs),
        best_sequential_s=right.best_s if ran_any else math.nan,
    )
    judgement = Judgement(
        verdict=verdict,
        because=because,
        sample=sample,
        output=output[-KEPT_CHARACTERS:],
        proof="",
    )
    return judgement, evidence


_SILENT = Evidence(
    process_cpu_s=0,
    main_cpu_s=0,
    region_cpu_s=0,
    regions=0,
    team=0,
    message_cpu_s=0,
    messages=0,
    talking_ranks=0,
    ranks=1,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Launched:
    verdict: Verdict
    because: str
    output: str
    run: Run
    evidence: Evidence


def _run_one(
    bench: Bench, right: Reference, model: Model, launch: Launch, folder: Path
) -> _Launched:
    problem, size = right.problem, right.checks[-1].size
    verdict: Verdict = "correct"
    because, output, runtime_s, evidence = "", "", math.nan, _SILENT
    ran = True
    with _launched(bench, folder, model, launch) as channel:
        try:
            channel.connect()
            for one in reversed(
                right.checks
            ):  # the largest first: the smallest is the special case
                size = one.size
                answer = _call(channel, problem, one.arguments)
                verdict, because = failures.of_answer(
                    problem, answer.outputs, one.expected, launch, size
                )
                if verdict != "correct":
                    break
            else:
                with bench.quiet.timing():
                    for one in right.timed:
                        size = one.size
                        answer = _call(channel, problem, one.arguments)
                        verdict, because = failures.of_answer(
                            problem, answer.outputs, one.expected, launch, size
                        )
                        if verdict != "correct":
                            break
                        if math.isnan(runtime_s) or answer.runtime_s < runtime_s:
                            runtime_s = answer.runtime_s
                        if answer.evidence.region_cpu_s >= evidence.region_cpu_s:
                            evidence = answer.evidence
            channel.quit()
            output = channel.process.finish().stderr
        except EndedError:
            ended = channel.process.finish()
            ran = False
            verdict, because = failures.of_run(
                ended, launch, size, patience_s=bench.settings.time_limit_s
            )
            output = ended.stderr
        except ForgedError as error:
            verdict, because = "cheat", f"{error}, on {launch}"
            output = channel.process.finish().stderr
    valid = verdict == "correct"
    return _Launched(
        verdict=verdict,
        because=because,
        output=output,
        run=Run(launch=launch, ran=ran, valid=valid, runtime_s=runtime_s if valid else math.nan),
        evidence=evidence,
    )


def _call(channel: Channel, problem: Problem, arguments: Sequence[np.ndarray]) -> Answer:
    return channel.call(arguments, problem.signature.parameters, problem.signature.outputs)


@contextlib.contextmanager
def _launched(bench: Bench, folder: Path, model: Model, launch: Launch) -> Iterator[Channel]:
    with bench.folder() as own:
        job = _job(bench.settings, folder / "out", model, launch)
        with opened(bench.sandbox, job, own, patience_s=bench.settings.time_limit_s) as channel:
            yield channel


_OPEN_MPI = (
    ("OMPI_MCA_btl", "self,vader"),
    ("OMPI_MCA_btl_vader_backing_directory", "/tmp"),  # noqa: S108 - the job's own
    ("OMPI_MCA_btl_vader_single_copy_mechanism", "none"),
    ("OMPI_MCA_orte_tmpdir_base", "/tmp"),  # noqa: S108
    ("OMPI_MCA_plm_rsh_agent", "false"),
    ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
    ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
)
"""One machine, no network, no remote shell. Root is the case only where there is no sandbox."""


def _job(settings: Settings, program: Path, model: Model, launch: Launch) -> Job:
    command = ("/job/answer",)
    if model in ("mpi", "mpi+omp"):
        command = (
            "mpirun",
            "--oversubscribe",
            "--bind-to",
            "none",
            "-n",
            str(launch.ranks),
            *command,
        )
    return Job(
        command=command,
        mounts=(Mount(source=program, target="/job"),),
        limits=Limits(
            wall_s=12 * settings.time_limit_s,
            cpu_s=math.ceil(2 * settings.time_limit_s * launch.threads),
            memory_bytes=settings.memory_bytes,
            processes=64 + 4 * launch.processors,
            file_bytes=64 << 20,
        ),
        environment=(
            ("OMP_NUM_THREADS", str(launch.threads)),
            ("OMP_DYNAMIC", "false"),
            # A thread that waits by spinning looks like one that works.
            ("OMP_WAIT_POLICY", "passive"),
            *_OPEN_MPI,
        ),
    )


_RACE = re.compile(r"^fourfold-race (write|read) 0x([0-9a-f]+) 0x([0-9a-f]+)$", re.MULTILINE)


def _without_races(
    bench: Bench, right: Reference, prompt: str, body: str, judgement: Judgement
) -> Judgement:
    """The judgement, or "race" where the checker saw two threads at one address."""
    text = _unit(prompt, body)
    with bench.folder() as folder:
        source, program = folder / "in", folder / "out"
        source.mkdir()
        program.mkdir()
        (source / "answer.cpp").write_text(text, encoding="utf-8", errors="replace")
        kept = toolchain.prepare(toolchain.racing(), right.problem.driver("omp"), bench.sandbox)
        if toolchain.compile_candidate(bench.sandbox, kept, source, program).code:
            return judgement
        found = _RACE.search(_watched(bench, right, folder))
        if found is None:
            return judgement
        kind, *addresses = found.groups()
        numbers = [toolchain.source_line(bench.sandbox, program, one) for one in addresses]
        lines = [" ".join(text.splitlines()[number - 1].split()) for number in numbers if number]
        shown = " and ".join(f"`{line}`" for line in dict.fromkeys(lines))
    act = (
        "two threads write one address" if kind == "write" else "a thread reads what another writes"
    )
    where = f" in {shown}" if shown else ""
    now = (
        "its answers were right this time, but"
        if judgement.verdict == "correct"
        else "its answers vary:"
    )
    return replace(
        judgement,
        verdict="race",
        because=f"{now} {act}{where} with nothing in between",
        sample=_spoiled(judgement.sample),
    )


def _watched(bench: Bench, right: Reference, folder: Path) -> str:
    """What the checker wrote while the program answered a small input; nothing if it did not get there."""
    one = right.checks[-1]
    with _launched(bench, folder, "omp", Launch(threads=2)) as channel:
        try:
            channel.connect()
            _call(channel, right.problem, one.arguments)
            channel.quit()
        except (EndedError, ForgedError):
            return ""
        return channel.process.finish().stderr


def _right_alone(judgement: Judgement) -> bool:
    """Whether a wrong program was right on one thread: then a race is the likely reason."""
    return judgement.verdict in ("wrong", "not finite") and any(
        run.valid for run in judgement.sample.runs
    )


def _spoiled(sample: Sample) -> Sample:
    """A sample whose runs on several threads do not count."""
    runs = tuple(
        replace(run, valid=False, runtime_s=math.nan) if run.launch.processors > 1 else run
        for run in sample.runs
    )
    return replace(sample, runs=runs)
