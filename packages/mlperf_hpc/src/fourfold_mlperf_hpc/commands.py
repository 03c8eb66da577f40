"""The commands of `fourfold-mlperf-hpc`: a signature is the options, a docstring the help."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fourfold_parallel.common.files import write_text
from fourfold_parallel.common.records import read_record


def decompose(
    a: Path,
    b: Path,
    /,
    *,
    target_loss_nats: float | None = None,
    out: Path = Path("decomposition.html"),
) -> None:
    """Take the ratio of two times to quality apart: convergence, compute, overhead; a table and a page.

    Args:
        a: The record of a training, or a folder of records that differ in their seeds.
        b: What it is compared with, likewise.
        target_loss_nats: Validation loss that ends the time; the runs' own (Until) by default.
        out: The page.
    """
    from fourfold_mlperf_hpc.decomposition import bootstrap, expected, factors
    from fourfold_mlperf_hpc.terminal import shown_factors
    from fourfold_mlperf_hpc.trainings import attempts_in

    sides = {str(place): attempts_in(place, target_loss_nats=target_loss_nats) for place in (a, b)}
    if len(sides) < 2:
        raise ValueError(f"{a} is compared with itself; name two records or folders")
    from fourfold_parallel.reproduce.terminal import console

    first, second = sides.values()
    parts = factors(expected(first), expected(second))
    interval: tuple[float, float] | None = None
    if min(len(first), len(second)) > 1:
        interval = bootstrap(first, second, lambda drawn: drawn.convergence)
    console().print(shown_factors(sides, parts, interval))
    from fourfold_mlperf_hpc.page import write_factors

    write_factors(sides, parts, interval, out)
    console().print(f"page: {out.resolve().as_uri()}", soft_wrap=True)


def score(folder: Path, /, *, target_loss_nats: float | None = None) -> None:
    """Score runs by the benchmark's rules: the mean without the fastest and the slowest; a miss is slowest.

    Args:
        folder: Of records that differ in their seeds.
        target_loss_nats: Validation loss that ends the time; the runs' own (Until) by default.
    """
    from fourfold_mlperf_hpc.decomposition import counted, score_s
    from fourfold_mlperf_hpc.terminal import shown_attempts
    from fourfold_mlperf_hpc.trainings import attempts_in
    from fourfold_parallel.reproduce.terminal import console

    attempts = attempts_in(folder, target_loss_nats=target_loss_nats)
    console().print(shown_attempts(attempts))
    seconds = score_s(attempts)
    console().print(
        f"score {seconds:.2f} s: the mean of {len(counted(attempts))} of {len(attempts)}"
    )


def roofline(
    record: Path, /, *, ranks: int = 1, steps: int = 7, out: Path = Path("roofline.html")
) -> None:
    """Draw the roofline of a training's step, with memory, network and files, measured on this machine.

    Args:
        record: Of a training: its run is taken, not its numbers.
        ranks: Started here, one thread each; they share the batch.
        steps: Timed.
        out: The page.
    """
    from fourfold_mlperf_hpc.page import write_roofline
    from fourfold_mlperf_hpc.roofline import roofline_of
    from fourfold_mlperf_hpc.terminal import shown_roofline
    from fourfold_mlperf_hpc.trainings import run_of
    from fourfold_parallel.reproduce.terminal import console

    line = roofline_of(run_of(read_record(record)), ranks=ranks, steps=steps)
    console().print(shown_roofline(line))
    write_roofline(line, out)
    console().print(f"page: {out.resolve().as_uri()}", soft_wrap=True)


def published(
    *,
    benchmark: Literal["cosmoflow", "deepcam", "both"] = "both",
    pair: tuple[str, str] | None = None,
) -> None:
    """Show the 15 public systems of MLPerf HPC v0.7, or take a pair of them apart.

    Args:
        benchmark: Whose systems.
        pair: Two systems of one benchmark, such as --pair "Fugaku 512" "Fugaku 8,192".
    """
    from fourfold_mlperf_hpc.decomposition import bootstrap, expected, factors
    from fourfold_mlperf_hpc.published import submission_of, submissions
    from fourfold_mlperf_hpc.terminal import shown_factors, shown_systems
    from fourfold_parallel.reproduce.terminal import console

    if pair is None:
        chosen = [s for s in submissions() if benchmark in ("both", s.benchmark)]
        console().print(shown_systems(chosen))
        return
    which = "cosmoflow" if benchmark == "both" else benchmark
    a, b = (submission_of(system, which) for system in pair)
    parts = factors(expected(a.counted), expected(b.counted))
    interval = bootstrap(a.attempts, b.attempts, lambda drawn: drawn.convergence)
    sides = {s.title: s.counted for s in (a, b)}
    console().print(shown_factors(sides, parts, interval))


def mllog(
    record: Path, /, *, target_loss_nats: float | None = None, out: Path | None = None
) -> None:
    """Say where a training's time went, and write its log for MLCommons' compliance checker.

    Args:
        record: The .jsonl file that the run wrote.
        target_loss_nats: Validation loss that counts as quality reached; the run's own (Until) by default.
        out: The log; by default beside the record, with the ending .mllog.
    """
    from fourfold_mlperf_hpc import mllog as made
    from fourfold_mlperf_hpc.terminal import shown_parts
    from fourfold_parallel.reproduce.terminal import console
    from fourfold_parallel.run.timeline import seconds_by_part

    read = read_record(record)
    text = made.lines(read, target_loss_nats=target_loss_nats)
    path = out or record.with_suffix(".mllog")
    write_text(path, text)
    console().print(shown_parts(seconds_by_part(read)))
    console().print(
        f"{path}; python -m mlperf_logging.compliance_checker --config {made.RULES} {path}",
        soft_wrap=True,
    )


def extract(folder: Path, /, *, out: Path = Path("v0.7.jsonl")) -> None:
    """Extract the facts of the public logs again, as they come with this package.

    Args:
        folder: A checkout of https://github.com/mlcommons/hpc_results_v0.7.
        out: The facts.
    """
    from fourfold_mlperf_hpc.logs import extract as made
    from fourfold_parallel.reproduce.terminal import console

    console().print(f"{out}: facts of {made(folder, out)} runs", soft_wrap=True)
