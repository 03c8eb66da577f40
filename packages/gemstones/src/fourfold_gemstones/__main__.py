"""`python -m fourfold_gemstones`: reproduce the paper, or `fit` a table of runs of yours."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fourfold_gemstones import report
from fourfold_gemstones.allocation import Lattice
from fourfold_gemstones.architecture import Architecture, Embeddings
from fourfold_gemstones.parametric import ParametricLaw
from fourfold_gemstones.reproduce.experiment import EXPERIMENT
from fourfold_gemstones.runs import RunTable
from fourfold_parallel.reproduce import cli


def parser() -> argparse.ArgumentParser:
    """Arguments of `fit`."""
    text = argparse.ArgumentParser(
        prog="python -m fourfold_gemstones fit",
        description="Fit a scaling law to training runs and prescribe a shape for a budget.",
    )
    text.add_argument(
        "table", type=Path, help="a .csv, .jsonl or .parquet file, one row a checkpoint"
    )
    text.add_argument("--law", choices=sorted(report.LAWS), default="parameters")
    text.add_argument("--budget", type=float, required=True, help="training FLOPs")
    text.add_argument("--delta", type=float, default=1e-3, help="Huber threshold of log loss")
    text.add_argument(
        "--embeddings",
        choices=[kind.value for kind in Embeddings],
        default=Embeddings.BOTH.value,
        help="tables that count as parameters",
    )
    text.add_argument("--vocabulary", type=int, default=50_304)
    text.add_argument("--context", type=int, default=2_048)
    text.add_argument("--head-width", type=int, default=128)
    text.add_argument("--heads-multiple", type=int, default=2, help="for shapes that can be built")
    text.add_argument("--draws", type=int, default=200, help="bootstrap draws over runs")
    text.add_argument("--seed", type=int, default=0)
    text.add_argument("--report", type=Path, default=Path("scaling-law.html"))
    return text


def fit(arguments: Sequence[str]) -> None:
    """Fit, write the page, and say the main numbers."""
    options = parser().parse_args(arguments)
    console = cli.console()
    architecture = Architecture(
        vocabulary=options.vocabulary, context=options.context, head_width=options.head_width
    )
    try:
        analysis = report.analyse(
            RunTable.read(options.table, architecture=architecture),
            ParametricLaw(
                variables=report.LAWS[options.law],
                delta=options.delta,
                embeddings=Embeddings(options.embeddings),
            ),
            options.budget,
            architecture=architecture,
            lattice=Lattice(head_width=options.head_width, heads_multiple=options.heads_multiple),
            draws=options.draws,
            generator=np.random.default_rng(options.seed),
        )
        report.write(options.report, analysis)
    except ValueError as error:
        console.print(f"[red]{error}[/red]", soft_wrap=True)
        sys.exit(2)
    for text in analysis.warnings:
        console.print(f"[yellow]warning: {text}[/yellow]", soft_wrap=True)
    certificate, best = analysis.fit.certificate, analysis.band.best
    console.print(
        f"{certificate.agreeing} of {certificate.starts} descents agree; "
        f"R² {analysis.fit.score(analysis.fit.table):.4f}"
    )
    console.print(
        f"for {best.budget:.3g} FLOPs: {best.parameters:.3g} parameters "
        f"({analysis.band.parameters.low:.3g} to {analysis.band.parameters.high:.3g}), "
        f"{best.tokens:.3g} tokens, width/depth {best.aspect:.3g}, loss {best.loss_nats:.4f} nats"
    )
    console.print(f"report: {options.report}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["fit"]:
        fit(sys.argv[2:])
    else:
        cli.main(EXPERIMENT)
