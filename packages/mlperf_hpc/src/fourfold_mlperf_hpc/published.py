"""The 135 public runs of MLPerf HPC v0.7, which the paper analyses: their facts come with the package.

`measured/v0.7.jsonl` holds times and qualities as the logs have them (`logs.py` makes it from a checkout).
Whether a run met its target is read from its evaluations: two that say "success" did not.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fourfold_mlperf_hpc.decomposition import Attempt, counted, score_s

FACTS = Path(__file__).with_name("measured") / "v0.7.jsonl"
MINUTE_S = 60.0
NAMES: Mapping[str, str] = MappingProxyType(
    {
        "corigpu_n64_tf1.15.0": "Cori GPU 64",
        "corigpu_n64_pt1.6.0": "Cori GPU 64",
        "halv100_n16_tf1.15.0": "HAL V100 64",
        "frontera_rtx_n16_tf1.15.2_lbs1": "Frontera RTX 64",
        "daint_gpu_n128_tf2.2.0": "Piz Daint 128",
        "daint_gpu_n256_tf2.2.0": "Piz Daint 256",
        "fugaku_512xA64FX_tensorflow_closed": "Fugaku 512",
        "fugaku_8192xA64FX_tensorflow_closed": "Fugaku 8,192",
        "fugaku_16384xA64FX_tensorflow_open": "Fugaku 16,384",
        "abci_512xV100_tensorflow_closed": "ABCI 512",
        "abci_2048xV100_tensorflow_open": "ABCI 2,048",
        "abci_1024xV100_pytorch_closed": "ABCI 1,024",
        "abci_1024xV100_fjpytorch_open": "ABCI 1,024",
        "coriknl_n512_tf1.15.2": "Cori KNL 512",
        "coriknl_n1024_tf1.15.2": "Cori KNL 1,024",
    }
)
"""Systems by folder, with the devices that they used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The quality of a benchmark: an error at most, or an accuracy at least."""

    value: float
    is_error: bool

    def is_met(self, quality: float) -> bool:
        """Whether an evaluation is as good."""
        return quality <= self.value if self.is_error else quality >= self.value


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "cosmoflow": Target(value=0.124, is_error=True),
        "deepcam": Target(value=0.82, is_error=False),
    }
)
"""Mean absolute error of cosmological parameters, and intersection over union (the round's rules)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedRun:
    """One log: spans are seconds from the run's start, as (start, stop)."""

    log: str
    status: str
    """As the log says: "success", "" where it says nothing, "unfinished" where it ends before."""
    division_in_log: str
    batch: int
    train_samples: int
    steps: int
    """Optimizer steps done, where the log counts them; else 0."""
    elapsed_s: float
    """Until the run's stop; where the log ends before, until its last line."""
    staging: tuple[tuple[float, float], ...]
    epochs_begun: int
    epochs: tuple[tuple[float, float], ...]
    evaluations: tuple[tuple[float, float], ...]
    saves: tuple[tuple[float, float], ...]
    qualities: tuple[float, ...]
    """Of the evaluations, in order."""

    @property
    def is_finished(self) -> bool:
        """Whether the log has the run's stop."""
        return self.status != "unfinished"

    @property
    def epoch_s(self) -> float:
        """The median epoch, evaluations in it included."""
        return statistics.median(stop - start for start, stop in self.epochs)

    @property
    def before_s(self) -> float:
        """From the run's start to its first epoch, staging included."""
        return self.epochs[0][0]

    @property
    def staging_s(self) -> float:
        """Seconds of staging within the run; 0 where the log has none."""
        return _length(self.staging)

    @property
    def evaluation_s(self) -> float:
        """Seconds in evaluations."""
        return _length(self.evaluations)

    @property
    def samples(self) -> float:
        """Learnt from: steps times batch where steps are counted, else epochs."""
        return float(
            self.steps * self.batch if self.steps else self.epochs_begun * self.train_samples
        )

    def attempt(self, target: Target) -> Attempt:
        """As an attempt at a quality; what communication and data took is within compute."""
        aside = _overlap(self.evaluations, self.epochs) + _overlap(self.saves, self.epochs)
        training_s = _length(self.epochs) - aside
        beside_s = training_s + self.staging_s + self.evaluation_s + _length(self.saves)
        return Attempt(
            samples=self.samples,
            is_reached=self.is_finished and any(map(target.is_met, self.qualities)),
            seconds={
                "staging": self.staging_s,
                "compute": training_s,
                "evaluation": self.evaluation_s,
                "checkpoint": _length(self.saves),
                "rest": self.elapsed_s - beside_s,
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """The runs of one system at one benchmark."""

    system: str
    folder: str
    benchmark: str
    division: str
    """As the system's description says; one submission's logs say another."""
    nodes: int
    devices: int
    device: str
    runs: tuple[LoggedRun, ...]

    @property
    def title(self) -> str:
        """As tables and figures name it."""
        return f"{self.system}{' open' if self.division == 'open' else ''}"

    @property
    def batch(self) -> int:
        """Samples a step."""
        return self.runs[0].batch

    @property
    def target(self) -> Target:
        """The quality that ends a run."""
        return TARGETS[self.benchmark]

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """The runs as attempts."""
        return tuple(run.attempt(self.target) for run in self.runs)

    @property
    def finished(self) -> tuple[LoggedRun, ...]:
        """The runs whose log has their stop."""
        return tuple(run for run in self.runs if run.is_finished)

    @property
    def misses(self) -> int:
        """Runs without an evaluation that met the target."""
        return sum(not attempt.is_reached for attempt in self.attempts)

    @property
    def score_min(self) -> float:
        """The score of the rules, in minutes."""
        return score_s(self.attempts) / MINUTE_S

    @property
    def counted(self) -> tuple[Attempt, ...]:
        """The attempts that the rules count; their mean time is the score."""
        return counted(self.attempts)

    def mean_min(self, seconds: Sequence[float]) -> float:
        """Minutes, as a mean over runs."""
        return statistics.fmean(seconds) / MINUTE_S


def read_round(path: Path = FACTS) -> tuple[Submission, ...]:
    """The submissions of a facts file, as `extract` writes it; by default of the one in the package.

    Raises:
        ValueError: The file is another one.
    """
    text = path.read_text(encoding="utf-8")
    if not text.startswith('{"kind":"source"'):
        raise ValueError(f"{path} holds no facts of logs; make it with: extract FOLDER")
    lines = [json.loads(line) for line in text.splitlines()]
    groups: list[tuple[dict[str, Any], list[LoggedRun]]] = []
    for line in lines[1:]:
        if line["kind"] == "submission":
            groups.append((line, []))
        else:
            groups[-1][1].append(_run(line))
    return tuple(_submission(facts, runs) for facts, runs in groups)


@cache
def submissions() -> tuple[Submission, ...]:
    """The 15 submissions of v0.7, CosmoFlow first, closed before open, by devices."""
    return tuple(
        sorted(
            read_round(),
            key=lambda submission: (submission.benchmark, submission.division, submission.devices),
        )
    )


def submission_of(system: str, benchmark: str = "cosmoflow", division: str = "") -> Submission:
    """A submission by the name of its system (`NAMES`), such as "ABCI 512".

    Raises:
        ValueError: There is none.
    """
    for submission in submissions():
        if (submission.system, submission.benchmark) == (system, benchmark) and (
            division in ("", submission.division)
        ):
            return submission
    titles = ", ".join(f"{known.title} ({known.benchmark})" for known in submissions())
    raise ValueError(f"no {benchmark} run of {system!r}; there are {titles}")


def _submission(facts: Mapping[str, Any], runs: Sequence[LoggedRun]) -> Submission:
    folder = str(facts["folder"])
    accelerators = int(facts["accelerators_per_node"])
    return Submission(
        system=NAMES.get(folder.split("/")[-2], folder.split("/")[-2]),
        folder=folder,
        benchmark=facts["benchmark"],
        division=facts["division"],
        nodes=facts["nodes"],
        devices=facts["nodes"] * max(1, accelerators),
        device=facts["device"],
        runs=tuple(runs),
    )


def _run(facts: Mapping[str, Any]) -> LoggedRun:
    stop_ms = facts["stop_ms"]
    return LoggedRun(
        log=facts["log"],
        status="unfinished" if stop_ms is None else facts["status"] or "",
        division_in_log=facts["division_in_log"],
        batch=facts["batch"],
        train_samples=facts["train_samples"],
        steps=facts["steps"] or 0,
        elapsed_s=(facts["last_ms"] if stop_ms is None else stop_ms) / 1000,
        staging=_spans(facts["staging_ms"]),
        epochs_begun=facts["epochs_begun"],
        epochs=_spans(facts["epochs_ms"]),
        evaluations=_spans(facts["evaluations_ms"]),
        saves=_spans(facts["saves_ms"]),
        qualities=tuple(facts["qualities"]),
    )


def _spans(pairs: Sequence[Sequence[int]]) -> tuple[tuple[float, float], ...]:
    """(start, stop) in seconds from pauses and lengths."""
    spans, end = [], 0
    for pause, length in pairs:
        start, end = end + pause, end + pause + length
        spans.append((start / 1000, end / 1000))
    return tuple(spans)


def _length(spans: Sequence[tuple[float, float]]) -> float:
    return sum(stop - start for start, stop in spans)


def _overlap(spans: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]]) -> float:
    """Seconds that lie in both."""
    return sum(
        max(0.0, min(stop, until) - max(start, since))
        for start, stop in spans
        for since, until in others
    )
