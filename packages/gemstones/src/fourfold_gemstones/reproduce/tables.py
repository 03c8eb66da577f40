"""The tables of the documents, as functions of records: `Experiment.tables`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from fourfold_gemstones.published import NAMES
from fourfold_gemstones.reproduce.measures import OPTIMUM, above_optimum, between
from fourfold_gemstones.reproduce.stages import published
from fourfold_parallel.reproduce.claims import Records
from fourfold_parallel.reproduce.tables import markdown

TERMS = {2: "N, T", 3: "w, d, T", 4: "w, d, N, T"}
ONE_TABLE = {"both": "", "one": ", one table"}


def refits(records: Records) -> str:
    """Published fits above the optimum, and where the reference's descent goes from them."""
    record = published(records)
    rows = []
    for event in above_optimum(record):
        restart = record.only("restart", name=event.values["name"])
        optimum = event.number("objective")
        two = int(event.number("terms")) == 2
        rows.append(
            [
                f"`{event.values['frame']}`" + ONE_TABLE[str(event.values["embeddings"])],
                TERMS[int(event.number("terms"))],
                f"{event.number('delta'):g}",
                f"{event.number('published_objective'):.4e}",
                f"{event.number('objective'):.4e}",
                f"{event.number('published_above_percent'):.3f}",
                *(
                    f"{100 * (restart.number(f'{kind}_objective') / optimum - 1):.3f}"
                    for kind in ("default", "scaled")
                ),
                f"{event.number('published_slope'):.3f}" if two else "",
                f"{event.number('slope'):.3f}" if two else "",
                f"{event.number('agreeing'):.0f}/{event.number('starts'):.0f}",
                f"[{event.line}](../results/published.jsonl#L{event.line})",
            ]
        )
    head = ["frame", "law", "δ", "published f", "optimum", "above, %", "restarted, %", "scaled, %"]
    return markdown([*head, "a published", "a", "agree", "line"], rows, numeric=True)


def distances(records: Records) -> str:
    """All published fits by frame, law and threshold: how far above the optimum, and the slopes."""
    record = published(records)
    rows = []
    for event in record.of("refit"):
        two = int(event.number("terms")) == 2
        far = event.number("published_above_percent")
        slopes = (event.number("published_slope"), event.number("slope")) if two else ()
        rows.append(
            [
                f"`{event.values['frame']}`" + ONE_TABLE[str(event.values["embeddings"])],
                TERMS[int(event.number("terms"))],
                f"{event.number('delta'):g}",
                f"**{far:.3f}**" if far > OPTIMUM else f"{far:.4f}",
                " to ".join(f"{slope:.3f}" for slope in slopes),
                f"[{event.line}](../results/published.jsonl#L{event.line})",
            ]
        )
    return markdown(
        ["frame", "law", "δ", "above, %", "slope, published to ours", "line"], rows, numeric=True
    )


def coverage(records: Records) -> str:
    """Coverage of the two bootstraps."""
    record = published(records)
    rows = [
        [
            {"run": "models", "row": "rows"}[str(event.values["groups"])],
            f"{event.number('covered'):.0f} of {event.number('suites'):.0f}",
            f"{event.number('mean_width'):.3f}",
        ]
        for event in record.of("coverage")
    ]
    return markdown(["drawn", "intervals that hold the slope", "mean width"], rows, numeric=True)


def slopes(records: Records) -> str:
    """Slopes by selection with three intervals."""
    record = published(records)
    rows = [
        [
            NAMES[str(event.values["frame"])],
            f"{event.number('rows'):.0f}",
            f"{event.number('models'):.0f}",
            f"{event.number('published_slope'):.3f}",
            f"{event.number('slope'):.3f}",
            between(event, "model_low", "model_high"),
            between(record.only("profile", frame=event.values["frame"])),
            between(event, "row_low", "row_high"),
        ]
        for event in record.of("slope")
    ]
    head = ["selection", "rows", "models", "published", "optimum", "95 % over models", "profile"]
    return markdown([*head, "over rows"], rows, numeric=True)


def differences(records: Records) -> str:
    """Paired differences."""
    record = published(records)
    rows = [
        [
            f"{NAMES[str(event.values['first'])]} less {NAMES[str(event.values['second'])]}",
            f"{event.number('difference'):+.3f}",
            between(event),
            f"{event.number('share_above_zero'):.2f}",
        ]
        for event in record.of("difference")
    ]
    return markdown(
        ["selections", "difference", "paired 95 %", "share of draws above 0"], rows, numeric=True
    )


def null(records: Records) -> str:
    """Hull slopes and their null."""
    record = published(records)
    rows = []
    for event in record.of("envelope"):
        estimator = str(event.values["estimator"])
        if estimator == "20 bins":
            continue
        rows.append(
            [
                str(event.values["selection"]),
                {"hull": "the paper's", "hull, 6NT": "6 N T"}[estimator],
                f"{event.number('slope'):.3f}",
                between(event),
                *(f"{value:.3f}" for value in event.numbers("null_slopes")),
            ]
        )
    head = ["tokens", "FLOPs", "measured", "95 % over models"]
    return markdown(
        [*head, "null, a = .500", "null, a = .513", "null, a = .696"], rows, numeric=True
    )


TABLES: Mapping[str, Callable[[Records], str]] = MappingProxyType(
    {
        "refits": refits,
        "distances": distances,
        "coverage": coverage,
        "slopes": slopes,
        "differences": differences,
        "null": null,
    }
)
"""By the name in `<!-- table: NAME -->`."""
