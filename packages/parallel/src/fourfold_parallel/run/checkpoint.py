"""Checkpoints: sharded, written while training goes on, whole or absent, readable by any engine and grid.

A checkpoint is the folder `step-00000100/`: the shards of weights and moments (`run.shards`), what
`from_pretrained` reads beside the weights, and `checkpoint.json`, which says the step, the run, the ranks
and a checksum of every tensor. The order of the data, the learning rate and what dropout draws are
functions of the step, so nothing else is state.

A save costs the step a copy into host memory. What follows happens in a thread: each rank writes its shards
under a hidden name and syncs them; the first rank, told by all, writes the manifest, syncs files and
folder, renames, syncs the folder above, and only then moves the pointer `latest`, fills the second place
and removes what is no longer kept.
"""

import errno
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fourfold_parallel.common.activity import NOW
from fourfold_parallel.common.files import StrPath, copy_folder, sync, whole_folder, write_text
from fourfold_parallel.common.held import State, check_weights
from fourfold_parallel.common.values import Difference, from_json, strict, to_json
from fourfold_parallel.launch import Ranks, patience
from fourfold_parallel.run import shards
from fourfold_parallel.run.engines import Session
from fourfold_parallel.run.recipe import Run, Steps, Tokens, Until, departures, steps_until
from fourfold_parallel.run.shards import MANIFEST, CorruptError, Manifest, ShardReader, Written
from fourfold_parallel.run.state import check_ties

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8})")
LATEST = "latest"
"""A file that names the last whole checkpoint. No link: copies of a folder follow those, or lose them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """The checkpoints that stay, and their places."""

    last: int = 2
    """So many of the newest. One more than one, so that there is one to go back to."""
    every: int | None = None
    """And those after each multiple of so many steps."""
    also: StrPath | None = None
    """A second folder, on another disk: filled once the first is whole, and read where the first fails."""

    def __post_init__(self) -> None:
        if self.last < 1 or (self.every is not None and self.every < 1):
            raise ValueError(f"last={self.last} and every={self.every} must be 1 or more")
        if self.also is not None:
            object.__setattr__(self, "also", os.fspath(self.also))


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    """`trained_model` reads it. `from_pretrained` does where it holds `model.safetensors`, as the last one of
    a run does (`plain`), unless it cannot read the kind of model (`export.files`)."""
    step: int
    """Optimizer steps done."""
    run: dict[str, Any]
    """Description of the run that wrote it (`to_json`)."""
    ranks: int
    """Processes that wrote it."""


def checkpoints(folder: StrPath) -> tuple[Checkpoint, ...]:
    """The whole checkpoints in a folder, oldest first; what a killed save left is passed over.

    One whose manifest is not what was written is passed over with a warning.

    Raises:
        ValueError: An earlier version of fourfold wrote one; the way out is named.
    """
    folder = Path(folder)
    whole: list[Checkpoint] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not _NAME.fullmatch(path.name):
            continue
        try:
            read = Manifest.read(path)
        except CorruptError as error:
            log.warning("%s; it is passed over", error)
            continue
        whole.append(Checkpoint(path=path, step=read.step, run=read.run, ranks=read.ranks))
    return tuple(whole)


def latest(
    folder: StrPath, *, run: Run, extends: bool = False, also: StrPath | None = None
) -> Checkpoint | None:
    """The last whole checkpoint of this run, or None; where it ran does not matter (`departures`).

    Args:
        folder: the run's checkpoints.
        run: must be the run that wrote them.
        extends: the checkpoint's horizon may be a shorter one.
        also: a second place to look at.

    Raises:
        ValueError: The folder holds another run's checkpoints; the message names the fields.
    """
    candidates = resumable(folder, run=run, extends=extends, also=also)
    return candidates[0] if candidates else None


def resumable(
    folder: StrPath, *, run: Run, extends: bool = False, also: StrPath | None = None
) -> tuple[Checkpoint, ...]:
    """The whole checkpoints from which a run can go on, newest first; of equal ones, the first place's.

    Raises:
        ValueError: As `latest`.
    """
    places = [folder] if also is None else [folder, also]
    whole = [each for place in places for each in reversed(checkpoints(place))]
    whole.sort(key=lambda each: -each.step)
    if not whole:
        return ()
    last = whole[0]
    others = [other for other in departures(last.run, run) if not _is_of_horizon(other)]
    if others:
        raise ValueError(
            f"{last.path} was written by another run: {told(others, 'the checkpoint')}. Resume with the "
            f"same recipe, name another folder, or {_anew(last)}"
        )
    if planned_steps(last, run) != run.steps:
        _check_horizon(last, run, extends=extends)
    return tuple(whole)


def planned_steps(last: Checkpoint, run: Run) -> int:
    """Steps that a checkpoint was on its way to; `run` is the same, but for its horizon."""
    horizon = from_json(last.run["horizon"])
    assert isinstance(horizon, Steps | Tokens | Until)
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


# ---- writing


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveOutcome:
    """The end of a save."""

    step: int
    stall_s: float
    """Seconds that the step waited for it."""
    elapsed_s: float
    """Seconds from its beginning until the checkpoint was whole."""
    nbytes: int
    """That this rank wrote."""
    failure: str = ""
    """The reason why there is no such checkpoint; empty where there is."""


class Saver:
    """Writes a session's checkpoints while its training goes on, one at a time.

    Every rank makes it, at the same time, within the session, and calls its methods alike. A save that fails
    (a full disk) leaves the earlier checkpoints and the training as they are.

    Args:
        folder: the run's checkpoints, the same for every rank.
        session: what is saved.
        run: the run that is trained, as `to_json` gives it.
        beside: files that `from_pretrained` reads beside the weights, by name (`export.files`).
        keep: which checkpoints stay, and where.
    """

    def __init__(
        self,
        folder: StrPath,
        session: Session,
        *,
        run: Mapping[str, Any],
        beside: Mapping[str, bytes],
        keep: Keep,
    ) -> None:
        self.folder: Path = Path(folder)
        self._session = session
        self._run, self._beside, self._keep = dict(run), beside, keep
        self._ranks = Ranks()
        # What is filled has a name that no other launch uses, so that leftovers disturb nobody.
        [self._token, *_] = self._ranks.gather(uuid.uuid4().hex[:8])
        if self._ranks.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for place in self._places():
                clear(place)
        self._image: shards.Image | None = None
        self._thread: threading.Thread | None = None
        self._outcomes: list[SaveOutcome] = []
        self._told = 0

    def save(self, step: int) -> float:
        """Begin to write the state as it is now; gives the seconds that the caller waited.

        Where the save before is still being written, it is waited for first.
        """
        started_s = time.perf_counter()
        self._join()
        state = self._session.state()
        layout = shards.layout_of(state)
        if self._image is None or self._image.layout != layout:
            self._image = None  # its memory is free before there is another
            items = shards.plan(state, group=self._ranks.group).items
            label = "" if self._ranks.size == 1 else f"-{self._ranks.rank:05d}"
            self._image = shards.Image(state, items, label=label)
        NOW.mark("snapshot")
        self._image.take(state)
        shapes = replace(
            state, weights=_forgotten(state.weights), moments=_forgotten(state.moments)
        )
        stall_s = time.perf_counter() - started_s
        self._thread = threading.Thread(
            target=self._write, args=(self._image, shapes, step, started_s, stall_s), daemon=True,
            name=f"save of step {step}",
        )  # fmt: skip
        self._thread.start()
        return stall_s

    def finish(self) -> None:
        """Return when the last save is whole, on every rank.

        Raises:
            OSError: It is not; the reason is named.
        """
        started_s = time.perf_counter()
        self._join()
        if self._told < len(self._outcomes):  # the step waits for the last one to its end
            last = self._outcomes[-1]
            waited_s = time.perf_counter() - started_s
            self._outcomes[-1] = replace(last, stall_s=last.stall_s + waited_s)
        [failure, *_] = self._ranks.gather(self._outcomes[-1].failure if self._outcomes else "")
        if failure:
            raise OSError(f"the last checkpoint could not be written: {failure}")

    def abandon(self) -> None:
        """After an error: let a save that is being written end; nothing is raised.

        Where another rank has ended, the save ends with its part of the exchange.
        """
        if self._thread is not None:
            self._thread.join(patience().total_seconds())

    def news(self) -> Iterator[SaveOutcome]:
        """The outcomes of the saves that have ended since the last call."""
        while self._told < len(self._outcomes):
            self._told += 1
            yield self._outcomes[self._told - 1]

    def _join(self) -> None:
        if self._thread is not None:
            with NOW.waiting("the save before"):
                self._thread.join()
            self._thread = None

    def _places(self) -> list[Path]:
        return [self.folder, *([] if self._keep.also is None else [Path(self._keep.also)])]

    def _write(
        self, image: shards.Image, state: State, step: int, started_s: float, stall_s: float
    ) -> None:
        failure = ""
        final = self.folder / f"step-{step:08d}"
        partial = self.folder / f".{final.name}.{self._token}.partial"
        try:
            try:
                NOW.mark("save")
                partial.mkdir(parents=True, exist_ok=True)
                written: Written | str = image.write(partial)
                sync(partial)
            except OSError as error:
                written = reason(error, partial)
            results = self._ranks.gather(written)
            wholes = [each for each in results if isinstance(each, Written)]
            failures = [
                f"rank {r}: {each}" for r, each in enumerate(results) if isinstance(each, str)
            ]
            failure = "; ".join(failures)
            if self._ranks.rank == 0:
                if failures:
                    shutil.rmtree(partial, ignore_errors=True)
                else:
                    about = shards.manifest(
                        wholes, state, step=step, run=self._run, beside=self._beside
                    )
                    failure = self._make_whole(partial, final, about)
        except Exception as error:  # noqa: BLE001 - whatever ends a save is its outcome
            failure = f"{type(error).__name__}: {error}"
        if failure:
            log.error("the checkpoint of step %d could not be written: %s", step, failure)
        self._outcomes.append(
            SaveOutcome(
                step=step, stall_s=stall_s, elapsed_s=time.perf_counter() - started_s,
                nbytes=image.nbytes, failure=failure,
            )
        )  # fmt: skip

    def _make_whole(self, partial: Path, final: Path, about: Manifest) -> str:
        """The first rank's part, when all have written theirs; gives the reason of a failure."""
        try:
            publish(partial, final, about, self._beside)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            return reason(error, partial)
        prune(self.folder, self._keep)
        if self._keep.also is not None:
            second = Path(self._keep.also)
            try:
                copy_whole(final, second / final.name)
                prune(second, self._keep)
            except OSError as error:
                log.error("%s was not copied to %s: %s", final, second, reason(error, second))
        return ""


