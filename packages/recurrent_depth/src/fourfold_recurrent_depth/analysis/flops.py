"""The cost of a pass: products of matrices, two operations per multiplication and addition.

Counted by formula, so that a recipe can be priced before it runs; a test compares with torch's own
counter. Norms, rotations, softmax and the embedding's lookup are left out, as that counter leaves them.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig

from fourfold_recurrent_depth.configuration import RecurrentDepthConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """FLOPs of one token in each part of the model; attention reads `context` tokens."""

    prelude: float
    injection: float
    """The embedding's half of the adapter, once per pass."""
    recurrence: float
    """The state's half of the adapter and the core."""
    coda: float
    head: float

    def forward(self, recurrences: float, *, checks: float = 0) -> float:
        """A pass of so many recurrences; each exit check that reads logits adds coda and head."""
        once = self.prelude + self.injection + (self.coda + self.head) * max(1.0, checks)
        return once + recurrences * self.recurrence

    def training(self, without: int, with_gradient: int) -> float:
        """Forward and backward: backward costs twice the forward of what carries gradient."""
        carried = (
            self.prelude + self.injection + with_gradient * self.recurrence + self.coda + self.head
        )
        # Where some recurrences ran without gradient, the injection is computed for either phase.
        again = self.injection if without else 0.0
        # The state that enters the last k is a constant: nobody multiplies a gradient back to it.
        constant = self.injection
        return self.forward(without + with_gradient) + again + 2 * carried - constant


def costs(config: RecurrentDepthConfig, *, context: int, splits_adapter: bool = True) -> Costs:
    """FLOPs per token and part, with queries that read `context` keys each.

    Dense attention over T tokens reads T keys for each, of which a causal kernel needs half. The
    published code multiplies both halves of the adapter in every recurrence (`splits_adapter=False`).
    """
    width = config.n_embd
    block = 2 * (4 * width * width + 3 * width * config.intermediate_size) + 4 * context * width
    half_adapter = 2 * width * width
    return Costs(
        prelude=config.n_layers_in_prelude * block,
        injection=half_adapter if splits_adapter else 0.0,
        recurrence=half_adapter * (1 if splits_adapter else 2)
        + config.n_layers_in_recurrent_block * block,
        coda=config.n_layers_in_coda * block,
        head=2 * width * config.padded_vocab_size,
    )


def retrofit_costs(
    config: LlamaConfig, *, prelude: int, core: int, coda: int, context: int
) -> Costs:
    """FLOPs per token and part of a retrofitted Llama, whose adapter multiplies state and embedding anew.

    A dense one is all prelude: `prelude=config.num_hidden_layers, core=0, coda=0` and no recurrence.
    """
    width = config.hidden_size
    shared = config.num_key_value_heads or config.num_attention_heads
    keys = width * shared // config.num_attention_heads
    weights = 2 * width * width + 2 * width * keys + 3 * width * config.intermediate_size
    layer = 2 * weights + 4 * context * width
    return Costs(
        prelude=prelude * layer,
        injection=0.0,
        recurrence=4 * width * width + core * layer,
        coda=coda * layer,
        head=2 * width * config.vocab_size,
    )


def materialised_parameters(config: RecurrentDepthConfig, recurrences: int) -> int:
    """Parameters of the model that the same pass would take without sharing (section 3: 1.5 B r + 2 B)."""
    width = config.n_embd
    block = 4 * width * width + 3 * width * config.intermediate_size + 6 * width
    around = (config.n_layers_in_prelude + config.n_layers_in_coda) * block
    core = config.n_layers_in_recurrent_block * block + 2 * width * width
    return around + config.padded_vocab_size * width + width + recurrences * core
