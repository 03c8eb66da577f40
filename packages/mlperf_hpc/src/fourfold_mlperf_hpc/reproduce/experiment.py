"""The reproduction: the public logs taken apart, and trainings of ours to three targets."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from fourfold_mlperf_hpc.decomposition import expected, factors
from fourfold_mlperf_hpc.published import FACTS, LoggedRun, Submission, submissions
from fourfold_mlperf_hpc.reproduce.claims import CLAIMS
from fourfold_mlperf_hpc.reproduce.measures import headline, pairs
from fourfold_mlperf_hpc.reproduce.ranks import train_on_ranks
from fourfold_mlperf_hpc.reproduce.recipes import (
    ON_TWO_RANKS,
    SIZES,
    PublishedRound,
    Rooflines,
    StagingShare,
    TimeToQuality,
    rooflines,
    staging_share,
    to_quality,
)
from fourfold_mlperf_hpc.reproduce.tables import TABLES
from fourfold_mlperf_hpc.trainings import attempt_of
from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.records import RecordWriter, read_record
from fourfold_parallel.reproduce.experiment import Drawing, Experiment, Stage, Workplace
from fourfold_parallel.reproduce.launches import Launch
from fourfold_parallel.reproduce.scale import Scale
from fourfold_parallel.run.recipe import Steps
from fourfold_parallel.run.timeline import seconds_by_part
from fourfold_parallel.run.train import train
from fourfold_parallel.testing.ranks import close_ranks, run_on_ranks


def take_round_apart(study: PublishedRound, workplace: Workplace) -> None:
    """The public systems and pairs of them; events "system", "runs" and "pair"."""
    with workplace.recording(study, seed=0) as records:
        for submission in submissions():
            _tell_system(records, submission)
        for what, a, b in pairs():
            parts = factors(expected(a.counted), expected(b.counted))
            records.write(
                "pair", a=a.title, b=b.title, benchmark=a.benchmark, between=what,
                a_min=round(a.score_min, 4), b_min=round(b.score_min, 4), whole=parts.whole,
                convergence=parts.convergence, compute=parts.compute, overhead=parts.overhead,
                by_part=dict(parts.by_part),
            )  # fmt: skip


def _tell_system(records: RecordWriter, submission: Submission) -> None:
    runs = submission.finished
    epochs = [run.epochs_begun for run in runs]

    def minutes(seconds: Sequence[float]) -> float:
        return round(submission.mean_min(seconds), 4)

    records.write(
        "system", system=submission.title, benchmark=submission.benchmark,
        division=submission.division, devices=submission.devices, batch=submission.batch,
        runs=len(submission.runs), misses=submission.misses,
        says_success_and_missed=sum(map(partial(_boasts, submission), submission.runs)),
        score_min=round(submission.score_min, 4),
        staging_min=minutes([run.staging_s for run in runs]),
        before_min=minutes([run.before_s for run in runs]),
        epochs=round(statistics.fmean(epochs), 3), epochs_sd=round(statistics.stdev(epochs), 3),
        epoch_min=minutes([run.epoch_s for run in runs]),
        evaluation_min=minutes([run.evaluation_s for run in runs]),
        epochs_by_run=[run.epochs_begun for run in submission.runs],
        epoch_s_by_run=[round(run.epoch_s, 4) for run in runs],
        staging_share_by_run=[round(run.staging_s / run.elapsed_s, 6) for run in runs],
        seconds={part: round(s, 3) for part, s in expected(submission.counted).seconds.items()},
    )  # fmt: skip


def _boasts(submission: Submission, run: LoggedRun) -> bool:
    """Whether a run says that it succeeded, and no evaluation met the target."""
    return run.status == "success" and not run.attempt(submission.target).is_reached


def train_to_quality(study: TimeToQuality, workplace: Workplace) -> None:
    """A run a seed; events "attempt" by seed and target, "curve" by seed."""
    torch.set_num_threads(1)
    for seed in study.seeds:
        workplace.progress(study.seeds.index(seed), len(study.seeds), f"seed {seed}")
        run, place = study.run_of(seed), workplace.scratch / f"seed{seed}"
        record = place / "record.jsonl"
        # A run that was trained to its end is not opened again, which would cost it a second staging.
        if record.exists() and read_record(record).of("trained"):
            continue
        run.data.open(
            sequence=run.sequence, seed=seed
        )  # what is tokenized once is no seed's staging
        if study.ranks == 1:
            train(run, record=record, checkpoints=place / "checkpoints", progress=silent)
        else:
            how = {"run": run, "record": record, "checkpoints": place / "checkpoints"}
            run_on_ranks(study.ranks, train_on_ranks, **how)
    if study.ranks > 1:
        close_ranks(study.ranks)
    materials = study.run.data.open(sequence=study.run.sequence, seed=0).file.materials
    with workplace.recording(study, seed=study.seeds[0], materials=materials) as records:
        for seed in study.seeds:
            record = read_record(workplace.scratch / f"seed{seed}" / "record.jsonl")
            for target in study.targets_nats:
                attempt = attempt_of(record, target_loss_nats=target)
                records.write(
                    "attempt", seed=seed, target_loss_nats=target, samples=attempt.samples,
                    is_reached=attempt.is_reached,
                    seconds={part: round(s, 4) for part, s in attempt.seconds.items()},
                )  # fmt: skip
            validations = record.of("validation")
            records.write(
                "curve", seed=seed,
                samples=[int(event.number("step")) * study.run.batch for event in validations],
                loss_nats=[round(event.number("validation_loss_nats"), 4) for event in validations],
            )  # fmt: skip


def stage_at_speeds(study: StagingShare, workplace: Workplace) -> None:
    """One run at each speed of the device, after one that is not counted; events "speed"."""
    torch.set_num_threads(1)
    study.packed.open(sequence=study.run.sequence, seed=0)  # tokenized before, and not timed
    study.packed.validation(sequence=study.run.sequence)
    # The first training of a process loads libraries, which is no store's doing.
    train(
        replace(study.run_of(max(study.speedups)), horizon=Steps(count=1)),
        record=workplace.scratch / "first.jsonl", checkpoints=workplace.scratch / "first",
        progress=silent,
    )  # fmt: skip
    with workplace.recording(study, seed=0) as records:
        for speedup in study.speedups:
            workplace.progress(study.speedups.index(speedup), len(study.speedups), f"x{speedup}")
            place = workplace.scratch / f"speedup{speedup}"
            shutil.rmtree(place, ignore_errors=True)  # a run that goes on is not staged as a whole
            record = place / "record.jsonl"
            run = study.run_of(speedup)
            train(run, record=record, checkpoints=place / "checkpoints", progress=silent)
            timed = read_record(record)
            # The checkpoint at the end is no part of the way to a quality.
            seconds = seconds_by_part(timed, until=timed.last("validation"))
            records.write(
                "speed", speedup=speedup,
                seconds={part: round(s, 4) for part, s in seconds.items()},
            )  # fmt: skip


def draw_rooflines(study: Rooflines, workplace: Workplace) -> None:
    """Steps of runs on ranks of this machine; events "roofline"."""
    from fourfold_mlperf_hpc.roofline import roofline_of

    with workplace.recording(study, seed=0) as records:
        for ranks in study.ranks:
            for run in study.runs:
                workplace.progress(0, len(study.runs), f"{run.name} on {ranks}")
                line = roofline_of(run, ranks=ranks)
                records.write(
                    "roofline", run=run.name, ranks=ranks, parameters=line.parameters,
                    tokens=line.tokens, step_s=round(line.step_s, 6), bound=line.bound,
                    efficiency=round(line.efficiency, 5), work=dataclasses.asdict(line.work),
                    ceilings=dataclasses.asdict(line.ceilings),
                    bounds_s={name: round(s, 8) for name, s in line.bounds_s.items()},
                    unfused_s=round(line.unfused_s, 8),
                )  # fmt: skip
            close_ranks(ranks)


def _stages(scale: Scale) -> Sequence[Stage]:
    if scale not in SIZES:
        return ()
    facts = PublishedRound(facts_sha256=hashlib.sha256(FACTS.read_bytes()).hexdigest())
    studies = [to_quality(batch, scale) for batch in SIZES[scale].batches]
    studies += [to_quality(batch, scale, ranks=2) for batch in ON_TWO_RANKS[scale]]
    share, lines = staging_share(scale), rooflines(scale)
    return (
        Stage(name="published", run=facts, perform=partial(take_round_apart, facts)),
        *(
            Stage(name=study.run.name, run=study, perform=partial(train_to_quality, study))
            for study in studies
        ),
        Stage(name="staging", run=share, perform=partial(stage_at_speeds, share)),
        Stage(name="rooflines", run=lines, perform=partial(draw_rooflines, lines)),
    )


def _drawings(scale: Scale) -> Sequence[Drawing]:
    from fourfold_mlperf_hpc.reproduce import figures  # needs matplotlib, and nothing else does

    return figures.drawings(scale)


def _launches() -> Sequence[Launch]:
    return ()


EXPERIMENT = Experiment(
    package="mlperf_hpc",
    title="MLPerf HPC: time to quality, taken apart",
    paper="Farrell, Emani, et al.: MLPerf HPC: A Holistic Benchmark Suite for Scientific Machine Learning on "
    "HPC Systems. 2021 (arXiv 2110.11466)",
    idea="Time a training until it is good enough, staging included, and say how much of a gain came from "
    "learning with fewer samples, how much from computing faster, and how much from what lies beside.",
    headline=headline,
    picture="factors",
    claims=CLAIMS,
    stages=_stages,
    drawings=_drawings,
    launches=_launches,
    tables=TABLES,
)
