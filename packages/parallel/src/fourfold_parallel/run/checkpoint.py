"""Checkpoints: whole or absent, in plain files, readable by any engine that gathers full state.

A checkpoint is the folder `step-00000100/` with what the session saved (for most engines
`model.safetensors`, `optimizer.safetensors`, `optimizer.json`) and `checkpoint.json`, which says the
step and the run. It is filled under another name, synced, and renamed. The order of the data and the
learning rate are functions of the step, so nothing else is state.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fourfold_parallel.common.files import sync, write_text

_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    step: int
    """Optimizer steps done."""
    run_sha256: str
    """Digest of the run that wrote it."""


def checkpoints(folder: Path) -> tuple[Checkpoint, ...]:
    """The whole checkpoints in a folder, oldest first; what a killed save left is passed over."""
    found = []
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if _NAME.fullmatch(path.name):
                meta = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
                found.append(
                    Checkpoint(path=path, step=meta["step"], run_sha256=meta["run_sha256"])
                )
    return tuple(found)


def latest(folder: Path, *, run_sha256: str) -> Checkpoint | None:
    """The last whole checkpoint of this run, or None.

    Raises:
        ValueError: where the folder holds another run's checkpoints.
    """
    found = checkpoints(folder)
    if not found:
        return None
    if found[-1].run_sha256 != run_sha256:
        raise ValueError(
            f"{found[-1].path} was written by another run ({found[-1].run_sha256[:12]}, not "
            f"{run_sha256[:12]}); resume with the same recipe, or remove {folder} to start over"
        )
    return found[-1]


def write(
    folder: Path,
    *,
    step: int,
    run_sha256: str,
    save: Callable[[Path], None],
    wait: Callable[[], None],
    is_main: bool,
) -> None:
    """Write `folder/step-…` whole, then remove the older ones. Every rank calls this.

    What is filled or removed has a hidden name meanwhile; what a kill left of it goes with the next call.

    Args:
        folder: the run's checkpoint folder, the same on every rank.
        step: optimizer steps done.
        run_sha256: digest of the run.
        save: the session's `save`.
        wait: the session's barrier.
        is_main: whether this rank creates, renames and removes.
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
        meta = {"step": step, "run_sha256": run_sha256}
        write_text(partial / "checkpoint.json", json.dumps(meta))
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
