"""Seconds of the computation between two collectives, on one rank.

A product `[m, k] @ [k, n]` takes its `2 m n k` operations at the machine's best measured rate, and beside
that the time to read and write its three matrices: so a small or thin product runs below the best rate,
as it does. Elementwise work takes its traffic over the memory's rate. Whatever is measured on the
machine (`Machine.products`, `Machine.parts`) is not computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fourfold_parallel.common.attention import FUSED
from fourfold_parallel.plan.job import Job, Layout
from fourfold_parallel.plan.machine import Machine, PartName, Precision
from fourfold_parallel.plan.transformer import Block, Mixture


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """Elements read and written for each element of a tensor, forward, and the kernels that do it."""

    norm: float
    rotary: float
    activation: float
    loss: float
    norm_kernels: int
    rotary_kernels: int


EAGER = Passes(norm=10, rotary=8, activation=5, loss=10, norm_kernels=6, rotary_kernels=14)
"""transformers' model files, one kernel an operation."""
FUSED_PASSES = Passes(norm=3, rotary=2, activation=3, loss=4, norm_kernels=1, rotary_kernels=1)
RESIDUAL_PASSES = 3
BACKWARD_PASSES = 2.0
"""Traffic of an operation's backward over its forward's."""
ATTENTION_BACKWARD = 2.5
"""Products of a fused attention's backward over its forward's: five to two."""
EAGER_SCORE_PASSES = 8
"""Reads and writes of each score by an attention that holds them: mask, scale, softmax, cast."""
UPDATE_BYTES = 28
"""AdamW in float32 reads four numbers of a parameter and writes three."""
CLIP_BYTES = 8
"""The gradient is read for its norm, and read and written where it is scaled."""


LINEAR_NODES = 3
"""Nodes of autograd in Python in a linear layer of the grid: its piece, its product, its late wait."""
NORM_NODES = 1
"""Its piece."""
COLLECTIVE_NODES = 2
"""The start and the wait of a collective of the grid take the host about a node each."""


def product_seconds(machine: Machine, precision: Precision, m: int, n: int, k: int) -> float:
    """Of `[m, k] @ [k, n]`."""
    known = machine.product(m, n, k, precision)
    if known is not None:
        return known
    rate = machine.rate(precision)
    element = 2 if precision == "bf16" else 4
    traffic = element * (m * n + n * k + m * k) / machine.memory_bytes_per_s
    return 2.0 * m * n * k / (rate.flops_per_s * rate.share) + traffic


