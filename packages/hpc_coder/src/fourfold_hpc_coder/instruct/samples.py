"""One instruction with its answer, and where it came from; as JSONL."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from fourfold_hpc_coder.vocabulary import Model
from fourfold_parallel.common.files import write_text

Category = Literal["programming", "parallelization", "translation", "optimization"]
"""HPC-Instruct's four kinds of tasks; its published files do not say which is which."""
ANY: tuple[Category, ...] = get_args(Category)


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Enough to find, check and license a sample."""

    teacher: str
    """Who wrote the answer: `templates`, or an endpoint's model."""
    task: str
    """Name of the grammar's task, or digest of the seed."""
    seed_origin: str
    """Package, path and lines of the real source it was made from; empty for none."""
    licence: str
    tokens: int = 0
    """Of the request and its answer, as the endpoint counted them; 0 for what costs nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionSample:
    """An instruction and an answer."""

    category: Category
    model: Model
    """Parallel model of the answer."""
    instruction: str
    answer: str
    provenance: Provenance
    verdict: str
    """Of the scorer, when the answer was compiled and run."""


def write_samples(path: Path, samples: Iterable[InstructionSample]) -> None:
    """Write JSONL, whole: one sample per line."""
    lines = [json.dumps(asdict(sample), sort_keys=True) for sample in samples]
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_samples(path: Path, *, is_being_made: bool = False) -> tuple[InstructionSample, ...]:
    """Read JSONL back, whose lines end with line feeds alone; blank ones say nothing.

    Args:
        path: of the file.
        is_being_made: whether a last line that was cut is left out, to be made again.

    Raises:
        ValueError: for a line that is no sample.
    """
    samples = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip() or (is_being_made and number == len(lines)):
            continue
        try:
            fields = json.loads(line)
            fields["provenance"] = Provenance(**fields["provenance"])
            samples.append(InstructionSample(**fields))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"line {number} of {path} is no sample ({error}); remove it, or make the file again"
            ) from None
    return tuple(samples)
