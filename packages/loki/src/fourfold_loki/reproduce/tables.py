"""Tables of this package's documents, rendered from the committed records."""

import math
from collections.abc import Sequence

from fourfold_loki.reproduce.measures import (
    FULL,
    added_by_window,
    added_percent,
    arms_of,
    certified,
    competed,
    diagnosed,
    fair_arms,
    mean_share,
    tokens_scored,
)
from fourfold_parallel.common.records import Record
from fourfold_parallel.reproduce.claims import Records, over_seeds
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


def certificates(records: Records) -> str:
    """By length and error: what each index has to read, and how far its bound is from the truth."""
    record = records["certificates"]
    names = ("exact", "loki-bytes", "loki-codes", "loki-norm", "quest")
    rows: list[list[str]] = []
    for context in sorted({int(event.number("context")) for event in record.of("certified")}):
        for error in (0.1, 0.01, 0.001):
            cells = [f"{context:,}", f"{error:g}"]
            for name in names:
                events = certified(record, f"{name}:{error:g}", context)
                kept = _mean([_mean(event.numbers("kept_share")) for event in events])
                read = _mean([event.number("read_share") for event in events])
                cells.append(f"{read:.2f} ({kept:.2f})")
            pairs = [
                (bound, true)
                for event in certified(record, f"loki-codes:{error:g}", context)
                for bound, true in zip(event.numbers("bound"), event.numbers("error"), strict=True)
                if true > 1e-9 and bound > 0
            ]
            ratio = (
                math.exp(_mean([math.log(bound / true) for bound, true in pairs])) if pairs else 1
            )
            rows.append([*cells, f"{ratio:.1f}"])
    return markdown(
        (
            "tokens",
            "error",
            "all scores known",
            "8 coordinates, 8-bit codes",
            "16 coordinates, 4-bit codes",
            "16 coordinates, norm",
            "Quest, pages of 16",
            "bound over error",
        ),
        rows,
    )


def fair(records: Records) -> str:
    """Divergence from full attention at equal bytes, by length; in brackets the bytes where they vary."""
    record = records["fair-table"]
    rows: list[list[str]] = []
    shares = sorted({event.number("share") for event in record.of("entry")})
    for context in sorted({int(event.number("context")) for event in record.of("entry")}):
        windows = len(competed(record, FULL, context, 1.0))
        rows.append([f"*{context:,} tokens, {windows} windows*", *[""] * len(shares)])
        rows.extend(
            [arm, *(_fair_cell(record, arm, context, share) for share in shares)]
            for arm in fair_arms(record)
        )
    return markdown(("method", *(f"{share:g} of the bytes" for share in shares)), rows)


def _fair_cell(record: Record, arm: str, context: int, share: float) -> str:
    events = competed(record, arm, context, share)
    if not events:
        return "—"
    apart = over_seeds([event.number("divergence_nats") for event in events])
    read = _mean([event.number("read_share") for event in events])
    varies = "" if abs(read / share - 1) < 0.01 else f" ({read:.3f})"
    return f"{apart}{varies}"


def fair_losses(records: Records) -> str:
    """Added nats a token and their standard errors, at two shares of the bytes."""
    record = records["fair-table"]
    shares = sorted({event.number("share") for event in record.of("entry")})
    contexts = sorted({int(event.number("context")) for event in record.of("entry")})
    rows: list[list[str]] = []
    for arm in fair_arms(record):
        cells = [arm]
        for context in contexts:
            full = competed(record, FULL, context, 1.0)
            for share in shares[:2]:
                pairs = zip(competed(record, arm, context, share), full, strict=False)
                added = [
                    ours.number("loss_nats") - theirs.number("loss_nats") for ours, theirs in pairs
                ]
                cells.append(
                    f"{_mean(added):+.3f} ± {_standard_error(added):.3f}" if added else "—"
                )
        rows.append(cells)
    heads = [f"{context:,} tokens, {share:g}" for context in contexts for share in shares[:2]]
    return markdown(("method", *heads), rows)


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


TABLES = {
    "selectors": selectors,
    "bases": bases,
    "certificates": certificates,
    "fair": fair,
    "fair-losses": fair_losses,
}
