"""A storm's record as a table and a figure."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fourfold_parallel.common.records import Event, Record
from fourfold_parallel.reproduce.claims import Records
from fourfold_parallel.reproduce.tables import markdown
from fourfold_parallel.storm.ranks import MOMENTS


def kills_of(record: Record, moment: str) -> tuple[Event, ...]:
    """The kills in a part of the step or of a save."""
    return record.of("kill", moment=moment)


def table(records: Records) -> str:
    """Kills by moment, what they cost, and whether the runs ended as without a storm."""
    record = records["storm"]
    rows = []
    for moment in MOMENTS:
        kills = kills_of(record, moment)
        lost = [int(kill.number("steps_lost")) for kill in kills]
        ended = [kill.number("others_ended_s") for kill in kills]
        rows.append(
            [moment, str(len(kills)), str(sum(lost)), str(max(lost, default=0)),
             f"{max(ended, default=0.0):.1f}"]
        )  # fmt: skip
    return (
        markdown(
            [
                "killed in",
                "kills",
                "steps lost",
                "most by one",
                "others had ended after, s, at most",
            ],
            rows,
            numeric=True,
        )
        + "\n"
        + sentence(record)
        + pairs_sentence(records["grid-pairs"])
        + "\n"
    )


def sentence(record: Record) -> str:
    """The findings of a storm, in words."""
    total, lives = record.last("storm"), record.of("life")
    equal = sum(
        bool(life.values["losses_equal"] and life.values["weights_equal"]) for life in lives
    )
    planted = [
        str(fault.values["fault"]) for fault in record.of("planted") if fault.values["found"]
    ]
    faults: Any = total.values["faults"]
    told = (
        f"{len(record.of('kill'))} kills in {len(lives)} runs; {equal} of {len(lives)} ended with every "
        f"recorded loss and every weight and moment equal, bit for bit, to the run without kills on the same "
        f"grid. Planted and found: {' and '.join(planted) or 'nothing'}. Left behind: "
        f"{'nothing' if not faults else '; '.join(faults)}."
    )
    return told + pairs_sentence(record)


def pairs_sentence(record: Record) -> str:
    """The outcome of loading every grid's checkpoint on every grid; empty where that was left out."""
    return "".join(
        f" All {int(pairs.number('pairs'))} pairs of grids of {int(pairs.number('ranks'))} ranks: the "
        f"parameters after the step that follows a load differ from one process by "
        f"{pairs.number('worst_difference'):.1e} at most, in float64."
        for pairs in record.of("pairs")
    )


def figure(records: Records) -> Any:
    """The steps that kills cost, by what it came in."""
    from matplotlib.figure import Figure

    from fourfold_parallel.reproduce.figures import SHADES

    record = records["storm"]
    drawn = Figure(figsize=(7.2, 3.2))
    axes = drawn.subplots()
    most = max(int(kill.number("steps_lost")) for kill in record.of("kill"))
    below = [0] * (most + 1)
    for index, moment in enumerate(MOMENTS):
        counts = Counter(int(kill.number("steps_lost")) for kill in kills_of(record, moment))
        heights = [counts[lost] for lost in range(most + 1)]
        axes.bar(
            range(most + 1), heights, bottom=below, label=moment, color=SHADES[index % len(SHADES)],
            edgecolor="white", linewidth=0.6,
        )  # fmt: skip
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set(xlabel="steps lost by a kill", ylabel="kills")
    axes.set_xticks(range(most + 1))
    axes.legend(title="killed in", ncols=2)
    return drawn
