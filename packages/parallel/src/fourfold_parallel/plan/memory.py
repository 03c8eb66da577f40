"""Bytes that one rank holds at the fullest moment of a step, by what they are for."""

from __future__ import annotations

from dataclasses import dataclass

from fourfold_parallel.common.attention import FUSED
from fourfold_parallel.plan.job import Job, Layout
from fourfold_parallel.plan.machine import Machine

FLOAT = 4
GRADIENTS_OF_A_LAYER = 0.5
"""Of what a decoder layer keeps: the gradients of its activations that are there at once in its backward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of a rank."""

    weights: float
    """Its pieces of the parameters, and copies of them that the optimizer steps."""
    moments: float
    gradients: float
    tiles: float
    """Gathered or converted weights in use, or kept for backward."""
    spread: float
    """Gradients of tiles under way over depth: sent and received, of two layers."""
    activations: float
    """That the layers keep for backward; with recomputation, the borders of all."""
    layer: float
    """Of one decoder layer: with recomputation it is made again in backward."""
    recomputes: bool
    logits: float
    """And what the loss makes of them."""
    update: float
    """The optimizer's own temporaries."""
    lasting_gradients: bool
    """Gradients are there during the whole step: microbatches add up, or buckets last."""

    @property
    def lasting(self) -> float:
        """There at all times."""
        return self.weights + self.moments + (self.gradients if self.lasting_gradients else 0)

    @property
    def peak(self) -> float:
        """At the fullest moment: the loss, the first or the last layer's backward, the update."""
        gradients = 0 if self.lasting_gradients else self.gradients
        backward = self.tiles + self.spread + GRADIENTS_OF_A_LAYER * self.layer
        again = self.layer if self.recomputes else 0
        return self.lasting + max(
            self.tiles + self.activations + self.logits,
            backward + self.activations + again,
            backward + gradients + self.layer,
            gradients + self.update,
        )

    def parts(self) -> dict[str, float]:
        """Of the peak at the loss, which is the fullest moment of most jobs."""
        return {
            "weights": self.weights,
            "moments": self.moments,
            "gradients": self.gradients,
            "tiles": self.tiles,
            "activations": self.activations,
            "logits": self.logits,
        }


def memory_of(job: Job, layout: Layout) -> Memory:
    """The bytes of one rank of a layout."""
    model, storage = job.model, job.storage
    pieces = _pieces(job, layout)
    replicas = layout.data if layout.shards_optimizer else 1
    matrices = model.matrix_parameters / (layout.row * layout.col)
    tokens = min(layout.microbatch, -(-job.batch // layout.shares)) * job.sequence
    logits = tokens * model.vocabulary / layout.row
    lasts = layout.data > 1 or layout.microbatches(job.batch) > 1
    activations, layer = _activations(job, layout, tokens)
    return Memory(
        weights=pieces * (storage.weight + storage.master / replicas),
        moments=pieces * storage.moments / replicas,
        gradients=pieces * storage.gradient,
        tiles=_tiles(job, layout, matrices),
        spread=_spread(job, layout),
        activations=activations,
        layer=layer,
        recomputes=layout.recomputes,
        logits=logits * (job.element + 2 * FLOAT) + (logits * FLOAT if job.element < FLOAT else 0),
        update=pieces * storage.update / replicas,
        lasting_gradients=lasts,
    )


def fits(memory: Memory, machine: Machine) -> bool:
    """True where a rank's peak leaves the slack that the allocator and the libraries need."""
    return memory.peak <= machine.memory_bytes * (1 - machine.memory_slack)


def _pieces(job: Job, layout: Layout) -> float:
    """Parameters of a rank. Norms and biases are not cut over depth."""
    model = job.model
    tables = (model.positions / layout.row + (0 if model.tied else model.vocabulary)) * model.width
    matrices = (model.matrix_parameters + tables) / (layout.row * layout.col * layout.depth)
    norms = (model.layers * model.norms + 1) * model.width / layout.col
    biases = sum(
        linear.outputs / (layout.col if linear.swapped else layout.row)
        for linear in model.linears
        if linear.bias
    )
    return matrices + norms + model.layers * biases


def _tiles(job: Job, layout: Layout, matrices: float) -> float:
    """Two neighbours' tiles where depth gathers them again; else all that are gathered or converted."""
    model = job.model
    if layout.depth > 1 and not layout.keeps_tiles:
        sizes = sorted(linear.parameters for linear in (*model.linears, model.head))
        return sum(sizes[-2:]) / (layout.row * layout.col) * job.element
    if layout.depth > 1 or job.element < job.storage.weight:
        return matrices * job.element
    return 0.0


def _spread(job: Job, layout: Layout) -> float:
    if layout.depth == 1:
        return 0.0
    largest = max(linear.parameters for linear in (*job.model.linears, job.model.head))
    return 4 * largest / (layout.row * layout.col) * job.element


def _activations(job: Job, layout: Layout, tokens: int) -> tuple[float, float]:
    """Kept for backward by all layers, with recomputation by their borders alone; and by one layer."""
    model = job.model
    between = tokens / (layout.row if layout.cuts_tokens else 1)
    width = model.width / layout.col
    stream = FLOAT if job.storage.weight == FLOAT else job.element
    layer = _layer(job, layout, tokens, between, width, stream)
    if layout.recomputes:
        return (model.layers + 2) * between * width * stream, layer
    return model.layers * layer + 2 * between * width * stream, layer


def _layer(
    job: Job, layout: Layout, tokens: int, between: float, width: float, stream: int
) -> float:
    model, element = job.model, job.element
    # The residual stream before each norm, the normalised one before its gains, and each block's input.
    held = model.norms * between * width * stream * (1 if job.fused or model.positions else 2)
    blocks = sum(linear.swapped for linear in model.linears)
    held += blocks * (between if layout.cuts_tokens and job.fused else tokens) * width * element
    heads = model.heads / layout.row * model.head_width
    keys = max(1, model.kv_heads / layout.row) * model.head_width
    held += tokens * (2 * heads + 2 * keys) * element
    if job.attention not in FUSED:
        held += tokens * job.sequence * model.heads / layout.row * (FLOAT + element)
    hidden = model.mlp_inputs / layout.row
    gated = sum(not m.swapped for m in model.linears[-3:]) == 2
    held += tokens * hidden * element * ((3 if job.fused else 4) if gated else 2)
    return held
