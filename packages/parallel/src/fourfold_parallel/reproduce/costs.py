"""The cost of a scale, as far as committed records hold times."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fourfold_parallel.common.records import Record, read_record
from fourfold_parallel.reproduce.claims import read_ledger
from fourfold_parallel.reproduce.experiment import committed_results


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The time of one package's stages."""

    seconds: float
    """Summed over the stages, which share a machine's cores."""
    timed: int
    """Stages whose record holds a time."""
    stages: int
    machines: tuple[str, ...]

    def __str__(self) -> str:
        """As a person reads it: `25 min in 41 of 61 stages, the others without a time (...)`."""
        on = "; ".join(self.machines)
        if not self.timed:
            return f"{self.stages} stages, whose records hold no time ({on})"
        rest = ", the others without a time" if self.timed < self.stages else ""
        return f"{self.seconds / 60:.0f} min in {self.timed} of {self.stages} stages{rest} ({on})"


def seconds_of(record: Record) -> float:
    """Seconds that a stage took: as its end says, at least the sum of its training steps.

    Where a record holds neither, from its first event to its last; 0 where its events have no time.
    """
    steps = sum(event.number("elapsed_s") for event in record.of("step"))
    last = record.events[-1].values.get("elapsed_s")
    if isinstance(last, int | float):
        return max(steps, last)
    at_ms = [event.number("at_ms") for event in record.events if "at_ms" in event.values]
    return steps or (at_ms[-1] - at_ms[0]) / 1000 if at_ms else steps


def cost(records: Iterable[Record]) -> Cost:
    """The cost of the stages that left these records."""
    records = tuple(records)
    seconds = [seconds_of(record) for record in records]
    return Cost(
        seconds=sum(seconds),
        timed=sum(second > 0 for second in seconds),
        stages=len(records),
        machines=tuple(dict.fromkeys(map(_machine, records))),
    )


def _machine(record: Record) -> str:
    hardware = record.events[0].values["hardware"]
    assert isinstance(hardware, dict)
    return f"{hardware['processor']}, {hardware['cores']} cores"


def committed_cost(package: str, scale: str) -> tuple[Cost, ...]:
    """The cost of a package's committed records, where it commits any of this scale."""
    folder: Path = committed_results(package)
    ledger = folder / "ledger.jsonl"
    if not ledger.exists() or read_ledger(ledger)[0].scale != scale:
        return ()
    return (cost(read_record(path) for path in sorted(folder.glob("*.jsonl")) if path != ledger),)
