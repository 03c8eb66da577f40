"""The commands for a user's own runs: fit a law to a table of them, write a table to try it on."""

from pathlib import Path
from typing import Literal


def fit(
    table: Path,
    /,
    *,
    budget: float,
    law: Literal["parameters", "compute", "width-depth", "shape"] = "parameters",
    delta: float = 1e-3,
    embeddings: Literal["both", "one", "none"] = "both",
    vocabulary: int = 50_304,
    context: int = 2_048,
    head_width: int = 128,
    heads_multiple: int = 2,
    draws: int = 200,
    seed: int = 0,
    report: Path = Path("scaling-law.html"),
) -> None:
    """Fit a scaling law to training runs, prescribe a size and a shape for a budget, write a page.

    Args:
        table: A .csv, .jsonl or .parquet file, one row a checkpoint: run, width, depth, parameters,
            tokens, loss_nats.
        budget: Training FLOPs.
        law: parameters: in N and T. compute: in FLOPs per token and T. width-depth: in w, d, N and T.
            shape: in w, d and T. Only the last two prescribe a shape.
        delta: Huber threshold of log loss.
        embeddings: Tables that count as parameters.
        vocabulary: Rows of each of the two embedding tables.
        context: Tokens a sequence.
        head_width: Size of one attention head.
        heads_multiple: Heads of a shape that can be built are a multiple of this.
        draws: Bootstrap draws over runs.
        seed: Of the draws.
        report: Page to write.
    """
    import numpy as np

    from fourfold_gemstones.allocation import Lattice
    from fourfold_gemstones.architecture import Architecture, Embeddings
    from fourfold_gemstones.page import analyse, ready, said, write
    from fourfold_gemstones.parametric import LAWS, ParametricLaw
    from fourfold_parallel.reproduce.terminal import console

    ready(report)
    architecture = Architecture(vocabulary=vocabulary, context=context, head_width=head_width)
    analysis = analyse(
        table,
        ParametricLaw(variables=LAWS[law], delta=delta, embeddings=Embeddings(embeddings)),
        budget,
        architecture=architecture,
        lattice=Lattice(head_width=head_width, heads_multiple=heads_multiple),
        draws=draws,
        generator=np.random.default_rng(seed),
    )
    target = console()
    for text in analysis.warnings:
        target.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)
    for text in said(analysis):
        target.print(text, markup=False, soft_wrap=True)
    write(report, analysis)
    target.print(f"report: {report}", markup=False, soft_wrap=True)


def sample(path: Path = Path("runs.csv"), /) -> None:
    """Write a made-up table of runs to try `fit` on: twenty runs of a law in width and depth.

    Args:
        path: CSV file to write.
    """
    from fourfold_gemstones.simulate import sample as table

    table().write(path)
    print(path)  # noqa: T201 - where it lies is the answer
