"""A dense model trained by a run of its own, and the same made recurrent, as values of recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedModel

from fourfold_parallel.common.files import cache_folder, whole_folder
from fourfold_parallel.common.progress import silent
from fourfold_parallel.common.records import Material
from fourfold_parallel.common.values import digest
from fourfold_parallel.run import checkpoint
from fourfold_parallel.run.models import Llama
from fourfold_parallel.run.recipe import Run
from fourfold_parallel.run.train import train, trained_model
from fourfold_recurrent_depth.flops import Costs, retrofit_costs
from fourfold_recurrent_depth.retrofit import retrofit


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    """The model at the end of a run, which is trained where the cache does not hold it yet."""

    run: Run

    def build(self, *, seed: int) -> PreTrainedModel:  # noqa: ARG002 - the run's own seed decides
        """The trained weights."""
        sha256 = digest(self.run)
        folder = cache_folder() / "pretrained" / f"{self.run.name}-{sha256[:16]}"
        if not folder.exists():
            with whole_folder(folder) as partial:
                train(
                    self.run,
                    record=partial / "record.jsonl",
                    checkpoints=partial / "checkpoints",
                    progress=silent,
                )
        last = checkpoint.latest(folder / "checkpoints", run_sha256=sha256)
        assert last is not None
        return trained_model(self.run, last).train()

    def materials(self) -> tuple[Material, ...]:
        """What the run's own model uses."""
        return self.run.model.materials()

    def costs(self, *, context: int) -> Costs:
        """FLOPs of one token, attention reading `context` tokens: all prelude."""
        config = cast(Llama, self.run.model).config()
        depth = config.num_hidden_layers
        return retrofit_costs(config, prelude=depth, core=0, coda=0, context=context)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recurrent:
    """A dense Llama whose layers are cut in three, the middle iterated (arXiv 2511.07384)."""

    dense: Pretrained
    prelude: int
    core: int
    coda: int
    fresh: bool = False
    """The same shape with weights drawn under the run's seed: what pretraining is worth."""

    def build(self, *, seed: int) -> PreTrainedModel:
        """The dense model at any number of recurrences, until it is trained."""
        source = self.dense.run.model if self.fresh else self.dense
        return retrofit(source.build(seed=seed), self.prelude, self.core, self.coda)

    def materials(self) -> tuple[Material, ...]:
        """The dense model's."""
        return self.dense.materials()

    def costs(self, *, context: int) -> Costs:
        """FLOPs of one token in each part, attention reading `context` tokens."""
        return retrofit_costs(
            cast(Llama, self.dense.run.model).config(),
            prelude=self.prelude,
            core=self.core,
            coda=self.coda,
            context=context,
        )
