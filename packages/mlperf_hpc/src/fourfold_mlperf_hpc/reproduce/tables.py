"""Markdown tables of the package's documents, from its records."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from fourfold_mlperf_hpc.decomposition import batch_law, expected, factors
from fourfold_mlperf_hpc.reproduce.measures import attempts_of, batches_of, systems, targets_of
from fourfold_parallel.reproduce.claims import Records
from fourfold_parallel.reproduce.tables import markdown

BENCHMARKS = {"cosmoflow": "CosmoFlow", "deepcam": "DeepCAM"}


def table_systems(records: Records) -> str:
    """The 15 submissions: score, staging, epochs."""
    rows = [
        [
            f"{event.values['system']}, {BENCHMARKS[str(event.values['benchmark'])]}",
            f"{event.number('batch'):,.0f}",
            f"{event.number('score_min'):.2f}"
            + (f" ({event.number('misses'):.0f} missed)" if event.number("misses") else ""),
            f"{event.number('staging_min'):.2f}",
            f"{event.number('before_min'):.2f}",
            f"{event.number('epochs'):.1f} ({event.number('epochs_sd'):.1f})",
            f"{event.number('epoch_min'):.3f}",
            f"{event.number('evaluation_min'):.1f}",
        ]
        for event in systems(records)
    ]  # fmt: skip
    head = [
        "system, benchmark", "batch", "score, min", "staging", "before epoch 1", "epochs (sd)", "epoch",
        "in evaluation",
    ]  # fmt: skip
    return markdown(head, rows, numeric=True)


def table_pairs(records: Records) -> str:
    """Ratios of scores, and their three factors."""
    rows = [
        [
            f"{event.values['a']} to {event.values['b']}, {event.values['between']}",
            *(
                f"{event.number(key):.2f}"
                for key in ("whole", "convergence", "compute", "overhead")
            ),
        ]
        for event in records["published"].of("pair")
    ]
    return markdown(["from, to", "whole", "convergence", "compute", "overhead"], rows, numeric=True)


def table_batches(records: Records) -> str:
    """Samples to each target by batch, and the law through them."""
    batches = batches_of(records)
    targets = targets_of(records, f"batch{batches[0]}")
    rows, laws = [], []
    for target in targets:
        means = [expected(attempts_of(records, f"batch{b}", target)) for b in batches]
        samples = [mean.samples for mean in means]
        law = batch_law(np.asarray(batches, float), np.asarray(samples))
        laws.append(f"{law.least:,.0f} (1 + B / {law.critical:.0f}) to {target:g} nats")
        rows.append([f"{target:g} nats", *(f"{count:,.0f}" for count in samples)])
    head = ["samples to", *(f"batch {batch}" for batch in batches)]
    return markdown(head, rows, numeric=True) + f"\nFitted: {'; '.join(laws)}.\n"


def table_ours(records: Records) -> str:
    """Our own pairs: a larger batch, a second rank, and both."""
    target = targets_of(records, "batch16")[-1]
    rows = []
    for a, b in (
        ("batch16", "batch256"),
        ("batch256", "batch256-ranks2"),
        ("batch16", "batch256-ranks2"),
        ("batch16", "batch16-ranks2"),
    ):
        parts = factors(*(expected(attempts_of(records, stage, target)) for stage in (a, b)))
        rows.append(
            [
                f"{_titled(a)} to {_titled(b)}",
                *(f"{x:.2f}" for x in (parts.whole, parts.convergence, parts.compute, parts.overhead)),
            ]
        )  # fmt: skip
    return markdown(["from, to", "whole", "convergence", "compute", "overhead"], rows, numeric=True)


def _titled(stage: str) -> str:
    return stage.replace("batch", "batch ").replace("-ranks2", " on two ranks")


TABLES: Mapping[str, Callable[[Records], str]] = {
    "systems": table_systems,
    "pairs": table_pairs,
    "batches": table_batches,
    "ours": table_ours,
}
"""By the name in a document's `<!-- table: NAME -->`."""
