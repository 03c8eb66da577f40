"""Markdown tables of the package's documents, from its records."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fourfold_parallel.common.records import Event, Record
from fourfold_parallel.reproduce.claims import Records, over_seeds
from fourfold_parallel.reproduce.tables import markdown
from fourfold_recurrent_depth.reproduce.measures import AUTOMATON, DEPTH_ARMS, DEPTH_TASKS, LANGUAGE

POLICIES = {
    "own": "all 16",
    "shared": "{kept} in turn",
    "last": "the last",
    "latent": "one vector of {kept}",
}


def table_depths(records: Records) -> str:
    """Scores after one recurrence, at half the mean, at it and beyond, for every task and way to train."""
    rows = []
    for task in DEPTH_TASKS:
        is_loss = task.name == "bytes of Python"
        for arm, name in DEPTH_ARMS.items():
            seeds = task.scores(records, arm)
            cells = []
            for depth in (1, task.mean // 2, task.mean, 2 * task.mean, 8 * task.mean):
                interval = over_seeds([abs(seed[depth]) for seed in seeds])
                scale = 1 if is_loss else 100
                numbers = (scale * interval.value, scale * interval.low, scale * interval.high)
                form = "{:.2f} [{:.2f}, {:.2f}]" if is_loss else "{:.1f} [{:.1f}, {:.1f}]"
                cells.append(form.format(*numbers))
            unit = "nats" if is_loss else "%"
            rows.append([f"{task.name} ({unit}), {name}", *cells])
    head = ["task, trained with", "1", "mean / 2", "mean", "2 x mean", "8 x mean"]
    return markdown(head, rows, numeric=True)


def table_caches(records: Records) -> str:
    """Bytes a token, loss and accuracy of every way to keep keys, on bytes and on the automaton."""
    rows = [
        [POLICIES[str(event.values["policy"])].format(kept=_kept(event))]
        for event in _caches(records[LANGUAGE])[0]
    ]
    for stage, field, unit in ((LANGUAGE, "loss_nats", 1), (AUTOMATON, "accuracy", 100)):
        by_seed = _caches(records[stage])
        for place, row in enumerate(rows):
            gap = over_seeds(
                [unit * (e[place].number(field) - e[0].number(field)) for e in by_seed]
            )
            digits = 4 if unit == 1 else 1
            row += [
                f"{by_seed[0][place].number('bytes_per_token'):,.0f}",
                "0"
                if place == 0
                else "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(gap.value, gap.low, gap.high, d=digits),
            ]
    head = [
        "keys kept of recurrences", "bytes a byte of Python", "loss, nats", "bytes a cell", "points at k=3",
    ]  # fmt: skip
    return markdown(head, rows, numeric=True)


def _caches(record: Record) -> list[tuple[Event, ...]]:
    return [record.of("cache", seed=seed) for seed in record.seeds("cache", arm="law")]


def _kept(event: Event) -> object:
    return event.values.get("recurrences_kept") or event.values.get("rank")


TABLES: Mapping[str, Callable[[Records], str]] = {"depths": table_depths, "caches": table_caches}
"""By the name in the documents."""
