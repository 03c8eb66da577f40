"""The ledger of claims: what a paper says, the rule that judges it, and what our records show.

A rule is a function of records, written before the run. It measures, gives an interval over seeds, and
decides. What a scale cannot test says what it needs, and is never shown as reproduced.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

from fourfold_parallel.common.files import write_text
from fourfold_parallel.common.records import Event, Record
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
    from scipy import stats

    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * math.sqrt(variance / len(values))
    return Interval(value=mean, low=mean - reach, high=mean + reach, seeds=len(values))


def proportion(successes: int, trials: int, *, seeds: int) -> Interval:
    """A pooled share with Wilson's 95 % interval; for counts such as "documents recited"."""
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} of {trials} is not a share; count at least one trial")
    from scipy import stats

    interval = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return Interval(
        value=successes / trials, low=float(interval.low), high=float(interval.high), seeds=seeds
    )


def decide(*, reproduced: bool, contradicted: bool) -> Verdict:
    """The verdict of two conditions that exclude each other; neither leaves it open."""
    return "reproduced" if reproduced else "contradicted" if contradicted else "inconclusive"


def unanimous(*, holds: Iterable[bool], fails: Iterable[bool]) -> Verdict:
    """Reproduced where every seed holds, contradicted where every seed fails, else inconclusive."""
    return decide(reproduced=all(holds), contradicted=all(fails))


@dataclass(frozen=True, slots=True)
class Finding:
    """The measurement and the decision of a rule."""

    verdict: Verdict
    ours: str
    """Our number with its interval, as a person reads it."""
    event: Event
    """The record line that decides."""
    because: str
    """The rule applied to the numbers, in one sentence."""


class NotTestedError(Exception):
    """A rule lacks what it judges; the message names it: `a copy of the paper's repository`."""


Rule = Callable[[Records], Finding]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One statement of a paper that a run can support or contradict."""

    id: str
    section: str
    """Where the paper says it."""
    says: str
    """What the paper says, in one sentence."""
    paper: str
    """The paper's number, with its conditions."""
    conditions: str
    """Ours: what differs from the paper's, such as size and data."""
    rule: str
    """The rule in words, as fixed before the run."""
    judge: Rule
    """The rule as a function of finished records."""
    scales: tuple[Scale, ...]
    """Where the rule can be applied."""
    needs: str
    """What other scales lack, such as "8 GPUs"."""


def claim(
    identity: str,
    *,
    section: str,
    says: str,
    paper: str,
    rule: str,
    conditions: str,
    scales: tuple[Scale, ...],
    needs: str,
) -> Callable[[Rule], Claim]:
    """Make the function below it the claim that it judges.

    The function takes the finished records by stage name and gives a `Finding`; where it lacks
    something it raises `NotTestedError`. The arguments are the fields of `Claim`.
    """

    def of(judge: Rule) -> Claim:
        return Claim(
            id=identity, section=section, says=says, paper=paper, conditions=conditions, rule=rule,
            judge=judge, scales=scales, needs=needs,
        )  # fmt: skip

    return of


def beyond_us(
    identity: str,
    *,
    section: str,
    says: str,
    paper: str,
    rule: str,
    needs: str,
    conditions: str = "",
) -> Claim:
    """A claim that no scale here can test: it stays in the ledger, with what it needs."""

    def judge(records: Records) -> Finding:
        del records
        raise NotTestedError(needs)

    return claim(
        identity, section=section, says=says, paper=paper, rule=rule, conditions=conditions, scales=(),
        needs=needs,
    )(judge)  # fmt: skip


def claims_of(*modules: ModuleType) -> tuple[Claim, ...]:
    """The claims that modules define, in the order in which they stand there."""
    return tuple(
        value for module in modules for value in vars(module).values() if isinstance(value, Claim)
    )


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
        verdict, ours, record, because = "not tested", "", "", f"needs: {claim.needs}"
        if scale in claim.scales:
            try:
                finding = claim.judge(records)
            except NotTestedError as missing:
                because = f"needs: {missing}"
            else:
                verdict, ours, because = finding.verdict, finding.ours, finding.because
                record = f"{finding.event.file}:{finding.event.line}"
        rows.append(
            LedgerRow(
                package=package,
                id=claim.id,
                section=claim.section,
                statement=claim.says,
                paper_value=claim.paper,
                conditions=claim.conditions,
                rule_text=claim.rule,
                scale=scale,
                verdict=verdict,
                ours=ours,
                record=record,
                because=because,
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
    """Read rows back.

    Raises:
        ValueError: A line is no row of a ledger.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = [from_json(json.loads(line)) for line in lines if line]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, LedgerRow):
            raise ValueError(f"{path}:{number} is no row of a ledger; judge the records again")
    return tuple(row for row in rows if isinstance(row, LedgerRow))
