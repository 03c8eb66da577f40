"""The tables of `docs/revisited.md`, rendered from the committed records.

    python -m fourfold_gemstones.tables packages/gemstones

rewrites every table between `<!-- table: NAME -->` and `<!-- end -->`; a test fails where a table
and its record disagree.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fourfold_gemstones.reproduce.figures import NAMES
from fourfold_gemstones.reproduce.stages import PUBLISHED, between, numbers, where
from fourfold_gemstones.reproduce.paper.optimum import OPTIMUM
from fourfold_parallel.common.files import write_text
from fourfold_parallel.common.records import Event, Record, read_record

_TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
DOCUMENTS = ("README.md", "docs/revisited.md")
"""Files with tables, under the package's folder."""
TERMS = {2: "N, T", 3: "w, d, T", 4: "w, d, N, T"}
ONE_TABLE = {"both": "", "one": ", one table"}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all but the first column flush right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *rows))


def above_optimum(record: Record) -> Sequence[Event]:
    """Published fits more than .03 % above the optimum."""
    return [
        event for event in record.of("refit") if event.number("published_above_percent") > OPTIMUM
    ]


def refits(record: Record) -> str:
    """Published fits above the optimum, and where the reference's descent goes from them."""
    rows = []
    for event in above_optimum(record):
        restart = where(record, "restart", name=event.values["name"])
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
    return markdown([*head, "a published", "a", "agree", "line"], rows)


def distances(record: Record) -> str:
    """All published fits by frame, law and threshold: how far above the optimum, and the slopes."""
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
                f"[{event.line}](results/published.jsonl#L{event.line})",
            ]
        )
    return markdown(["frame", "law", "δ", "above, %", "slope, published to ours", "line"], rows)


def coverage(record: Record) -> str:
    """Coverage of the two bootstraps."""
    rows = [
        [
            {"run": "models", "row": "rows"}[str(event.values["groups"])],
            f"{event.number('covered'):.0f} of {event.number('suites'):.0f}",
            f"{event.number('mean_width'):.3f}",
        ]
        for event in record.of("coverage")
    ]
    return markdown(["drawn", "intervals that hold the slope", "mean width"], rows)


def slopes(record: Record) -> str:
    """Slopes by selection with three intervals."""
    rows = [
        [
            NAMES[str(event.values["frame"])],
            f"{event.number('rows'):.0f}",
            f"{event.number('models'):.0f}",
            f"{event.number('published_slope'):.3f}",
            f"{event.number('slope'):.3f}",
            between(event, "model_low", "model_high"),
            between(where(record, "profile", frame=event.values["frame"])),
            between(event, "row_low", "row_high"),
        ]
        for event in record.of("slope")
    ]
    head = ["selection", "rows", "models", "published", "optimum", "95 % over models", "profile"]
    return markdown([*head, "over rows"], rows)


def differences(record: Record) -> str:
    """Paired differences."""
    rows = [
        [
            f"{NAMES[str(event.values['first'])]} less {NAMES[str(event.values['second'])]}",
            f"{event.number('difference'):+.3f}",
            between(event),
            f"{event.number('share_above_zero'):.2f}",
        ]
        for event in record.of("difference")
    ]
    return markdown(["selections", "difference", "paired 95 %", "share of draws above 0"], rows)


def null(record: Record) -> str:
    """Hull slopes and their null."""
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
                *(f"{value:.3f}" for value in numbers(event, "null_slopes")),
            ]
        )
    head = ["tokens", "FLOPs", "measured", "95 % over models"]
    return markdown([*head, "null, a = .500", "null, a = .513", "null, a = .696"], rows)


def tables(results: Path) -> Mapping[str, str]:
    """Every table by name, from the records in a folder."""
    record = read_record(results / f"{PUBLISHED}.jsonl")
    of_record: Mapping[str, Callable[[Record], str]] = {
        "refits": refits,
        "distances": distances,
        "coverage": coverage,
        "slopes": slopes,
        "differences": differences,
        "null": null,
    }
    return {name: render(record) for name, render in of_record.items()}


def filled(text: str, rendered: Mapping[str, str]) -> str:
    """A document with its tables replaced.

    Raises:
        ValueError: It names a table that is not rendered.
    """

    def replacement(match: re.Match[str]) -> str:
        if match[2] not in rendered:
            raise ValueError(f"no table {match[2]!r}; there are {sorted(rendered)}")
        return f"{match[1]}{rendered[match[2]]}{match[3]}"

    return _TABLE.sub(replacement, text)


def main(package: Path) -> None:
    """Rewrite the tables of a package's documents."""
    rendered = tables(package / "results")
    for name in DOCUMENTS:
        path = package / name
        write_text(path, filled(path.read_text(encoding="utf-8"), rendered))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
