"""The cost of a scale: what each stage took, kept beside the records."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold_parallel.common.files import write_text
from fourfold_parallel.common.records import commit, hardware
from fourfold_parallel.reproduce.claims import read_ledger
from fourfold_parallel.reproduce.scale import Scale

NAME = "times.json"
"""By stage: its seconds, and the machine and commit on which it took them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The time of one package's stages, one after another."""

    seconds: float
    stages: int
    machines: tuple[str, ...]

    def __str__(self) -> str:
        """As a person reads it: `25 min for 41 stages (AMD EPYC, 2 cores)`."""
        return f"{self.seconds / 60:.0f} min for {self.stages} stages ({'; '.join(self.machines)})"


def note(folder: Path, stage: str, seconds: float) -> None:
    """Keep what a stage took since it was last begun, beside what the others took."""
    machine = hardware()
    times = _times(folder)
    times[stage] = {
        "seconds": round(seconds, 1),
        "machine": f"{machine['processor']}, {machine['cores']} cores",
        "commit": commit(),
    }
    write_text(folder / NAME, json.dumps(times, indent=1) + "\n")


def cost_of(folder: Path, scale: Scale) -> Cost | None:
    """The time of the stages whose records a folder holds; None where it holds none of this scale."""
    ledger = folder / "ledger.jsonl"
    times = _times(folder)
    if not times or not ledger.exists() or read_ledger(ledger)[0].scale != scale:
        return None
    return Cost(
        seconds=sum(time["seconds"] for time in times.values()),
        stages=len(times),
        machines=tuple(dict.fromkeys(time["machine"] for time in times.values())),
    )


def _times(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