class Work:
    """Seconds of one rank's work for one microbatch, by kind."""

    def __init__(self, job: Job, layout: Layout, machine: Machine) -> None:
        self.job, self.layout, self.machine = job, layout, machine
        self.tokens: int = min(layout.microbatch, -(-job.batch // layout.shares)) * job.sequence
        self.between: int = -(-self.tokens // (layout.row if layout.cuts_tokens else 1))
        """Tokens of the residual stream between blocks."""
        self.passes: Passes = FUSED_PASSES if job.fused else EAGER
        self._products: dict[tuple[int, int], float] = {}

    def product(self, outputs: int, inputs: int) -> float:
        """Of this rank's tokens with a tile `outputs x inputs`; its two backward products take as long."""
        seconds = self._products.get((outputs, inputs))
        if seconds is None:
            precision, tokens = self.job.precision, self.tokens
            seconds = product_seconds(self.machine, precision, tokens, outputs, inputs)
            self._products[outputs, inputs] = seconds
        return seconds

    def traffic(self, elements: float, passes: float, *, element: int = 0) -> float:
        """Of reading or writing elements so many times."""
        return passes * elements * (element or self.job.element) / self.machine.memory_bytes_per_s

    def embedding(self, *, backward: bool = False) -> float:
        """The look-up of this rank's tokens; its backward is counted where it was measured."""
        model, layout = self.job.model, self.layout
        computed = self.traffic(self.tokens * model.width / layout.col, 4)
        rows, width = -(-model.vocabulary // layout.row), -(-model.width // layout.col)
        return self._part("embedding", (self.tokens, rows, width), computed, 0.0, backward)

    def norm(self, *, backward: bool = False) -> float:
        """Over the residual stream."""
        computed = self.traffic(self._residual, self.passes.norm)
        return self._part("norm", self._residual_shape, computed, BACKWARD_PASSES, backward)

    def residual(self) -> float:
        """One addition to the residual stream."""
        computed = self.traffic(self._residual, RESIDUAL_PASSES)
        return self._part("residual", self._residual_shape, computed, 1.0, False)

    def experts(self, experts: Mixture) -> float:
        """The products of this rank's share of all chosen experts; its two backward products take as long.

        Each expert has as many tokens; beside the products, the gathered words are put into order. Where
        tokens come to the experts, it is the fullest rank's share.
        """
        row, col = self.layout.row, self.layout.col
        shares = self.layout.depth if self.layout.leaves(experts) else 1
        sent = self.rows(experts)
        used = min(-(-experts.number // shares), sent)
        units, precision = experts.units(row, col), self.job.precision
        product = product_seconds(self.machine, precision, -(-sent // used), units, experts.width)
        hidden = self.traffic(sent * units, self.passes.activation)
        ordered = self.traffic(used / experts.number * experts.tile_elements(row, col), 2)
        return used * experts.matrices * product + hidden + ordered

    def rows(self, experts: Mixture) -> int:
        """Tokens for all chosen experts; the fullest rank's, where tokens go to their experts."""
        shares = self.layout.depth if self.layout.leaves(experts) else 1
        return round(self.tokens * experts.chosen * experts.crowding(shares))

    def activation(self, block: Block, *, backward: bool = False) -> float:
        """Of the MLP's hidden units."""
        hidden = block.hidden / (1 if block.whole else self.layout.row)
        computed = self.traffic(self.tokens * hidden, self.passes.activation)
        shape = (self.tokens, math.ceil(hidden))
        return self._part("activation", shape, computed, BACKWARD_PASSES, backward)

    def attention(self, *, whole: bool = False, backward: bool = False) -> float:
        """Rotary positions, scores, softmax and mixing of this rank's heads, or of all."""
        model, job = self.job.model, self.job
        row = 1 if whole else self.layout.row
        heads = -(-model.heads // row)
        rate = self.machine.rate(job.precision)
        operations = 2.0 * self.tokens * job.sequence * heads * model.head_width
        if job.attention in FUSED:
            inner = operations / (rate.flops_per_s * rate.attention_share)
        else:  # both halves of the scores, held and passed over
            inner = 2 * operations / (rate.flops_per_s * rate.share)
            inner += self.traffic(self.tokens * job.sequence * heads, EAGER_SCORE_PASSES)
        kv_heads = max(1, model.kv_heads // row)
        turned = self.tokens * (heads + kv_heads) * model.head_width
        rotary = 0 if model.positions else self.traffic(turned, self.passes.rotary)
        shape = (self.tokens, job.sequence, heads, kv_heads, model.head_width)
        return self._part("attention", shape, inner + rotary, ATTENTION_BACKWARD, backward)

    def loss(self) -> float:
        """Of the logits, after the head's product, forward and backward, in float32."""
        logits = self.tokens * self.job.model.vocabulary / self.layout.row
        computed = self.traffic(logits, self.passes.loss, element=4)
        shape = (self.tokens, -(-self.job.model.vocabulary // self.layout.row))
        forward = self._part("loss", shape, computed, 0.0, False)
        return forward + self._part("loss", shape, computed, 0.0, True)

    def update(self, parameters: float) -> float:
        """Of the optimizer, for this rank's parameters."""
        shared = parameters / (self.layout.data if self.layout.shards_optimizer else 1)
        if self.machine.seconds_per_update:
            small = self.job.model.tensors * self.machine.seconds_per_tensor
            return small + shared * self.machine.seconds_per_update
        return (shared * UPDATE_BYTES + parameters * CLIP_BYTES) / self.machine.memory_bytes_per_s

    def _part(
        self, kind: PartName, shape: tuple[int, ...], computed: float, factor: float, backward: bool
    ) -> float:
        """As measured at this shape, or as computed, backward times `factor`."""
        part = self.machine.part(kind, shape)
        if part is not None:
            return part.backward_s if backward else part.forward_s
        return computed * factor if backward else computed

    @property
    def _residual(self) -> float:
        return self.between * self.job.model.width / self.layout.col

    @property
    def _residual_shape(self) -> tuple[int, int]:
        return self.between, -(-self.job.model.width // self.layout.col)
