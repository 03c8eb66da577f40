"""The parts of a training's time, from its record; they add up to the whole.

Ranks wait for one another, disks for space, and validations for nobody; a record says so event by event.
"""

from collections.abc import Iterator, Mapping
from typing import Literal, get_args

from fourfold_parallel.common.records import Event, Record

PartName = Literal[
    "staging", "data", "compute", "exposed communication", "evaluation", "checkpoint", "rest"
]
PARTS: tuple[PartName, ...] = get_args(PartName)


def is_timed(record: Record) -> bool:
    """Whether a record is of a training, and says where its time went."""
    return bool(record.of("staged") and record.of("step"))


def seconds_by_part(record: Record, *, until: Event | None = None) -> Mapping[PartName, float]:
    """Seconds of a training by what they were spent on, as its first rank saw them; they add up to the whole.

    `compute` is what is left of the steps without waiting for data and for other ranks. The grid notes all
    waiting; what DDP and FSDP2 wait for inside backward counts as compute. `rest` is what no event claims:
    records, and after a restart the time until the ranks stood again with the steps that were lost.

    Args:
        record: of one training.
        until: the event with which the time ends, such as the validation that met a target; the record's
            last where none is given.

    Raises:
        ValueError: The record is of no training, or lacks the times.
    """
    if not is_timed(record):
        raise ValueError(f"{record.path} is not the record of a training with its times")
    last = until or record.events[-1]
    first = record.of("staged")[0]
    whole_s = (last.number("at_ms") - first.number("at_ms")) / 1000 + first.number("elapsed_s")

    def total(kind: str, key: str) -> float:
        return sum(event.number(key) for event in record.of(kind) if event.line <= last.line)

    training_s, data_s, waited_s = (
        total("step", key) for key in ("elapsed_s", "data_s", "waited_s")
    )
    parts: dict[PartName, float] = {
        "staging": total("staged", "elapsed_s"),
        "data": data_s,
        "compute": training_s - data_s - waited_s,
        "exposed communication": waited_s,
        "evaluation": total("validation", "elapsed_s"),
        "checkpoint": total("saved", "stall_s") + total("save_failed", "stall_s"),
    }
    return {**parts, "rest": whole_s - sum(parts.values())}


def shown(record: Record) -> Iterator[tuple[str, float, float]]:
    """Part, seconds and share of the whole."""
    parts = seconds_by_part(record)
    whole_s = sum(parts.values())
    for name, seconds in parts.items():
        yield name, seconds, seconds / whole_s
