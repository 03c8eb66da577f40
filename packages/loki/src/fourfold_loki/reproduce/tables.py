"""The README's table of selectors, rendered from the committed records; a test compares the two."""

import math
from collections.abc import Sequence
from pathlib import Path

from fourfold_loki.reproduce.experiment import EXPERIMENT
from fourfold_loki.reproduce.measures import FULL, added_percent, diagnosed, losses, tokens_scored
from fourfold_parallel.common.records import Record
from fourfold_parallel.reproduce.claims import Records
from fourfold_parallel.reproduce.experiment import load

HEAD = (
    "| selector | read of dense | added perplexity, % | nats a token ± s.e. | keys | mass | sink |",
    "|---|---|---|---|---|---|---|",
)


def committed(results: Path) -> Records:
    """The laptop scale's records in a folder."""
    return load(EXPERIMENT, "laptop", results)


def selectors_table(records: Records) -> str:
    """Every arm of each protocol against full attention on the same tokens."""
    lines: list[str] = list(HEAD)
    for name in ("perplexity", "variants", "published-protocol", "long-context"):
        record = records[name]
        # The doctor looked at a window of the others' length.
        doctor = None if name == "long-context" else records["diagnoses"]
        arms = dict.fromkeys(str(event.values["arm"]) for event in record.of("scored"))
        lines.append(f"| *{name}, {tokens_scored(record)} tokens* | | | | | | |")
        lines.extend(_row(record, doctor, arm) for arm in arms if arm != FULL)
    return "\n".join(lines) + "\n"


def _row(record: Record, doctor: Record | None, arm: str) -> str:
    pairs = zip(losses(record, arm), losses(record, FULL), strict=True)
    added = [mine - theirs for mine, theirs in pairs]
    mean, error = _mean(added), _standard_error(added)
    read = _mean([e.number("read_share") for e in record.of("scored") if e.values["arm"] == arm])
    keys = ("recall", "mass_recall", "sink_kept")
    seen = [diagnosed(doctor, arm, key) if doctor else [] for key in keys]
    told = " | ".join(f"{_mean(values):.3f}" if values else "" for values in seen)
    return f"| {arm} | {read:.3f} | {added_percent(record, arm)} | {mean:+.4f} ± {error:.4f} | {told} |"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float:
    mean = _mean(values)
    spread = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(spread / len(values))
