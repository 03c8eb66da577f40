"""Tables of this package's documents, rendered from the committed records."""

from collections.abc import Callable

from fourfold_outliers.reproduce.measures import (
    arms,
    attention_left,
    inner,
    last_of,
    layers_in,
    median_rise,
    outliers_in,
    rise,
    spoken,
    table_of,
    whole,
)
from fourfold_outliers.reproduce.recipes import ARMS, SEEDS
from fourfold_parallel.reproduce.claims import Records, over_seeds
from fourfold_parallel.reproduce.tables import markdown

LANGUAGES = {
    "zipf": "Zipf's frequencies",
    "flat": "flat frequencies",
    "given": "Zipf's, given to the head",
}


def outliers(records: Records) -> str:
    """Each outlier, all of them, and as many others."""
    record, events = records["disabling"], layers_in(records)[1:-1]
    cosine = sum(event.number("cosine") for event in events)
    rows: list[list[str]] = []
    parts: list[float] = []
    for d in outliers_in(records):
        [event] = arms(record, f"only {d:.0f}")
        part = sum(float(table_of(e, "contributions")[f"{d:.0f}"]) for e in events)
        parts.append(part)
        link = whole(records["frequency"].only("link", coordinate=int(d)))
        rows.append(
            [
                f"{d:.0f}",
                f"{sum(d in e.numbers('by_share') for e in events)} of {len(events)}",
                f"{100 * part / cosine:.0f} %",
                str(link),
                f"+{rise(record, event)}",
                str(attention_left(record, event)),
            ]
        )
    [together] = arms(record, "found")
    rows.append(
        [
            "all", "", f"{100 * sum(parts) / cosine:.0f} %", "", f"+{rise(record, together)}",
            str(attention_left(record, together)),
        ]
    )  # fmt: skip
    others = arms(record, "random")
    rows.append(
        [
            f"as many others, median of {len(others)}", "", "", "",
            f"+{median_rise(record, 'random'):.2g}", str(attention_left(record, others[0])),
        ]
    )  # fmt: skip
    head = [
        "coordinate",
        "layers",
        "of the mean cosine",
        "link to frequency",
        "loss without it, nats",
        "attention to position 0 that is left",
    ]
    return markdown(head, rows)


def languages(records: Records) -> str:
    """The three arms at the end of their runs."""
    rows: list[list[str]] = []
    for arm in ARMS:
        runs = spoken(records, arm, SEEDS)
        losses = [run.last("validation").number("validation_loss_nats") for run in runs]
        rows.append(
            [
                LANGUAGES[arm],
                ", ".join(f"{last_of(run, 'outliers_by_layer'):g}" for run in runs),
                *(
                    str(over_seeds([last_of(run, key) for run in runs]))
                    for key in ("cosine_by_layer", "top_share_by_layer")
                ),
                str(over_seeds(losses)),
            ]
        )
    head = [
        "language",
        "outliers a layer, by seed",
        "mean cosine",
        "top three's part",
        "loss, nats",
    ]
    return markdown(head, rows)


def ways(records: Records) -> str:
    """All outliers disabled in different ways."""
    record = records["disabling"]
    names = {
        "found": "gain of zero in every norm",
        "found, zero in the stream": "zero in the stream",
        "found, zero but at position 0": "zero in the stream but at position 0",
        "found, at their mean": "their mean in the stream",
        "found, at their mean but at position 0": "their mean in the stream but at position 0",
    }
    base = arms(record, "as it is")[0].number("distinct")
    rows = [
        [
            name,
            f"+{rise(record, arms(record, arm)[0])}",
            f"{arms(record, arm)[0].number('distinct') / base - 1:+.0%}",
        ]
        for arm, name in names.items()
    ]
    return markdown(["all three disabled by", "loss, nats", "distinct predictions"], rows)


def layers(records: Records) -> str:
    """Anisotropy of the states seen in other ways, mean over inner layers."""
    events = layers_in(records)
    names = {
        "cosine": "as it is",
        "without": "without the outliers",
        "centred": "less the mean over tokens",
        "standardised": "standardised",
    }
    isotropies = {"cosine": "isotropy", "without": "isotropy_without"}
    rows: list[list[str]] = []
    for key, name in names.items():
        numbers = [
            f"{inner([e.number(each) for e in events]):.3f}"
            for each in (key, isotropies.get(key))
            if each
        ]
        rows.append([name, *numbers, *[""] * (2 - len(numbers))])
    return markdown(["states", "mean cosine, inner layers", "partition isotropy"], rows)


TABLES: dict[str, Callable[[Records], str]] = {
    "outliers": outliers,
    "languages": languages,
    "ways": ways,
    "layers": layers,
}