def _forgotten(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors without their memory: names, shapes and formats."""
    return {name: replace(held, parts=()) for name, held in tensors.items()}


def publish(partial: Path, final: Path, about: Manifest, beside: Mapping[str, bytes]) -> None:
    """Make a filled folder a checkpoint: manifest, sync, rename, sync, and the pointer last of all."""
    for name, content in beside.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_bytes(content)
        sync(partial / name)
    write_text(partial / MANIFEST, about.text())
    for path in partial.rglob("*"):
        if path.is_dir():
            sync(path)
    sync(partial)
    NOW.mark("rename")
    if final.exists():
        _remove(final)
    partial.replace(final)
    sync(final.parent)
    NOW.mark("renamed")
    point(final)


def point(final: Path) -> None:
    """Move the pointer `latest` of a folder to a checkpoint in it, durably, in one step."""
    write_text(final.parent / LATEST, f"{final.name}\n")


def copy_whole(source: Path, target: Path) -> None:
    """Copy a checkpoint to another folder, where it is whole or absent."""
    if target.exists():
        _remove(target)
    with whole_folder(target) as partial:
        copy_folder(source, partial)
    point(target)


def prune(folder: Path, keep: Keep) -> None:
    """Remove the checkpoints that are no longer kept."""
    steps = sorted(
        int(match[1]) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))
    )
    for step in steps[: -keep.last]:
        if keep.every is None or step % keep.every:
            _remove(folder / f"step-{step:08d}")


def clear(folder: Path) -> None:
    """Remove what killed saves and removals left; a run does this when it begins."""
    for left in folder.glob(".step-*"):
        shutil.rmtree(left)
    for left in folder.glob(f".{LATEST}.*"):
        left.unlink()


def reason(error: OSError, folder: Path) -> str:
    """An error of a file system as a sentence with a way out."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk of {folder.parent} is full ({error.strerror}); the checkpoints before are kept: make "
            "room, keep fewer (Keep(last=1)), or name another folder"
        )
    return f"{error.strerror or error} ({error.filename or folder})"


