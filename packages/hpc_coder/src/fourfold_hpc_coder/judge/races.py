"""The check of an OpenMP answer for races: its program runs once under `drivers/race.cc`."""

import re
from dataclasses import dataclass
from pathlib import Path

from fourfold_hpc_coder.judge.bench import ANSWER_BEGINS, Bench, built, launched
from fourfold_hpc_coder.judge.build import source_line
from fourfold_hpc_coder.judge.protocol import EndedError, ForgedError
from fourfold_hpc_coder.judge.reference import Reference, call
from fourfold_hpc_coder.vocabulary import Model, Processors

_MEETING = re.compile(r"^fourfold-race (write|read) 0x([0-9a-f]+) 0x([0-9a-f]+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceReport:
    """The result of a look for races."""

    race: str = ""
    """The lines in which two threads meet; empty where none were seen, or nobody had to look."""
    unseen: str = ""
    """The reason why the checker could not tell; empty where it could."""


def find_race(bench: Bench, right: Reference, model: Model, text: str) -> RaceReport:
    """Look for two threads at one address, at least one of which writes.

    Args:
        bench: sandbox, limits; its settings say whether anybody looks.
        right: gives the exercise and an input.
        model: of the answer; only OpenMP's are looked at.
        text: the answer's translation unit.
    """
    if model != "omp" or not bench.settings.races:
        return RaceReport()
    with bench.folder() as folder:
        if built(bench, right.exercise, "omp", text, folder, watched=True).code:
            return RaceReport(unseen="it does not build with the checker")
        wrote = _watched(bench, right, folder)
        if wrote is None:
            return RaceReport(unseen="it does not come to its end under the checker")
        if "fourfold-race unknown" in wrote:
            return RaceReport(
                unseen="it has tasks, nested regions or iterations that wait for others"
            )
        meeting = _MEETING.search(wrote)
        if meeting is None:
            return RaceReport()
        kind, *addresses = meeting.groups()
        program = folder / "out"
        numbers = [source_line(bench.sandbox, program, address) for address in addresses]
    written = text.rpartition(ANSWER_BEGINS)[2].split("\n")
    lines = [" ".join(written[number - 1].split()) for number in numbers if number]
    shown = " and ".join(f"`{line}`" for line in dict.fromkeys(lines))
    act = (
        "two threads write one address" if kind == "write" else "a thread reads what another writes"
    )
    return RaceReport(race=f"{act} in {shown}" if shown else act)


def _watched(bench: Bench, right: Reference, folder: Path) -> str | None:
    """The checker's report on answers to small inputs; None if the program did not get there."""
    with launched(bench, folder, "omp", Processors(threads=2), settings=bench.settings) as channel:
        try:
            channel.connect()
            for arguments in (right.checks[-1].arguments, *right.watched):
                call(channel, right.exercise, arguments)
            channel.quit()
        except (EndedError, ForgedError):
            return None
        return channel.process.finish().stderr
