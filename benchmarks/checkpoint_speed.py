"""Saving and loading beside torch's distributed checkpoint used plainly, and accelerate's `save_state`.

    torchrun --nproc-per-node 2 benchmarks/checkpoint_speed.py [--rounds 5] [--memory-saves 50] [--out FILE]

One session (DDP, a Llama of 98 million parameters with AdamW's moments, float32) is saved and loaded by
all in turn, round by round, so that what else the machine does falls on all alike. A row is a ratio of
medians; the stall is the time after which the next step may begin. Then so many saves in a row: resident
memory. Last, what it costs to note phases and waits: the time of a note, their number in a step of a grid
(depth=2, four layers of width 256, 1,024 tokens), and the step.
"""

import argparse
import os
import shutil
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from fourfold_parallel.common.activity import NOW
from fourfold_parallel.common.records import RecordWriter, header
from fourfold_parallel.grid.engine import Fourfold
from fourfold_parallel.launch import Ranks
from fourfold_parallel.run.checkpoint import Keep, Saver, restore
from fourfold_parallel.run.engines import DDP
from fourfold_parallel.run.models import Llama
from fourfold_parallel.run.objective import token_nats

MODEL = Llama(
    width=768, depth=12, heads=12, kv_heads=12, hidden=2048, vocabulary=8192, context=64, tied=False
)