def _remove(path: Path) -> None:
    """Hide, then remove: half a checkpoint never bears a checkpoint's name."""
    hidden = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.removed")
    shutil.rmtree(path.replace(hidden))


def save(session: Session, folder: StrPath, *, step: int = 0) -> Path:
    """Write one checkpoint of a session, and wait for it; gives its folder. Every rank calls this.

    Args:
        session: what is saved.
        folder: gets the checkpoint's folder.
        step: optimizer steps done.
    """
    saver = Saver(folder, session, run={}, beside={}, keep=Keep())
    saver.save(step)
    saver.finish()
    return Path(folder) / f"step-{step:08d}"


# ---- reading


def restore(session: Session, path: StrPath, *, ranks: Ranks | None = None) -> None:
    """Read a checkpoint, whatever engine and grid wrote it, into a session. Every rank calls this.

    The ranks then sum the checksums of what they hold, and compare with what was written.

    Args:
        session: what to read into.
        path: the checkpoint's folder.
        ranks: a communicator to use again, where many checkpoints are read.

    Raises:
        CorruptError: It is not what was written; tensor and file are named, on every rank alike.
        ValueError: It is of another model.
    """
    folder, ranks = Path(path), ranks or Ranks()
    read: list[ShardReader] = []

    def open_reader() -> None:
        read.append(ShardReader(folder))

    _alike(ranks, open_reader)
    reader, state = read[0], session.state()
    check_weights(reader.manifest.saved(), state.weights, state.ties)
    check_ties(reader, state.ties)
    with session.restoring(reader.manifest.saved()) as room:
        held = dict(room.tensors())
        _alike(ranks, lambda: shards.read(reader, held))
        total = ranks.sum(shards.held_checksums(held))
        wrong = shards.unlike(reader.manifest, held, total)
        _alike(ranks, lambda: reader.refuse(wrong))


