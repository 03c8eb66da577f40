"""The record and the clock of a training, as a share of a step of 50 ms.

    scripts/env python benchmarks/record_overhead.py [--steps 5000] [--out FILE]

Everything that a step of the loop does for its record alone is done here, without a step: phases, waits,
clocks, and the line that is written, with as many values as a step of a grid has. Medians of rounds, by
the clock of the processor and by that of the wall, which counts what else the machine does.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from fourfold_parallel.common.activity import NOW
from fourfold_parallel.common.records import RecordWriter, header

PHASES = ("data", "forward", "backward", "update", "record", "meeting", "checkpoint")
WAITS = 60
"""Collectives that a step of a grid of four layers waits for."""
STEP_S = 0.05
ROUNDS = 9


def note_step(records: RecordWriter, step: int) -> None:
    """What one step notes and writes."""
    NOW.step = step
    started_s, waited_s = time.perf_counter(), NOW.waits_s()
    for phase in PHASES:
        NOW.enter(phase)
    for _ in range(WAITS):
        NOW.begin_waiting("a collective")  # as the grid does
        NOW.end_waiting()
    counts, _ = NOW.take()
    records.write(
        "step", step=step, loss_nats=3.14159265358979, supervised_targets=8192, learning_rate=1e-3,
        grad_norm=0.5772156649, elapsed_s=round(time.perf_counter() - started_s, 4), data_s=0.0012,
        waited_s=round(NOW.waits_s() - waited_s, 4), tokens_per_s=163840.0, peak_bytes=123456789, **counts,
    )  # fmt: skip


def main() -> None:
    """Measure, print, and write a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/record_overhead.jsonl"))
    asked = parser.parse_args()
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(ROUNDS):
            with RecordWriter(Path(folder) / f"{number}.jsonl") as records:
                started_s, begun_s = time.perf_counter(), time.process_time()
                for step in range(asked.steps):
                    note_step(records, step)
                ended = time.perf_counter() - started_s, time.process_time() - begun_s
                rounds.append([seconds / asked.steps for seconds in ended])
    wall_s, processor_s = (statistics.median(column) for column in zip(*rounds, strict=True))
    asked.out.unlink(missing_ok=True)
    with RecordWriter(asked.out) as records:
        described = {"steps": asked.steps, "rounds": ROUNDS, "waits": WAITS, "step_s": STEP_S}
        records.write_header(header(described, seed=0, world_size=1, materials=(), overrides=()))
        records.write(
            "overhead", processor_s=round(processor_s, 8), wall_s=round(wall_s, 8),
            processor_share=round(processor_s / STEP_S, 6), wall_share=round(wall_s / STEP_S, 6),
        )  # fmt: skip
        records.write("finished")
    told = f"{1e6 * processor_s:.0f} us of the processor ({1e6 * wall_s:.0f} by the wall)"
    print(f"{told}, {100 * processor_s / STEP_S:.2f} % of {1000 * STEP_S:.0f} ms")


if __name__ == "__main__":
    main()
