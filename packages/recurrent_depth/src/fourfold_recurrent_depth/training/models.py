"""A fresh recurrent-depth model as a recipe's value."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from fourfold_parallel.common.attention import Attention, usable
from fourfold_parallel.common.records import Material
from fourfold_recurrent_depth.causal_lm import RecurrentDepthForCausalLM
from fourfold_recurrent_depth.configuration import RecurrentDepthConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RecurrentDepth:
    """Fresh weights of a shape, drawn as section 4.1 says."""

    width: int
    heads: int
    prelude: int
    core: int
    coda: int
    hidden: int
    """Width inside the gated MLP."""
    vocabulary: int
    context: int
    mean_recurrence: int
    mean_backprop: int
    attention: Attention = "sdpa"
    """As transformers names it."""

    def config(self) -> RecurrentDepthConfig:
        """The same shape in the published words."""
        return RecurrentDepthConfig(
            n_embd=self.width,
            n_heads=self.heads,
            n_layers_in_prelude=self.prelude,
            n_layers_in_recurrent_block=self.core,
            n_layers_in_coda=self.coda,
            intermediate_size=self.hidden,
            vocab_size=self.vocabulary,
            padding_multiple=1,
            block_size=self.context,
            mean_recurrence=self.mean_recurrence,
            mean_backprop_depth=self.mean_backprop,
        )

    def build(self, *, seed: int) -> PreTrainedModel:
        """Weights depend on the seed alone; torch's global state is put back."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = self.config()
            config._attn_implementation = usable(self.attention)  # noqa: SLF001 - transformers' own way
            return RecurrentDepthForCausalLM(config)

    def materials(self) -> tuple[Material, ...]:
        """None: nothing published is used."""
        return ()