def restore_last(session: Session, candidates: Sequence[Checkpoint]) -> Checkpoint:
    """Read the first of some checkpoints that is what was written. Every rank calls this.

    Those before it are set aside under a name that begins with `corrupt-`, for somebody to look at.

    Args:
        session: what to read into.
        candidates: newest first (`resumable`), not empty.

    Raises:
        CorruptError: None is sound.
    """
    corrupt: list[Checkpoint] = []
    said = "there is none"
    for each in candidates:
        try:
            restore(session, each.path)
        except CorruptError as error:
            log.error("%s", error)
            corrupt.append(each)
            said = str(error)
            continue
        if session.is_main:
            for other in corrupt:
                log.warning("going on from %s, which is sound", each.path)
                set_aside(other.path)
        return each
    raise CorruptError(
        f"{said}; none of {len(candidates)} checkpoints is sound: remove "
        f"{candidates[0].path.parent} to start over"
    )


def set_aside(path: Path) -> Path:
    """Give a checkpoint that is not what was written a name under which nothing takes it for one."""
    aside = path.with_name(f"corrupt-{path.name}-{uuid.uuid4().hex[:8]}")
    path.replace(aside)
    sync(path.parent)
    return aside


def _alike(ranks: Ranks, action: Callable[[], None]) -> None:
    """Act, and fail on every rank where it fails on one.

    Raises:
        CorruptError: As the first rank's that failed.
    """
    failure = ""
    try:
        action()
    except CorruptError as error:
        failure = str(error)
    first = next(filter(None, ranks.gather(failure)), "")
    if first:
        raise CorruptError(first)


def fork(source: Checkpoint, run: Run, folder: StrPath) -> Checkpoint:
    """Put a checkpoint where another run looks for its last one, so that it goes on from there.

    Args:
        source: stays as it is.
        run: the other run, of the same model.
        folder: its checkpoints.
    """
    final = Path(folder) / source.path.name
    about = replace(Manifest.read(source.path), run=_described(run))
    with whole_folder(final) as partial:
        copy_folder(source.path, partial)
        write_text(partial / MANIFEST, about.text())
    point(final)
    return Checkpoint(path=final, step=about.step, run=about.run, ranks=about.ranks)


def _described(run: Run) -> dict[str, Any]:
    described: Any = strict(to_json(run))
    return json.loads(json.dumps(described))


def plain(last: Checkpoint) -> None:
    """Write `model.safetensors` into a checkpoint that has none, by one process, from its shards.

    The file is whole under the plain model's names: what `from_pretrained` reads. Peak memory is one tensor.

    Raises:
        CorruptError: A shard is not what was written.
    """
    if not (last.path / shards.PLAIN).exists():
        export(last.path, last.path)


def export(source: StrPath, folder: StrPath) -> Path:
    """Write the plain weights of a checkpoint, and what lies beside them, into a folder; gives the file.

    Raises:
        CorruptError: A shard is not what was written.
    """
    source, folder = Path(source), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / shards.PLAIN
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as name:
        about = shards.rewrite(source, Path(name), shards=1, only_weights=True)
        if folder != source:
            for beside in about.beside:
                (folder / beside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / beside, folder / beside)
        (Path(name) / shards.PLAIN).replace(target)
        sync(folder)
    return target


def reshard(source: StrPath, folder: StrPath, *, ranks: int) -> Path:
    """Write a checkpoint anew as if so many ranks had written it; gives its folder.

    Any number of ranks reads any checkpoint: this is for file systems that like few or many files.

    Args:
        source: a checkpoint; stays as it is.
        folder: gets one of the same name.
        ranks: 1 leaves whole tensors, so that `from_pretrained` reads the weights.

    Raises:
        CorruptError: A shard is not what was written.
        ValueError: `folder` holds a checkpoint of that name.
    """
    source = Path(source)
    final = Path(folder) / source.name
    if final.exists():
        raise ValueError(f"{final} is there already; name another folder")
    old = Manifest.read(source)
    with whole_folder(final) as partial:
        for name in old.beside:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, partial / name)
        about = shards.rewrite(source, partial, shards=ranks)
        write_text(partial / MANIFEST, about.text())
    point(final)
    return final
