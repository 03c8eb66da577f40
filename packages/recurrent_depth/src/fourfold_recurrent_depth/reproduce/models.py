"""A dense model trained by a run of its own, made recurrent, as a value of recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from transformers import PreTrainedModel

from fourfold_parallel.common.records import Material
from fourfold_parallel.run.models import Llama
from fourfold_parallel.run.trained import TrainedBy
from fourfold_recurrent_depth.analysis.flops import Costs, retrofit_costs
from fourfold_recurrent_depth.retrofit import retrofit


def dense_costs(dense: TrainedBy, *, context: int) -> Costs:
    """FLOPs of one token of a dense Llama, attention reading `context` tokens: all prelude."""
    config = cast(Llama, dense.run.model).config()
    depth = config.num_hidden_layers
    return retrofit_costs(config, prelude=depth, core=0, coda=0, context=context)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recurrent:
    """A dense Llama whose layers are cut in three, the middle iterated (arXiv 2511.07384)."""

    dense: TrainedBy
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
