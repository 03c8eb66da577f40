"""The model that a run ends with, as a value: where another run begins."""

import logging
from dataclasses import dataclass

from filelock import FileLock
from transformers import PreTrainedModel

from fourfold_parallel.common.files import cache_folder
from fourfold_parallel.common.records import Material
from fourfold_parallel.common.values import digest, formerly
from fourfold_parallel.run import checkpoint
from fourfold_parallel.run.recipe import Run
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
        folder = cache_folder() / "trained" / f"{self.run.name}-{digest(self.run)[:24]}"
        checkpoints = folder / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            last = checkpoint.latest(checkpoints, run=self.run)
            if last is None or last.step < self.run.steps:
                log.info("training %s into %s", self.run.name, folder)
                last = train(
                    self.run,
                    record=folder / "record.jsonl",
                    checkpoints=checkpoints,
                )
        return trained_model(self.run, last).train()

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
            *(material for material in stream.file.materials if material.kind == "corpus"),
            *self.run.model.materials(),
        )
