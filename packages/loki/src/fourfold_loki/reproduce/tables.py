"""Tables of this package's documents, rendered from the committed records."""

import math
from collections.abc import Sequence

from fourfold_loki.reproduce.measures import (
    added_by_window,
    added_percent,
    arms_of,
    diagnosed,
    mean_share,
    tokens_scored,
)
from fourfold_parallel.common.records import Record
from fourfold_parallel.reproduce.claims import Records
from fourfold_parallel.reproduce.tables import markdown

HEAD = (
    "selector",
    "read of dense",
    "added perplexity, %",
    "nats a token ± s.e.",
    "keys",
    "mass",
    "sink",
)


def selectors(records: Records) -> str:
    """Every arm of each protocol against full attention on the same tokens."""
    rows: list[list[str]] = []
    for name in ("perplexity", "variants", "published-protocol", "long-context"):
        record = records[name]
        rows.append([f"*{name}, {tokens_scored(record)} tokens*", *[""] * 6])
        for arm in arms_of(record):
            # The doctor looked at a window of 512 tokens, as the other stages score.
            seen = [
                [] if name == "long-context" else diagnosed(records["diagnoses"], arm, key)
                for key in ("recall", "mass_recall", "sink_kept")
            ]
            rows.append([*_costs(record, arm), *(f"{_mean(s):.3f}" if s else "" for s in seen)])
    return markdown(HEAD, rows)


def bases(records: Records) -> str:
    """The published basis, ours and two other selectors, at both lengths of windows."""
    names = {
        "loki-pca": "Loki, published basis (`pca`)",
        "loki-balanced": "Loki, `balanced`, per query head",
        "loki-balanced-shared": "Loki, `balanced`, shared in groups (default)",
        "h2o": "H2O",
        "streaming": "StreamingLLM (latest keys)",
        "exact": "exact top-k",
    }
    short, long = records["perplexity"], records["long-context"]
    return markdown(
        ("a quarter of the keys by", "added perplexity at 512 tokens, %", "at 2,048 tokens, %"),
        [
            [name, str(added_percent(short, arm)), str(added_percent(long, arm))]
            for arm, name in names.items()
        ],
    )


def _costs(record: Record, arm: str) -> list[str]:
    added = added_by_window(record, arm)
    return [
        arm,
        f"{mean_share(record, arm, 'read_share'):.3f}",
        str(added_percent(record, arm)),
        f"{_mean(added):+.4f} ± {_standard_error(added):.4f}",
    ]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float:
    mean = _mean(values)
    spread = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(spread / len(values))


TABLES = {"selectors": selectors, "bases": bases}
