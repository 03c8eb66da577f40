"""The storm itself: kill, look at what is left, start again, until the run has ended; then compare."""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fourfold_parallel.common.progress import Progress
from fourfold_parallel.common.records import RecordWriter, read_record
from fourfold_parallel.common.values import to_json
from fourfold_parallel.run import checkpoint, shards
from fourfold_parallel.run.recipe import Run
from fourfold_parallel.run.shards import Manifest
from fourfold_parallel.storm import pairs
from fourfold_parallel.storm.ranks import MOMENTS, drawn, launch, wait
from fourfold_parallel.storm.study import Small, Storm
from fourfold_parallel.testing.grids import Sizes, factorisations
from fourfold_parallel.testing.ranks import run_on_ranks

BOUND_S = 30.0
"""After a rank's death the others have so long to end by themselves."""
EXACT = 1e-12
"""Of a parameter after the step that follows a load, in float64 (research, K1)."""


@dataclass(slots=True)
class Reference:
    """The run without a storm, on one grid."""

    losses: list[float]
    tensors: Any
    """Shape, format and checksum of every weight and moment at the end."""
    folder: Path


@dataclass(slots=True)
class Toll:
    """The findings of a storm so far."""

    kills: Counter[str] = field(default_factory=Counter)
    lost: list[int] = field(default_factory=list)
    """Steps done after the last whole checkpoint, at each kill."""
    ended_s: list[float] = field(default_factory=list)
    lives: int = 0
    faults: list[str] = field(default_factory=list)
    """Everything that should not be, one sentence each."""


def storm(study: Storm, folder: Path, records: RecordWriter, progress: Progress) -> Toll:
    """Rage, and record every kill, every life, the planted faults and the pairs of grids.

    Args:
        study: what to do.
        folder: for checkpoints; is emptied.
        records: gets the events.
        progress: told after each kill.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    toll, generator = Toll(), random.Random(study.seed)  # noqa: S311 - no secret
    match study.runs:
        case Small():
            runs = study.runs.runs(folder / "corpus")
        case Run():
            runs = (study.runs,)
    references = [_reference(run, folder / f"calm-{i}", study.ranks) for i, run in enumerate(runs)]
    while sum(toll.kills.values()) < study.kills:
        index = toll.lives % len(runs)
        here = folder / f"life-{toll.lives}"
        _live(study, runs[index], references[index], here, generator, records, toll, progress)
    _plant(references[0], folder, study.ranks, records, toll)
    if study.pairs_of:
        _try_pairs(factorisations(study.pairs_of), study.pairs_of, folder / "pairs", records, toll)
    records.write(
        "storm", kills=dict(toll.kills), lives=toll.lives, steps_lost=sum(toll.lost),
        most_lost=max(toll.lost, default=0), slowest_end_s=round(max(toll.ended_s, default=0.0), 2),
        faults=toll.faults,
    )  # fmt: skip
    return toll


def _described(run: Run, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(to_json(run)), encoding="utf-8")


def _reference(run: Run, folder: Path, ranks: int) -> Reference:
    _described(run, folder)
    codes, _ = wait(launch(folder, ranks=ranks, kill=None), bound_s=BOUND_S)
    if any(codes):
        raise ValueError(
            f"the run fails without a storm too (exit codes {codes}); {folder}/rank-0.log says why"
        )
    losses, tensors = _ending(folder)
    return Reference(losses=losses, tensors=tensors, folder=folder)


def _ending(folder: Path) -> tuple[list[float], Any]:
    losses = [
        event.number("loss_nats") for event in read_record(folder / "record.jsonl").of("step")
    ]
    last = checkpoint.checkpoints(folder / "checkpoints")[-1]
    return losses, Manifest.read(last.path).tensors


def _live(
    study: Storm, run: Run, reference: Reference, folder: Path, generator: random.Random,
    records: RecordWriter, toll: Toll, progress: Progress,
) -> None:  # fmt: skip
    """One run from its beginning to its end, through kills."""
    _described(run, folder)
    killed = 0
    while True:
        kill = None
        if sum(toll.kills.values()) < study.kills:
            moment = min(MOMENTS, key=lambda name: (toll.kills[name], generator.random()))
            kill = drawn(
                generator,
                moment=moment,
                ranks=study.ranks,
                steps=2 * run.checkpoint_every,
                collectives=6,
            )
        codes, ended_s = wait(launch(folder, ranks=study.ranks, kill=kill), bound_s=BOUND_S)
        if None in codes:
            toll.faults.append(
                f"{folder.name}: a rank did not end within {BOUND_S:.0f} s of {kill}"
            )
        if not any(codes):
            break
        if kill is None or codes[kill.rank] != -9:
            toll.faults.append(f"{folder.name}: exit codes {codes} without a kill")
            break
        killed += 1
        toll.kills[kill.moment] += 1
        toll.ended_s.append(ended_s)
        done, whole = _left_behind(folder, toll)
        toll.lost.append(done - whole)
        records.write(
            "kill", life=toll.lives, grid=to_json(run.engine), moment=kill.moment, rank=kill.rank,
            step=done, whole_step=whole, steps_lost=done - whole, others_ended_s=round(ended_s, 3),
        )  # fmt: skip
        progress(
            sum(toll.kills.values()),
            study.kills,
            f"{kill.moment} at step {done}, {done - whole} lost",
        )
    losses, tensors = _ending(folder)
    alike = {"losses": losses == reference.losses, "weights": tensors == reference.tensors}
    toll.faults += [
        f"{folder.name}: other {name} than without a storm"
        for name, equal in alike.items()
        if not equal
    ]
    hidden = [path.name for path in (folder / "checkpoints").glob(".*")]
    if hidden:
        toll.faults.append(f"{folder.name}: {hidden} are left when the run has ended")
    toll.lives += 1
    records.write(
        "life", grid=to_json(run.engine), kills=killed, steps=len(losses),
        losses_equal=alike["losses"], weights_equal=alike["weights"],
    )  # fmt: skip
    shutil.rmtree(folder)


def _left_behind(folder: Path, toll: Toll) -> tuple[int, int]:
    """Steps done and steps safe after a kill; whatever bears a checkpoint's name is sound."""
    record = folder / "record.jsonl"
    steps = [0]
    if record.exists() and record.stat().st_size:
        steps += [int(event.number("step")) for event in read_record(record).of("step")]
    whole = checkpoint.checkpoints(folder / "checkpoints")
    for each in whole:
        toll.faults += list(shards.faults(each.path))
    pointer = folder / "checkpoints" / checkpoint.LATEST
    if pointer.exists():
        named = pointer.read_text(encoding="utf-8").strip()
        if named not in {each.path.name for each in whole}:
            toll.faults.append(f"{pointer} names {named!r}, which is not there")
    safe = whole[-1].step if whole else 0
    return max(steps[-1], safe), safe


