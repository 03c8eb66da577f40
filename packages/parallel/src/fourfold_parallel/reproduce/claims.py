"""The ledger of claims: what a paper says, the rule that judges it, and what our records show.

A rule is a function of records, written before the run. It measures, gives an interval over seeds, and
decides. What a scale cannot test says what it needs, and is never shown as reproduced.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scipy import stats

from fourfold_parallel.common.files import write_text
from fourfold_parallel.common.records import Record
from fourfold_parallel.common.values import from_json
from fourfold_parallel.reproduce.scale import Scale

Verdict = Literal["reproduced", "contradicted", "inconclusive", "not tested"]

Records = Mapping[str, Record]
"""Finished records of one experiment at one scale, by stage name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean over seeds with its 95 % confidence interval."""

    value: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        """As printed in ledgers: the mean, and the interval where seeds differ."""
        if math.isclose(self.low, self.high):
            return f"{self.value:.3g}"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean over seeds with Student's 95 % interval (no assumption but equal, independent seeds).

    Raises:
        ValueError: for fewer than two seeds, which give no interval.
    """
    if len(values) < 2:
        raise ValueError(f"{len(values)} seeds give no interval; run at least 2")
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * math.sqrt(variance / len(values))
    return Interval(value=mean, low=mean - reach, high=mean + reach, seeds=len(values))


def proportion(successes: int, trials: int, *, seeds: int) -> Interval:
    """A pooled share with Wilson's 95 % interval; for counts such as "documents recited"."""
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} of {trials} is not a share; count at least one trial")
    interval = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return Interval(
        value=successes / trials, low=float(interval.low), high=float(interval.high), seeds=seeds
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a rule measured and decided."""

    verdict: Verdict
    ours: str
    """Our number with its interval, as a person reads it."""
    evidence: str
    """Name of the stage whose record holds the deciding line."""
    line: int
    """1-based line of that record."""
    because: str
    """The rule applied to the numbers, in one sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One statement of a paper that a run can support or contradict."""

    id: str
    section: str
    """Where the paper says it."""
    statement: str
    paper_value: str
    """The paper's number, with its conditions."""
    conditions: str
    """Ours: what differs from the paper's, such as size and data."""
    rule_text: str
    """The rule in words, as fixed before the run."""
    rule: Callable[[Records], Finding]
    scales: tuple[Scale, ...]
    """Where the rule can be applied."""
    needs: str
    """What other scales lack, such as "8 GPUs"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRow:
    """A claim judged at one scale."""

    package: str
    id: str
    section: str
    statement: str
    paper_value: str
    conditions: str
    rule_text: str
    scale: Scale
    verdict: Verdict
    ours: str
    record: str
    """`file:line` of the deciding record line, or empty where not tested."""
    because: str


def judge(
    claims: Sequence[Claim], records: Records, *, package: str, scale: Scale
) -> tuple[LedgerRow, ...]:
    """Apply every rule that the scale allows; the other claims say what they need."""
    rows = []
    for claim in claims:
        if scale in claim.scales:
            finding = claim.rule(records)
        else:
            finding = Finding(
                verdict="not tested", ours="", evidence="", line=0, because=f"needs: {claim.needs}"
            )
        record = records[finding.evidence].path.name if finding.evidence else ""
        rows.append(
            LedgerRow(
                package=package,
                id=claim.id,
                section=claim.section,
                statement=claim.statement,
                paper_value=claim.paper_value,
                conditions=claim.conditions,
                rule_text=claim.rule_text,
                scale=scale,
                verdict=finding.verdict,
                ours=finding.ours,
                record=f"{record}:{finding.line}" if record else "",
                because=finding.because,
            )
        )
    return tuple(rows)


_LEDGER = "fourfold_parallel.run.claims:LedgerRow"
"""Tag of a ledger's rows: the first version's, since committed ledgers are compared to the byte."""


def write_ledger(path: Path, rows: Sequence[LedgerRow]) -> None:
    """Write rows as JSONL, whole."""
    write_text(
        path,
        "".join(json.dumps({"type": _LEDGER, **dataclasses.asdict(row)}) + "\n" for row in rows),
    )


def read_ledger(path: Path) -> tuple[LedgerRow, ...]:
    """Read rows back."""
    rows = [from_json(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return tuple(row for row in rows if isinstance(row, LedgerRow))
