"""Markdown tables of the package's documents, from its records."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fourfold_parallel.reproduce.claims import Records, over_seeds
from fourfold_parallel.reproduce.tables import markdown
from fourfold_recurrent_depth.reproduce.measures import DEPTH_TASKS, LANGUAGE

ARMS = {"law": "random depth", "fixed": "one depth", "averaged": "averaged exits"}
"""Ways to train, as documents name them."""
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
        for arm, name in ARMS.items():
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
    """Bytes a token and loss of every way to keep keys."""
    record = records[LANGUAGE]
    seeds = record.seeds("cache", arm="law")
    by_seed = [record.of("cache", seed=seed) for seed in seeds]
    whole = [events[0].number("loss_nats") for events in by_seed]
    rows = []
    for place, event in enumerate(by_seed[0]):
        above = [
            events[place].number("loss_nats") - loss
            for events, loss in zip(by_seed, whole, strict=True)
        ]
        policy = str(event.values["policy"])
        kept = event.values.get("recurrences_kept") or event.values.get("rank")
        gap = over_seeds(above)
        rows.append(
            [
                POLICIES[policy].format(kept=kept),
                f"{event.number('bytes_per_token'):,.0f}",
                "0" if policy == "own" else f"{gap.value:.4f} [{gap.low:.4f}, {gap.high:.4f}]",
            ]
        )
    return markdown(
        ["keys kept of recurrences", "bytes a token", "loss above all 16, nats"], rows, numeric=True
    )


TABLES: Mapping[str, Callable[[Records], str]] = {"depths": table_depths, "caches": table_caches}
"""By the name in the documents."""
