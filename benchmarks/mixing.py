"""What mixing adds to a step: a batch of two parts beside one of a single source, and the losses of parts.

scripts/env python benchmarks/mixing.py        # appends to mixing.jsonl

The bound is a fiftieth of a step of 20 ms: 0.4 ms.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from fourfold_parallel.common.records import RecordWriter, hardware, versions
from fourfold_parallel.common.values import to_json
from fourfold_parallel.run.corpora import PythonManual
from fourfold_parallel.run.data import Batch, Packed, RowParts
from fourfold_parallel.run.mixtures import Mixed, MixturePart, MixtureStage, Staged
from fourfold_parallel.run.objective import of_parts
from fourfold_parallel.run.tokenizers import BytePairs

RECORD = Path(__file__).with_suffix(".jsonl")
STEP_MS = 20.0
SHARE = 0.02
SHAPES = ((8, 128), (64, 1024))
"""Rows of a step, and tokens of a row."""
REPEATS, STEPS = 60, 10


def milliseconds(work: Callable[[int], object]) -> float:
    """Least over repeats of the mean over steps: what else the machine does only adds."""
    means = []
    for repeat in range(REPEATS):
        started_s = time.perf_counter()
        for step in range(STEPS):
            work(repeat * STEPS + step)
        means.append((time.perf_counter() - started_s) / STEPS * 1000)
    return min(means)


def mixture(source: Packed, weights: tuple[float, ...]) -> Mixed:
    """The same source in some shares."""
    return Mixed(
        parts=tuple(
            MixturePart(name=f"p{index}", source=source, weight=weight)
            for index, weight in enumerate(weights)
        )
    )


def main() -> None:
    """Time and record both."""
    torch.set_num_threads(1)
    source = Packed(corpus=PythonManual(), tokenizer=BytePairs(vocabulary=1024), held_out=0.05)
    two = mixture(source, (0.05, 0.95))
    staged = Staged(
        stages=(
            MixtureStage(mixture=two, steps=100),
            MixtureStage(mixture=mixture(source, (0.25, 0.75)), steps=10_000),
        )
    )
    with RecordWriter(RECORD) as records:
        for batch, sequence in SHAPES:
            streams = {
                "one source": source.open(sequence=sequence, seed=0),
                "two parts": two.open(sequence=sequence, seed=0),
                "eight parts": mixture(source, (0.125,) * 8).open(sequence=sequence, seed=0),
                "two stages": staged.open(sequence=sequence, seed=0),
            }

            def read(name: str, step: int, batch: int = batch) -> Batch:
                return streams[name].batch(step, batch=batch)  # noqa: B023 - used within the turn

            times = {name: milliseconds(lambda step, n=name: read(n, step)) for name in streams}
            nats = torch.rand(batch, sequence)
            targets = torch.zeros(batch, sequence, dtype=torch.int64)
            parts = RowParts(names=("p0", "p1"), of_rows=tuple(row % 2 for row in range(batch)))
            times["losses of two parts"] = milliseconds(lambda _: of_parts(parts, nats, targets))  # noqa: B023
            added = times["two parts"] - times["one source"] + times["losses of two parts"]
            records.write(
                "mixing",
                batch=batch,
                sequence=sequence,
                **{
                    f"{name.replace(' ', '_')}_ms": round(value, 4) for name, value in times.items()
                },
                added_ms=round(added, 4),
                share_of_20_ms=round(added / STEP_MS, 5),
                holds=added <= SHARE * STEP_MS,
                hardware=to_json(hardware()),
                versions=to_json(versions()),
            )
            print(batch, sequence, times, "added", added)


if __name__ == "__main__":
    main()
