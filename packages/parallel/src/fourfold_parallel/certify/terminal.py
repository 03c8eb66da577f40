"""A certificate in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fourfold_parallel.certify.certificate import Certificate, named
from fourfold_parallel.certify.compare import QUANTITIES, GridOutcome


def show(certificate: Certificate) -> None:
    """A row a grid with its differences, then what is said of it."""
    console = Console(highlight=False)
    for dtype, by_grid in certificate.grids.items():
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column(dtype, no_wrap=True)
        for name in ("result", *QUANTITIES, "whole"):
            table.add_column(name, justify="left" if name == "result" else "right", no_wrap=True)
        for sizes, outcome in by_grid.items():
            table.add_row(named(sizes), outcome.result, *numbers(outcome), str(len(outcome.whole)))
        if dtype == "bfloat16" and certificate.own():
            own = [f"{certificate.own()[name]:.1e}" for name in QUANTITIES]
            table.add_row("one process", "", *own, "")
        console.print(table)
        console.print()
    if certificate.pairs:
        equal = sum(outcome.result == "equal" for outcome in certificate.pairs.values())
        console.print(
            f"saved on one grid and loaded on another: {equal} of {len(certificate.pairs)} pairs bit for bit"
        )
    for text in messages(certificate):
        console.print(text, soft_wrap=True, markup=False)
    console.print(f"{certificate.model}: the certificate {certificate.verdict}", soft_wrap=True)


def numbers(outcome: GridOutcome) -> list[str]:
    """Of each quantity, as it is written everywhere."""
    return [
        f"{outcome.differences[name]:.1e}" if name in outcome.differences else ""
        for name in QUANTITIES
    ]


def messages(certificate: Certificate) -> list[str]:
    """Refusals, faults and where they show, each once."""
    texts = dict[str, None]()
    for outcome in certificate.outcomes:
        if outcome.message or outcome.result == "wrong":
            texts[outcome.message or f"wrong at {outcome.where}"] = None
    return [*texts]
