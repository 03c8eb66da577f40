"""Checkpoints: whole or absent, in plain files, readable by any engine that gathers full state.

A checkpoint is the folder `step-00000100/` with what the session saved (for most engines
`model.safetensors`, `optimizer.safetensors`, `optimizer.json`), what `from_pretrained` reads beside the
weights, and `checkpoint.json`, which says the step, the run and the ranks. It is filled under another name,
synced, and renamed. The order of the data and the learning rate are functions of the step, so nothing else
is state.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold_parallel.common.files import StrPath, sync, write_text
from fourfold_parallel.common.values import (
    Difference,
    differences,
    from_json,
    shown,
    strict,
    tag_of,
    to_json,
)
from fourfold_parallel.launch import world_size
from fourfold_parallel.run.engines import DeepSpeed
from fourfold_parallel.run.recipe import Run, Steps, Tokens, departures, steps_until

_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    """A folder that `from_pretrained` reads, unless it cannot read the kind of model (`export.files`)."""
    step: int
    """Optimizer steps done."""
    run: dict[str, Any]
    """Description of the run that wrote it (`to_json`); empty where an earlier version did."""
    ranks: int
    """Processes that wrote it."""


def checkpoints(folder: StrPath) -> tuple[Checkpoint, ...]:
    """The whole checkpoints in a folder, oldest first; what a killed save left is passed over."""
    folder = Path(folder)
    whole: list[Checkpoint] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if _NAME.fullmatch(path.name):
            meta = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
            whole.append(
                Checkpoint(
                    path=path,
                    step=meta["step"],
                    run=meta.get("run", {}),
                    ranks=meta.get("ranks", 1),
                )
            )
    return tuple(whole)


def latest(folder: StrPath, *, run: Run, extends: bool = False) -> Checkpoint | None:
    """The last whole checkpoint of this run, or None; where it ran does not matter (`departures`).

    Args:
        folder: the run's checkpoints.
        run: must be the run that wrote them.
        extends: the checkpoint's horizon may be a shorter one.

    Raises:
        ValueError: The folder holds another run's checkpoints; the message names the fields.
    """
    whole = checkpoints(folder)
    if not whole:
        return None
    last = whole[-1]
    if not last.run:
        raise ValueError(
            f"{last.path} was written by a version of fourfold whose checkpoints do not describe their run; "
            f"remove {folder} to start over"
        )
    others = [other for other in departures(last.run, run) if not _is_of_horizon(other)]
    if others:
        raise ValueError(
            f"{last.path} was written by another run: {told(others, 'the checkpoint')}. Resume with the "
            f"same recipe, name another folder, or {_anew(last)}"
        )
    if planned_steps(last, run) != run.steps:
        _check_horizon(last, run, extends=extends)
    return last


def planned_steps(last: Checkpoint, run: Run) -> int:
    """Steps that a checkpoint was on its way to; `run` is the same, but for its horizon."""
    horizon = from_json(last.run["horizon"])
    assert isinstance(horizon, Steps | Tokens)
    return steps_until(horizon, tokens_per_step=run.tokens_per_step)


def told(others: list[Difference], place: str) -> str:
    """Differences in one sentence, at most six of them."""
    named = "; ".join(other.told(place) for other in others[:6])
    return named + (f"; and {len(others) - 6} more" if len(others) > 6 else "")


def _anew(last: Checkpoint) -> str:
    return (
        f"begin a run of its own from these weights, with model=Published(name='{last.path}', ...)"
    )


def _is_of_horizon(other: Difference) -> bool:
    return other.path.partition(".")[0] == "horizon"


def _check_horizon(last: Checkpoint, run: Run, *, extends: bool) -> None:
    planned = planned_steps(last, run)
    lengths = f"horizon: {planned} steps in the checkpoint, {run.steps} asked for"
    if run.steps < planned:
        raise ValueError(
            f"{last.path} was written by a longer run ({lengths}); name another folder for the shorter one"
        )
    if not extends:
        raise ValueError(
            f"{last.path} was written by a shorter run ({lengths}); extends=True goes on from it"
        )
    for step in range(last.step):
        factors = [run.schedule.factor(step, steps) for steps in (planned, run.steps)]
        if factors[0] != factors[1]:
            raise ValueError(
                f"{last.path} cannot be extended ({lengths}): the schedule {type(run.schedule).__name__} "
                f"depends on the horizon, and would have had factor {factors[1]:.4g} at step {step + 1}, not "
                f"{factors[0]:.4g}. Use Constant, or Cooldown before its fall, or {_anew(last)}"
            )


def check_layout(last: Checkpoint, run: Run) -> None:
    """Refuse to resume where the engine cannot read what is in a checkpoint.

    Raises:
        ValueError: DeepSpeed wrote it, or is to read it, and stage or ranks differ: its optimizer's state
            lies in partitions of its own.
    """
    before = last.run["engine"]
    partitioned = isinstance(run.engine, DeepSpeed) or before["type"] == tag_of(DeepSpeed)
    is_another = last.ranks != world_size() or differences(before, run.engine)
    if partitioned and is_another:
        raise ValueError(
            f"{last.path} was written by {shown(before)} on {last.ranks} ranks, and is to be read by "
            f"{shown(to_json(run.engine))} on {world_size()}: DeepSpeed's partitions fit the stage and the "
            f"number of ranks that wrote them only. Go on with those, or {_anew(last)}"
        )


def write(
    folder: Path,
    *,
    step: int,
    run: Run,
    save: Callable[[Path], None],
    wait: Callable[[], None],
    is_main: bool,
    beside: Mapping[str, bytes],
) -> None:
    """Write `folder/step-…` whole, then remove the older ones. Every rank calls this.

    What is filled or removed has a hidden name meanwhile; what a kill left of it goes with the next call.

    Args:
        folder: the run's checkpoint folder, the same on every rank.
        step: optimizer steps done.
        run: the run that is trained.
        save: the session's `save`.
        wait: the session's barrier.
        is_main: whether this rank creates, renames and removes.
        beside: files that `from_pretrained` reads beside the weights, by name (`export.files`).
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"
    if is_main:
        for left in folder.glob(".step-*"):
            shutil.rmtree(left)
        partial.mkdir(parents=True)
    wait()
    save(partial)
    wait()
    if is_main:
        for name, content in beside.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_bytes(content)
        meta = {"step": step, "run": strict(to_json(run)), "ranks": world_size()}
        write_text(partial / "checkpoint.json", json.dumps(meta, indent=1))
        for path in partial.rglob("*"):
            sync(path)
        sync(partial)
        if final.exists():
            _remove(final)
        partial.replace(final)
        sync(folder)
        for old in checkpoints(folder)[:-1]:
            _remove(old.path)
    wait()


def _remove(path: Path) -> None:
    """Hide, then remove: half a checkpoint never bears a checkpoint's name."""
    shutil.rmtree(path.replace(path.with_name(f".{path.name}.removed")))