def _plant(
    reference: Reference, folder: Path, ranks: int, records: RecordWriter, toll: Toll
) -> None:
    """Two faults that must be found: a byte that is flipped, and a shard of an earlier save."""
    for kind in ("flipped byte", "stale shard"):
        here = folder / f"planted-{kind.replace(' ', '-')}"
        shutil.copytree(reference.folder, here)
        older, last = checkpoint.checkpoints(here / "checkpoints")[-2:]
        (last.path / shards.PLAIN).unlink(missing_ok=True)
        name = sorted(path.name for path in last.path.glob("model*.safetensors"))[-1]
        if kind == "flipped byte":
            content = bytearray((last.path / name).read_bytes())
            content[-7] ^= 16
            (last.path / name).write_bytes(content)
        else:
            shutil.copyfile(older.path / name, last.path / name)
        told = list(shards.faults(last.path))
        codes, _ = wait(launch(here, ranks=ranks, kill=None), bound_s=BOUND_S)
        resumed = [int(e.number("step")) for e in read_record(here / "record.jsonl").of("resumed")]
        losses, tensors = _ending(here)
        is_found = (
            len(told) == 1 and name in told[0] and not any(codes) and resumed == [older.step]
            and (losses, tensors) == (reference.losses, reference.tensors)
        )  # fmt: skip
        records.write(
            "planted", fault=kind, found=is_found, told=told[0].partition(": ")[2] if told else "",
            file=name, resumed_from=resumed[-1] if resumed else None,
        )  # fmt: skip
        if not is_found:
            toll.faults.append(
                f"the planted {kind} was not found, or not survived: {told}, {codes}, {resumed}"
            )


def _try_pairs(
    grids: list[Sizes], ranks: int, folder: Path, records: RecordWriter, toll: Toll
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    started_s = time.perf_counter()
    sources, worst = [], 0.0
    for grid in grids:
        here = folder / "-".join(map(str, grid))
        run_on_ranks(ranks, pairs.saved, sizes=grid, folder=here)
        sources.append(here / "step-00000000")
    for grid in grids:
        worst = max(
            worst, *run_on_ranks(ranks, pairs.worst_difference, sources=sources, target=grid)
        )
    records.write(
        "pairs", ranks=ranks, pairs=len(grids) ** 2, worst_difference=worst,
        equal=worst <= EXACT, elapsed_s=round(time.perf_counter() - started_s, 1),
    )  # fmt: skip
    if not worst <= EXACT or math.isnan(worst):
        toll.faults.append(f"after a load on another grid a parameter differs by {worst:.2g}")
