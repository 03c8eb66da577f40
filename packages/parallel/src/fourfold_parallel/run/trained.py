"""The model that a run ends with, as a value: where another run begins."""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock
from transformers import PreTrainedModel

from fourfold_parallel.common.files import StrPath, cache_folder
from fourfold_parallel.common.progress import Progress, logged
from fourfold_parallel.common.records import Material
from fourfold_parallel.common.values import digest, formerly, from_json
from fourfold_parallel.run import checkpoint
from fourfold_parallel.run.checkpoint import Checkpoint
from fourfold_parallel.run.recipe import Run
from fourfold_parallel.run.shards import MANIFEST, Manifest
from fourfold_parallel.run.state import load_weights
from fourfold_parallel.run.train import train, trained_model

log = logging.getLogger(__name__)


@formerly("recurrent_depth/Pretrained", "hpc_coder/Continued")
@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedBy:
    """The model that a run ends with. The run is done on first use and kept in the cache.

    Processes that ask at once wait for the first; an interrupted run goes on from its last checkpoint.
    On several ranks, build it once beforehand.
    """

    run: Run

    def build(self, *, seed: int) -> PreTrainedModel:  # noqa: ARG002 - the run's own seed decides
        """The trained weights, in training mode."""
        return trained_model(self.run, ended(self.run)).train()

    def materials(self) -> tuple[Material, ...]:
        """The run, by its digest, the corpus it read, and what it began from."""
        stream = self.run.data.open(sequence=self.run.sequence, seed=self.run.seed)
        return (
            Material(
                name=self.run.name,
                kind="model",
                licence="as its data",
                sha256=digest(self.run),
                source=f"{self.run.steps} steps of our own training",
            ),
            *(material for material in stream.materials if material.kind == "corpus"),
            *self.run.model.materials(),
        )


def folder_of(run: Run) -> Path:
    """The place in the cache of a run that others begin from: its `record.jsonl` and `checkpoints/`."""
    return cache_folder() / "trained" / f"{run.name}-{digest(run)[:24]}"


def ended(run: Run, *, progress: Progress = logged) -> Checkpoint:
    """The last checkpoint of a run, done on first use and kept in the cache (see `TrainedBy`)."""
    folder = folder_of(run)
    checkpoints = folder / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        last = checkpoint.latest(checkpoints, run=run)
        if last is None or last.step < run.steps:
            log.info("training %s into %s", run.name, folder)
            last = train(
                run, record=folder / "record.jsonl", checkpoints=checkpoints, progress=progress
            )
    return last


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointAt:
    """A checkpoint in a folder, and what its weights are: a copy elsewhere is the same."""

    folder: StrPath
    """`.../step-00000100`, written by any engine on any ranks."""
    weights_sha256: str
    """As `CheckpointAt.of` gives it: of names, shapes and values, however they are cut into files."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", os.fspath(self.folder))

    @classmethod
    def of(cls, folder: StrPath) -> "CheckpointAt":
        """The checkpoint that lies in a folder now.

        Raises:
            ValueError: There is none; the way out is named.
        """
        return cls(folder=folder, weights_sha256=weights_sha256(_manifest(folder)))

    def manifest(self) -> Manifest:
        """Its manifest.

        Raises:
            ValueError: There is no checkpoint, or one of other weights.
        """
        manifest = _manifest(self.folder)
        there = weights_sha256(manifest)
        if there != self.weights_sha256:
            raise ValueError(
                f"{self.folder} holds the weights {there[:12]}, not {self.weights_sha256[:12]}; name the "
                "folder of those, or CheckpointAt.of(folder) to begin from these"
            )
        return manifest


def _manifest(folder: StrPath) -> Manifest:
    if not (Path(folder) / MANIFEST).is_file():
        raise ValueError(
            f"{folder} is no checkpoint of a run: it has no {MANIFEST}; name a folder such as "
            ".../step-00000100, or use Published for weights of other tools"
        )
    return Manifest.read(Path(folder))


def weights_sha256(manifest: Manifest) -> str:
    """The digest of a checkpoint's weights, the same whichever engine and ranks wrote them.

    Of names, shapes, number formats and the checksums of the values, without the optimizer's state.
    """
    weights = {
        name: [list(shape), str(dtype), total]
        for name, (shape, dtype, total) in manifest.tensors.items()
        if "/" not in name
    }
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Continued:
    """The model of a checkpoint, from which a run of its own begins: other data, rates and engine.

    The new run counts its steps from 0, and its record names the run that it goes on from, and that one's
    parents. To go on with the same run, call `train` again.
    """

    parent: CheckpointAt | Run
    """A checkpoint, or a run, which is done on first use and kept in the cache (as by `TrainedBy`)."""
    optimizer_state: Literal["fresh", "carried"]
    """`fresh`: no state, as with published weights. `carried`: the checkpoint's moments and count of steps,
    with the new run's rates and decays; large second moments keep the first steps small."""

    def folder(self) -> Path:
        """The checkpoint.

        Raises:
            ValueError: There is none, or one of other weights.
        """
        if isinstance(self.parent, Run):
            return ended(self.parent).path
        self.parent.manifest()
        return Path(self.parent.folder)

    def carried(self) -> Path | None:
        """See `models.CarriesState`."""
        return self.folder() if self.optimizer_state == "carried" else None

    def build(self, *, seed: int) -> PreTrainedModel:
        """The checkpoint's weights, in training mode; on the meta device their shapes alone.

        Raises:
            CorruptError: The checkpoint is not what was written.
        """
        folder = self.folder()
        model = _shaped(folder, seed).train()
        if not any(parameter.is_meta for parameter in model.parameters()):
            load_weights(model, folder)
        return model

    def materials(self) -> tuple[Material, ...]:
        """The parent and its parents, the nearest first: the digest of each one's weights, and its run."""
        if isinstance(self.parent, Run):
            manifest = Manifest.read(self.folder())
        else:
            manifest = self.parent.manifest()
        run = _run(manifest)
        mine = Material(
            name=run.name, kind="model", licence="as its data", sha256=weights_sha256(manifest),
            source=f"step {manifest.step} of the run {digest(run)}",
        )  # fmt: skip
        return (mine, *run.model.materials())


def _run(manifest: Manifest) -> Run:
    """The run that wrote a checkpoint.

    Raises:
        ValueError: Its classes are not installed.
    """
    run = from_json(manifest.run)
    assert isinstance(run, Run)
    return run


def _shaped(folder: Path, seed: int) -> PreTrainedModel:
    """A model of a checkpoint's shape, whose weights are still to be read."""
    run = _run(Manifest.read(folder))
    while isinstance(run.model, Continued):
        parent = run.model.parent
        run = parent if isinstance(parent, Run) else _run(parent.manifest())
    return run.model.build(seed=seed)
