"""The cost of a pass: products of matrices, two operations per multiplication and addition.

Counted by formula, so that a recipe can be priced before it runs; a test compares with torch's own
counter. Norms, rotations, softmax and the embedding's lookup are left out, as that counter leaves them.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig

from fourfold_recurrent_depth.configuration import HUGINN, RecurrentDepthConfig
from fourfold_recurrent_depth.model import GATE_WIDTH, STAGES, first_layer, has_gate, has_values


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """FLOPs of one token in each part of the model; attention reads `context` tokens."""

    prelude: float
    injection: float
    """The embedding's half of the adapter, once per pass."""
    entry: float
    """A gradient to the state that enters the recurrences with gradient, which nobody needs."""
    recurrence: float
    """The state's half of the adapter and the core."""
    coda: float
    head: float

    def forward(self, recurrences: float, *, checks: float = 0) -> float:
        """A pass of so many recurrences; each exit check that reads logits adds coda and head."""
        once = self.prelude + self.injection + (self.coda + self.head) * max(1.0, checks)
        return once + recurrences * self.recurrence

    def training(self, without: int, with_gradient: int, *, exits: int = 1) -> float:
        """Forward and backward: backward costs twice the forward of what carries gradient.

        A loss at several exits adds coda and head for each.
        """
        carried = self.prelude + self.injection + with_gradient * self.recurrence
        carried += exits * (self.coda + self.head)
        # Where some recurrences ran without gradient, the injection is computed for either phase.
        again = self.injection if without else 0.0
        forward = self.forward(without + with_gradient, checks=exits)
        return forward + again + 2 * carried - self.entry


def costs(config: RecurrentDepthConfig, *, context: int, splits_adapter: bool = True) -> Costs:
    """FLOPs per token and part, with queries that read `context` keys each.

    Dense attention over T tokens reads T keys for each, of which a causal kernel needs half. The
    published code multiplies both halves of the adapter in every recurrence (`splits_adapter=False`).
    """
    width, form = config.n_embd, config.form
    heads = config.n_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    products = 2 if form.mlp == "square" else 3
    weights = 2 * width * (heads + keys) + products * width * config.intermediate_size
    block = 2 * weights + 4 * context * heads
    square = 2 * width * width
    once = square if form.injects == "decay" or splits_adapter else 0.0
    again = square if form.injects == "product" else 0.0
    gates = {stage: _gates(config, stage) for stage in STAGES}
    return Costs(
        prelude=config.n_layers_in_prelude * block + gates["prelude"],
        injection=once if form.injects else 0.0,
        entry=once if form.injects == "product" else 0.0,
        recurrence=again * (1 if splits_adapter else 2)
        + config.n_layers_in_recurrent_block * block + gates["core_block"],
        coda=config.n_layers_in_coda * block + gates["coda"] + square * (form.bridge == "product"),
        head=2 * width * config.padded_vocab_size,
    )  # fmt: skip


def _gates(config: RecurrentDepthConfig, stage: str) -> float:
    """Of a stage's gates for token values, where they have a table."""
    first = first_layer(config, stage)
    number = {
        "prelude": config.n_layers_in_prelude,
        "core_block": config.n_layers_in_recurrent_block,
        "coda": config.n_layers_in_coda,
    }[stage]
    used = sum(
        has_gate(config, stage, layer) and has_values(config, first + layer)
        for layer in range(number)
    )
    return used * 2 * GATE_WIDTH * config.num_key_value_heads


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
        entry=0.0,
        recurrence=4 * width * width + core * layer,
        coda=coda * layer,
        head=2 * width * config.vocab_size,
    )


def materialised_parameters(config: RecurrentDepthConfig, recurrences: int) -> int:
    """Parameters of the model that the same pass would take without sharing (section 3: 1.5 B r + 2 B).

    Raises:
        ValueError: for another family than Huginn, whose parts are counted.
    """
    if config.form is not HUGINN:
        raise ValueError(
            f"materialised_parameters counts Huginn's parts, and this is {config.family}; use `costs`"
        )
    width = config.n_embd
    block = 4 * width * width + 3 * width * config.intermediate_size + 6 * width
    around = (config.n_layers_in_prelude + config.n_layers_in_coda) * block
    core = config.n_layers_in_recurrent_block * block + 2 * width * width
    return around + config.padded_vocab_size * width + width + recurrences * core
