"""Bytes that one rank holds at the fullest moment of a step, by what they are for."""

from __future__ import annotations

from dataclasses import dataclass

from fourfold_parallel.common.attention import FUSED
from fourfold_parallel.plan.job import Job, Layout
from fourfold_parallel.plan.machine import Machine
from fourfold_parallel.plan.transformer import Block, DecoderLayer, Mixture

FLOAT = 4
GRADIENTS_OF_A_LAYER = 0.15
"""Of what a decoder layer keeps: the gradients of its activations that are there at once in its backward.
Fitted to `benchmarks/plan_memory.jsonl`, where the single configurations say .06 to .20."""
SPREAD = 2
"""Tiles under way over depth in backward: the gradient of a layer, sent and received."""
BUSIEST = 1.25
"""Tokens that the fullest rank's exchanged experts get, by the mean: the usual capacity factor (Fedus et al.
2021, section 2.2). Untrained routers on 2 and 4 ranks send 1.2 times the mean."""


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
    """Gradients of tiles under way over depth: sent and received, of one layer."""
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
        backward = self.tiles + GRADIENTS_OF_A_LAYER * self.layer
        again = self.layer if self.recomputes else 0
        return self.lasting + max(
            self.tiles + self.activations + self.logits,
            backward + self.spread + self.activations + again,
            backward + gradients + self.layer,  # what is under way is counted among the gradients
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
    whole = layout.row * layout.col * layout.depth
    matrices = model.matrix_parameters + model.crowded(layout.depth)
    tables = (model.positions / layout.row + (0 if model.tied else model.vocabulary)) * model.width
    small = sum(number * layer.small for layer, number in model.stack)
    if model.beside == "one norm":
        return (matrices + tables) / whole + (small + model.others) / layout.col
    return (matrices + tables + model.others) / whole + small / layout.col


def _tiles(job: Job, layout: Layout, matrices: float) -> float:
    """Two neighbours' tiles where depth gathers them again; else all that are gathered or converted.

    What lies in whole blocks is kept as it was computed with: gathered, and experts' words in order.
    Of experts that stay, a rank has its own alone.
    """
    row, col = layout.row, layout.col
    converts = job.element < job.storage.weight
    kept = []
    parts = [(part, n) for layer, n in job.model.stack for part in layer.parts]
    matrices -= sum(part.tile_elements(row, col) * n for part, n in parts if layout.leaves(part))
    for layer, number in job.model.stack:
        held = 0.0
        for part in layer.parts:
            if layout.leaves(part):
                own = part.tile_elements(row, col) * part.crowding(layout.depth) / layout.depth
                held += own if converts else own * 2 / 3 * (part.matrices == 3)
            elif part.lies_whole and layout.depth > 1 and not layout.keeps_tiles:
                held += part.tile_elements(row, col)
            elif isinstance(part, Mixture) and part.matrices == 3 and not converts:  # gate and up
                held += part.tile_elements(row, col) * 2 / 3
        kept.append((held, number))
    held = max(k for k, _ in kept) if layout.recomputes else sum(k * n for k, n in kept)
    if layout.depth > 1 and not layout.keeps_tiles:
        gathered = (part for part in job.model.parts if not layout.leaves(part))
        sizes = sorted(part.tile_elements(row, col) for part in gathered)
        return (sum(sizes[-2:]) + held) * job.element
    if layout.depth > 1 or converts:
        return (matrices + held) * job.element
    return held * job.element


def _spread(job: Job, layout: Layout) -> float:
    if layout.depth == 1:
        return 0.0
    gathered = (part for part in job.model.parts if not layout.leaves(part))
    largest = max(part.tile_elements(layout.row, layout.col) for part in gathered)
    return SPREAD * largest * job.element


def _activations(job: Job, layout: Layout, tokens: int) -> tuple[float, float]:
    """Kept for backward by all layers, with recomputation by their borders alone; and by the largest."""
    model = job.model
    between = tokens / (layout.row if layout.cuts_tokens else 1)
    width = model.width / layout.col
    stream = FLOAT if job.storage.weight == FLOAT else job.element
    held = [
        (_layer(job, layout, layer, tokens, between * width * stream), number)
        for layer, number in model.stack
    ]
    largest = max(size for size, _ in held)
    if layout.recomputes:
        return (model.layers + 2) * between * width * stream, largest
    return sum(size * n for size, n in held) + 2 * between * width * stream, largest


def _layer(job: Job, layout: Layout, layer: DecoderLayer, tokens: int, stream: float) -> float:
    # The residual stream before each norm, and the normalised one before its gains.
    held = layer.norms * stream * (1 if job.fused or job.model.positions else 2)
    return held + sum(_block(job, layout, block, tokens) for block in layer.blocks)


def _block(job: Job, layout: Layout, block: Block, tokens: int) -> float:
    """The block's input, and what its attention, hidden units or experts keep."""
    model, element = job.model, job.element
    row = 1 if block.whole else layout.row
    between = tokens / (layout.row if layout.cuts_tokens and job.fused and not block.whole else 1)
    held = between * model.width / layout.col * element
    if block.whole and layout.col > 1:  # and the whole residual stream
        held += between * model.width * element
    if block.attends:
        heads = model.heads / row * model.head_width
        keys = max(1, model.kv_heads / row) * model.head_width
        held += tokens * (2 * heads + 2 * keys) * element
        held += tokens * sum(p.outputs for p in block.linears if p.form == "latent") * element
        if job.attention not in FUSED:
            held += tokens * job.sequence * model.heads / row * (FLOAT + element)
    elif block.linears:
        kept = (3 if job.fused else 4) if block.gated else 2
        held += tokens * block.hidden / row * element * kept
    for part in block.parts:
        if isinstance(part, Mixture):
            kept = (3 if job.fused else 4) if part.matrices == 3 else 2
            units = kept * part.units(layout.row, layout.col)
            rows, times = tokens * part.chosen, 2
            if layout.leaves(part):  # what came from others is kept too
                rows, times = rows * part.crowding(layout.depth) * BUSIEST, 3
            held += rows * (units + times * part.width) * element
    return held
