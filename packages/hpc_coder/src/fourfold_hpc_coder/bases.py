"""Weights that an earlier run gave, as a value: where fine-tuning begins."""

import logging
import warnings
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from fourfold_parallel.common.files import cache_folder
from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.records import Material
from fourfold_parallel.common.values import digest
from fourfold_parallel.run import checkpoint
from fourfold_parallel.run.models import Model
from fourfold_parallel.run.recipe import Run
from fourfold_parallel.run.train import train, trained_model

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Continued:
    """The model that a run ends with; the run is done on first use and kept in the cache.

    On several ranks, do the run beforehand: every rank would do it.
    """

    run: Run

    def build(self, *, seed: int) -> PreTrainedModel:  # noqa: ARG002 - the run's own seed decides
        """The trained weights."""
        folder = cache_folder() / "hpc_coder" / "bases" / digest(self.run)[:24]
        last = checkpoint.latest(folder / "checkpoints", run_sha256=digest(self.run))
        if last is None or last.step < self.run.steps:
            log.info("training %s into %s", self.run.name, folder)
            last = train(
                self.run,
                record=folder / "record.jsonl",
                checkpoints=folder / "checkpoints",
                progress=silent,
            )
        return trained_model(self.run, last).train()

    def materials(self) -> tuple[Material, ...]:
        """The run, by its digest, and what it began from."""
        stream = self.run.data.open(sequence=self.run.sequence, seed=self.run.seed)
        return (
            Material(
                name=self.run.name,
                kind="model",
                licence="as its data",
                sha256=digest(self.run),
                source=f"{self.run.steps} steps of our own training",
            ),
            *(one for one in stream.file.materials if one.kind == "corpus"),
            *self.run.model.materials(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """A model whose weights stay, with trained updates of low rank beside its linear maps (LoRA)."""

    model: Model
    rank: int

    def build(self, *, seed: int) -> PreTrainedModel:
        """The model with fresh updates, which begin at zero."""
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # peft asks transformers for gradient checkpointing by a name that 6.0 will drop.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
            torch.manual_seed(seed)
            return get_peft_model(self.model.build(seed=seed), settings)  # pyright: ignore[reportReturnType]

    def materials(self) -> tuple[Material, ...]:
        """The model's."""
        return self.model.materials()