def anonymous_bytes() -> int:
    """Memory that is this process' own; pages of a mapped file are the system's to drop."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@contextmanager
def peak_over(before: int) -> Iterator[list[int]]:
    """The most that this process held at a time within the scope, over what it held before."""
    found, ends = [0], threading.Event()

    def watch() -> None:
        while not ends.is_set():
            found[0] = max(found[0], anonymous_bytes() - before)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        ends.set()
        watcher.join()


def main() -> None:
    """Measure, and write one record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-saves", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--folder", type=Path, default=Path("out/checkpoint_speed"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = MODEL.build(seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    with DDP().open(model, optimizer, precision="fp32", batch=2, microbatch=1) as session:
        tokens = torch.randint(
            0, 8192, (1, 16), generator=torch.Generator().manual_seed(session.rank)
        )
        with session.microbatch(is_last=True):
            session.backward(
                session.model(input_ids=tokens, use_cache=False).logits.logsumexp(-1).mean()
            )
        session.update(1.0)
        measure(session, arguments)


def measure(session: Any, arguments: argparse.Namespace) -> None:
    """Rounds, then memory."""
    ranks = Ranks()
    record = arguments.out if ranks.rank == 0 else None
    if record is not None:
        record.unlink(missing_ok=True)
    nbytes = sum(part.values.nbytes for _, held in session.state().tensors() for part in held.parts)
    with RecordWriter(record) as records:
        records.write_header(
            header(MODEL, seed=0, world_size=ranks.size, materials=(), overrides=())
        )
        if arguments.rounds:
            take_turns(session, ranks, records, nbytes, arguments)
        if arguments.memory_saves:
            remember(session, ranks, records, nbytes, arguments)
        note_costs(ranks, records)
        records.write("finished")
    shutil.rmtree(arguments.folder, ignore_errors=True)


def note_costs(ranks: Ranks, records: RecordWriter) -> None:
    """The share of a step that goes into noting its phases and waits."""
    shape = replace(
        MODEL, width=256, depth=4, heads=4, kv_heads=4, hidden=768, vocabulary=2048, context=128
    )
    model = shape.build(seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(0, 2048, (4, 128), generator=torch.Generator().manual_seed(ranks.rank))
    marks, steps_s = [0], []
    with Fourfold(depth=2).open(
        model, optimizer, precision="fp32", batch=8, microbatch=4
    ) as session:
        for turn in range(8):
            if turn == 1:
                NOW.listeners.append(lambda _: marks.__setitem__(0, marks[0] + 1))
            if turn == 2:
                NOW.listeners.clear()
            started_s = time.perf_counter()
            NOW.enter("forward")
            with session.microbatch(is_last=True):
                loss = token_nats(
                    session.model(input_ids=tokens[:, :-1], use_cache=False).logits,
                    tokens[:, 1:],
                    session.model,
                ).mean()
                NOW.enter("backward")
                session.backward(loss)
            NOW.enter("update")
            session.update(1.0)
            steps_s.append(time.perf_counter() - started_s)
    started_s = time.perf_counter()
    for _ in range(10_000):
        NOW.begin_waiting(None)
        NOW.end_waiting()
    note_s = (time.perf_counter() - started_s) / 10_000
    step_s = statistics.median(steps_s[2:])
    records.write(
        "notes", notes=marks[0], note_us=round(1e6 * note_s, 3), step_s=round(step_s, 4),
        share=round(marks[0] * note_s / step_s, 6),
    )  # fmt: skip


def take_turns(
    session: Any, ranks: Ranks, records: RecordWriter, nbytes: int, arguments: argparse.Namespace
) -> None:
    """Every contender once in each round, and the ratios of their medians."""
    contenders = Contenders(session, arguments.folder)
    seconds: dict[str, list[float]] = {}
    for turn in range(arguments.rounds + 1):
        for name, action in contenders.actions().items():
            session.wait()
            elapsed_s = action()
            slowest = float(ranks.table([elapsed_s]).max())
            if turn:  # the first is for warming up
                seconds.setdefault(name, []).append(slowest)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        records.write(
            "timed",
            what=name,
            median_s=round(medians[name], 4),
            seconds=[round(v, 4) for v in values],
            shard_bytes=nbytes,
        )
    records.write(
        "ratios",
        stall_over_blocking=round(medians["ours, stall"] / medians["ours, blocking"], 4),
        torch_stall_over_ours=round(medians["torch, stall"] / medians["ours, stall"], 3),
        torch_blocking_over_ours=round(medians["torch, blocking"] / medians["ours, blocking"], 3),
        accelerate_blocking_over_ours=round(
            medians["accelerate, blocking"] / medians["ours, blocking"], 3
        ),
        torch_load_over_ours=round(medians["torch, load"] / medians["ours, load"], 3),
        accelerate_load_over_ours=round(medians["accelerate, load"] / medians["ours, load"], 3),
        megabytes_per_s=round(ranks.size * nbytes / medians["ours, blocking"] / 1e6, 1),
    )
    contenders.close()


class Contenders:
    """Ways to save and load a session; each gives the seconds that this rank waited."""

    def __init__(self, session: Any, folder: Path) -> None:
        self._session, self._folder = session, folder
        self._saver = Saver(folder / "ours", session, run={}, beside={}, keep=Keep(last=1))
        self._accelerator = session._accelerator  # noqa: SLF001 - to save by its own means
        self._bare = session._bare()  # noqa: SLF001
        self._step = 0
        self._cpu: Any = dist.new_group(backend="gloo")

    def actions(self) -> dict[str, Callable[[], float]]:
        """By what is timed."""
        return {
            "ours, blocking": self._ours_blocking, "torch, blocking": self._torch_blocking,
            "accelerate, blocking": self._accelerate_blocking, "ours, stall": self._ours_stall,
            "torch, stall": self._torch_stall, "ours, load": self._ours_load,
            "torch, load": self._torch_load, "accelerate, load": self._accelerate_load,
        }  # fmt: skip

    def close(self) -> None:
        """Let the last save end."""
        self._saver.finish()

    def _fresh(self, name: str) -> Path:
        folder = self._folder / name
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        dist.barrier()
        return folder

    def _ours_blocking(self) -> float:
        started_s = time.perf_counter()
        self._step += 1
        self._saver.save(self._step)
        self._saver.finish()
        return time.perf_counter() - started_s

    def _ours_stall(self) -> float:
        self._step += 1
        stall_s = self._saver.save(self._step)
        self._saver.finish()
        return stall_s

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(*self._bare)
        return {"model": model, "optimizer": optimizer}

    def _torch_blocking(self) -> float:
        folder = self._fresh("torch")
        started_s = time.perf_counter()
        dcp.state_dict_saver.save(self._state(), checkpoint_id=folder)
        return time.perf_counter() - started_s

    def _torch_stall(self) -> float:
        folder = self._fresh("torch-async")
        started_s = time.perf_counter()
        saving: Any = dcp.state_dict_saver.async_save(
            self._state(), checkpoint_id=folder, process_group=self._cpu
        )
        stall_s = time.perf_counter() - started_s
        saving.result()
        return stall_s

    def _accelerate_blocking(self) -> float:
        folder = self._fresh("accelerate")
        started_s = time.perf_counter()
        self._accelerator.save_state(str(folder))
        dist.barrier()
        return time.perf_counter() - started_s

    def _ours_load(self) -> float:
        started_s = time.perf_counter()
        restore(self._session, self._folder / "ours" / f"step-{self._step:08d}")
        return time.perf_counter() - started_s

    def _torch_load(self) -> float:
        started_s = time.perf_counter()
        state = self._state()
        dcp.state_dict_loader.load(state, checkpoint_id=self._folder / "torch")
        set_state_dict(
            *self._bare, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        return time.perf_counter() - started_s

    def _accelerate_load(self) -> float:
        started_s = time.perf_counter()
        self._accelerator.load_state(str(self._folder / "accelerate"))
        return time.perf_counter() - started_s


def remember(
    session: Any, ranks: Ranks, records: RecordWriter, nbytes: int, arguments: argparse.Namespace
) -> None:
    """Resident memory over many saves, and the peak of a save and a load over the shard."""
    folder = arguments.folder / "memory"
    before = anonymous_bytes()
    resident: list[int] = []
    with peak_over(before) as saving:
        saver = Saver(folder, session, run={}, beside={}, keep=Keep(last=1))
        for step in range(1, arguments.memory_saves + 1):
            saver.save(step)
            saver.finish()
            resident.append(anonymous_bytes())
    last = folder / f"step-{arguments.memory_saves:08d}"
    # A load replaces the moments: those that are there count as room.
    with peak_over(anonymous_bytes()) as loading:
        restore(session, last, ranks=ranks)
    table = ranks.table(
        [resident[-1] - resident[4], saving[0] / nbytes, (loading[0] + nbytes) / nbytes]
    )
    records.write(
        "memory", saves=arguments.memory_saves, pid_count=ranks.size, shard_bytes=nbytes,
        growth_bytes=[int(value) for value in table[:, 0]],
        saving_over_shard=[round(float(value), 3) for value in table[:, 1]],
        loading_over_shard=[round(float(value), 3) for value in table[:, 2]],
    )  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
