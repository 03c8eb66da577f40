"""The layers of a transformer beside the linear ones, on the grid.

The residual stream is cut over col: a rank holds `width / C` features of its own tokens, and the
ranks of row hold copies. Between a plain and a swapped layer the features (heads, hidden units) are
cut over row, and the ranks of col hold copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from fourfold_parallel.grid.collectives import ALONE, Axis
from fourfold_parallel.grid.linear import Linear
from fourfold_parallel.grid.mesh import Cut, Mesh
from fourfold_parallel.grid.schedule import Around, Layer, Schedule

VOCABULARY: Cut = {"row": 0, "col": 1, "depth": 0}
"""Embedding and head: vocabulary over row and depth, width over col, as a plain layer's weight."""
POSITIONS: Cut = {"col": 1, "depth": 0}
RESIDUAL: Cut = {"col": 0}
HEADS: Cut = {"row": 0}
LOW_RANK_INPUT: dict[bool, Cut] = {False: {"col": 1}, True: {"row": 1}}
"""By whether the layer beside the adapter is swapped."""
LOW_RANK_OUTPUT: dict[bool, Cut] = {False: {"row": 0}, True: {"col": 0}}
COPIES: Cut = {}

IGNORED = -100
"""The target that counts for nothing, as in torch and transformers."""


class Embedding(Layer):
    """Rows of a table by token, with the vocabulary cut over row and the width over col.

    A rank looks up the tokens of its part of the vocabulary and gives zero for the others; the sum
    over row is the embedding. Its gradient needs no exchange over row: each rank's tokens are its
    own. `padding_token` gets no gradient, as in torch, and `scale` multiplies the result.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        *,
        mesh: Mesh,
        name: str,
        schedule: Schedule,
        padding_token: int | None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(mesh=mesh, name=name, schedule=schedule)
        self.hold_tiled("weight", weight)
        self.scale = scale
        self.start, self.stop = mesh.row.bounds(weight.shape[0])
        self.padding: int | None = None
        if padding_token is not None and self.start <= padding_token < self.stop:
            self.padding = padding_token - self.start

    def forward(self, tokens: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch piece"]:
        """The embeddings' features of this rank's part of col."""
        tile = self.use(self.visit(), "weight")
        if self.start == self.stop:  # more rows of the grid than of the table
            tile = F.pad(tile, (0, 0, 0, 1))
        elsewhere = (tokens < self.start) | (tokens >= self.stop)
        here = (tokens - self.start).masked_fill(elsewhere, 0)
        rows = F.embedding(here, tile, padding_idx=self.padding)
        embedding = self.mesh.row.sum(rows.masked_fill(elsewhere.unsqueeze(-1), 0))
        if self.scale == 1.0:
            return embedding
        # Gemma keeps its scale in float32 and rounds it to the embedding's number format.
        return embedding * torch.tensor(self.scale).to(embedding)


class Table(Around):
    """A learned table of positions: its width cut over col, its rows gathered over depth.

    Args:
        inner: The module whose forward finds the rows; its weight is replaced by the tile.
        weight: The table.
        mesh: The grid.
        name: What messages and traces call it.
        schedule: Shared by all layers of a model.
    """

    def __init__(
        self, inner: nn.Module, weight: nn.Parameter, *, mesh: Mesh, name: str, schedule: Schedule
    ) -> None:
        super().__init__(inner, mesh=mesh, name=name, schedule=schedule)
        self.hold_tiled("weight", weight)

    def forward(self, *args: Any, **kwargs: Any) -> Float[Tensor, "*batch piece"]:
        """The inner module's result, for this rank's features."""
        return self.call({"weight": self.use(self.visit(), "weight")}, args, kwargs)


class Copied(Around):
    """Any module whose own parameters need nothing but the sum of their gradients.

    Such as a norm over one head's features, which every rank holds whole, or an attention module
    with a bias of its heads, of which a rank holds its own heads' part.

    Args:
        inner: The module; its own parameters are replaced, its modules become modules of this one.
        parameters: The copies or parts, by name.
        summed: The axes along which ranks feed it different things.
        mesh: The grid.
        name: What messages and traces call it.
        schedule: Shared by all layers of a model.
    """

    def __init__(
        self,
        inner: nn.Module,
        parameters: dict[str, nn.Parameter],
        *,
        summed: Sequence[Axis],
        mesh: Mesh,
        name: str,
        schedule: Schedule,
    ) -> None:
        super().__init__(inner, mesh=mesh, name=name, schedule=schedule)
        for parameter_name, parameter in parameters.items():
            self.hold_copied(parameter_name, parameter, summed=summed)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The inner module's result."""
        visit = self.visit()
        values = {name: self.use(visit, name) for name in self.parameter_names}
        return self.call(values, args, kwargs)


class Mixing(Copied):
    """A module from the residual stream to itself that every rank computes whole.

    The pieces of its inputs are gathered over col, and each rank keeps its piece of the result.
    """

    def __init__(self, *args: Any, width: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.width = width

    def forward(
        self, *pieces: Float[Tensor, "*batch piece"], **options: Any
    ) -> Float[Tensor, "*batch piece"]:
        """The inner module's result, for this rank's features."""
        col = self.mesh.col
        inputs = [col.whole(piece, dim=-1, length=self.width, used="alike") for piece in pieces]
        return self.piece(super().forward(*inputs, **options))

    def piece(self, whole: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch piece"]:
        """This rank's features of a residual stream that every rank has whole."""
        return self.mesh.col.share(whole, dim=-1)


class RMSNorm(Layer):
    """`x / rms(x) * (offset + weight)` over a width that is cut over an axis.

    Only the mean square of each token crosses ranks, once forward and once backward. The runs of
    the paper normalised each part by itself, which is another model.

    Args:
        weight: The gains, cut over the axis.
        axis: col for the residual stream, row for all heads together.
        offset: 0, or 1 where the gains are stored as their difference from one.
        gains_wide: Whether the gains multiply before the result returns to the input's number
            format (Gemma) rather than after (Llama).
        epsilon: Added to the mean square.
        summed: The axes along which ranks feed it different tokens.
        mesh: The grid.
        name: What messages and traces call it.
        schedule: Shared by all layers of a model.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        *,
        axis: Axis,
        epsilon: float,
        offset: float,
        gains_wide: bool,
        summed: Sequence[Axis],
        mesh: Mesh,
        name: str,
        schedule: Schedule,
    ) -> None:
        super().__init__(mesh=mesh, name=name, schedule=schedule)
        self.width, self.axis = weight.shape[0], axis
        self.epsilon, self.offset, self.gains_wide = epsilon, offset, gains_wide
        self.hold_copied("weight", weight, summed=summed)

    def forward(
        self, hidden_states: Float[Tensor, "*batch piece"]
    ) -> Float[Tensor, "*batch piece"]:
        """The normalised features of this rank's part."""
        gain = self.use(self.visit(), "weight")
        wide = hidden_states.to(_at_least_float32(hidden_states.dtype))
        mean_square = _mean_over(self.axis, wide.pow(2), self.width)
        normal = wide * torch.rsqrt(mean_square + self.epsilon)
        if self.gains_wide:
            return (normal * (self.offset + gain.to(wide.dtype))).type_as(hidden_states)
        scale = gain if self.offset == 0 else self.offset + gain
        return scale * normal.to(hidden_states.dtype)


class LayerNorm(Layer):
    """`(x - mean(x)) / std(x) * weight + bias` over a width that is cut over an axis.

    Mean and variance of each token cross ranks one after the other: the variance from centred
    features is exact where a difference of squares would cancel.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        axis: Axis,
        epsilon: float,
        summed: Sequence[Axis],
        mesh: Mesh,
        name: str,
        schedule: Schedule,
    ) -> None:
        super().__init__(mesh=mesh, name=name, schedule=schedule)
        self.width, self.axis, self.epsilon = weight.shape[0], axis, epsilon
        self.hold_copied("weight", weight, summed=summed)
        if bias is None:
            self.bias = None
        else:
            self.hold_copied("bias", bias, summed=summed)

    def forward(
        self, hidden_states: Float[Tensor, "*batch piece"]
    ) -> Float[Tensor, "*batch piece"]:
        """The normalised features of this rank's part."""
        visit = self.visit()
        gain = self.use(visit, "weight")
        shift = self.use(visit, "bias") if self.bias is not None else None
        if self.axis.size == 1:  # the statistics are complete here: torch's own kernel
            return F.layer_norm(hidden_states, (self.width,), gain, shift, self.epsilon)
        wide = hidden_states.to(_at_least_float32(hidden_states.dtype))
        centred = wide - _mean_over(self.axis, wide, self.width)
        variance = _mean_over(self.axis, centred.pow(2), self.width)
        normal = centred * torch.rsqrt(variance + self.epsilon) * gain
        return (normal if shift is None else normal + shift).to(hidden_states.dtype)


class Interleaved(Linear):
    """A plain layer that computes several things of equal width at once, such as GPT-2's q, k, v.

    Its weight's rows are stored interleaved (`feature part`), so that cutting over row gives each
    rank its own heads of every part; the output comes in the order the model expects.
    """

    parts: int = 3

    def forward(self, x: Float[Tensor, "*batch piece"]) -> Float[Tensor, "*batch piece_out"]:
        """This rank's features of the first part, then of the second, and so on."""
        return rearrange(super().forward(x), "... (f part) -> ... (part f)", part=self.parts)


class SharedHeads(Linear):
    """A plain layer with fewer key or value heads than the grid has rows.

    The heads' features are cut over row as any others; then they are gathered over row, and each
    rank takes the head that its queries attend to. Backward, the gradients of the ranks that share
    a head are summed.
    """

    heads: int = 1

    def forward(self, x: Float[Tensor, "*batch piece"]) -> Float[Tensor, "*batch head_width"]:
        """The features of the one head that this rank's queries use."""
        row = self.mesh.row
        features = row.whole(super().forward(x), dim=-1, length=self.out_features, used="apart")
        return features.chunk(self.heads, dim=-1)[row.rank * self.heads // row.size]


class Latent(Linear):
    """A plain layer to a latent that every rank needs whole, since it makes its own heads of it.

    What the ranks of row make of the latent are different heads, so their gradients of it are terms of
    a sum, which is taken here.
    """

    def forward(self, x: Float[Tensor, "*batch piece"]) -> Float[Tensor, "*batch latent"]:
        """The whole latent."""
        return self.mesh.row.whole(
            super().forward(x), dim=-1, length=self.out_features, used="apart"
        )


class Expanding(Linear):
    """A plain layer from a latent to heads.

    Its input is whole on every rank: each rank of col multiplies its share of the features, as of a
    residual stream. The sum of the latent's gradient over row is left to `Latent`.
    """

    @property
    def sums_input_gradient(self) -> Axis:
        """No axis."""
        return ALONE

    def forward(self, x: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch piece_out"]:
        """This rank's heads."""
        return super().forward(self.mesh.col.share(x, dim=-1))


class WholeHead(Linear):
    """A head whose logits are gathered over row, for code that expects all of them.

    Every rank of row then computes the same from the same logits, and keeps its part of the
    gradient.
    """

    def forward(self, x: Float[Tensor, "*batch piece"]) -> Float[Tensor, "*batch vocabulary"]:
        """The logits of the whole vocabulary."""
        return self.mesh.row.whole(
            super().forward(x), dim=-1, length=self.out_features, used="alike"
        )


class LowRankInput(Layer):
    """`A x`, the first factor of a low-rank adapter (Hu et al. 2021), beside another layer.

    Its inputs are cut as those of the layer beside it, its few outputs not at all: one sum of them
    forward over the contracted axis, and one backward over the produced axis, whose ranks use them
    apart. In the sequence form a block sums its inputs' gradients itself, and what is summed
    backward beside a plain layer is A's gradient instead.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        *,
        swapped: bool,
        cuts_tokens: bool,
        mesh: Mesh,
        name: str,
        schedule: Schedule,
    ) -> None:
        super().__init__(mesh=mesh, name=name, schedule=schedule)
        self.contracted, self.produced = (mesh.row, mesh.col) if swapped else (mesh.col, mesh.row)
        summed = [mesh.depth]
        if cuts_tokens and not swapped:
            self.produced, summed = ALONE, [mesh.row, mesh.depth]
        self.hold_copied("weight", weight, summed=summed)

    def forward(self, x: Float[Tensor, "*batch piece"]) -> Float[Tensor, "*batch rank"]:
        """The adapter's inner features, whole on every rank."""
        partial = F.linear(x, self.use(self.visit(), "weight"))
        return self.produced.copy(self.contracted.sum(partial))


class LowRankOutput(Layer):
    """`B (A x)`, the second factor of a low-rank adapter: its outputs cut as its neighbour's."""

    def __init__(
        self,
        weight: nn.Parameter,
        *,
        swapped: bool,
        cuts_tokens: bool,
        mesh: Mesh,
        name: str,
        schedule: Schedule,
    ) -> None:
        super().__init__(mesh=mesh, name=name, schedule=schedule)
        self.tokens = mesh.row if cuts_tokens and swapped else ALONE
        self.hold_copied("weight", weight, summed=[mesh.depth])

    def forward(self, x: Float[Tensor, "*batch rank"]) -> Float[Tensor, "*batch2 piece_out"]:
        """This rank's output features, of its tokens."""
        return self.tokens.share(F.linear(x, self.use(self.visit(), "weight")), dim=-2)


def vocabulary_cross_entropy(
    logits: Float[Tensor, "*batch piece"],
    targets: Int[Tensor, "*batch"],
    *,
    row: Axis,
    vocabulary: int,
) -> Float[Tensor, "*batch"]:
    """Cross-entropy in nats of logits whose vocabulary is cut over row; zero at ignored targets.

    The logits are never gathered. Three numbers of each token cross ranks: the largest logit, the
    sum of exponentials, and the target's logit; backward, none. Computed in float32 at least.

    Args:
        logits: This rank's part of the vocabulary, of its tokens.
        targets: Over the whole vocabulary; `IGNORED` counts for nothing.
        row: The axis over which the vocabulary is cut.
        vocabulary: Its whole size.
    """
    if row.size == 1:  # all logits are here: torch's own kernel
        wide = logits.to(_at_least_float32(logits.dtype))
        nats = F.cross_entropy(
            wide.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return nats.view(targets.shape)
    return _VocabularyCrossEntropy.apply(logits, targets, row, vocabulary)


class _VocabularyCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, row: Axis, vocabulary: int) -> Tensor:
        start, stop = row.bounds(vocabulary)
        wide = logits.to(_at_least_float32(logits.dtype))
        largest = (
            wide.amax(-1)
            if stop > start
            else wide.new_full(targets.shape, torch.finfo(wide.dtype).min)
        )
        largest = row.all_reduce(largest, op="max", layer="loss").wait()
        shifted = wide - largest.unsqueeze(-1)
        ignored = targets == IGNORED
        elsewhere = ignored | (targets < start) | (targets >= stop)
        here = (targets - start).masked_fill(elsewhere, 0).unsqueeze(-1)
        own = shifted.gather(-1, here).squeeze(-1) if stop > start else largest
        exponentials = shifted.exp_()
        sums = torch.stack([exponentials.sum(-1), own.masked_fill(elsewhere, 0)])
        partition, target = row.all_reduce(sums, layer="loss").wait()
        ctx.save_for_backward(exponentials, partition, here, elsewhere, ignored)
        ctx.dtype = logits.dtype
        return (partition.log() - target).masked_fill(ignored, 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        exponentials, partition, here, elsewhere, ignored = ctx.saved_tensors
        gradient = gradient.masked_fill(ignored, 0)
        slope = exponentials * (gradient / partition).unsqueeze(-1)
        if slope.shape[-1]:
            slope.scatter_add_(-1, here, -gradient.masked_fill(elsewhere, 0).unsqueeze(-1))
        return slope.to(ctx.dtype), None, None, None


def _mean_over(axis: Axis, parts: Tensor, width: int) -> Tensor:
    """The mean over a width that is cut over `axis`, for every rank to use on its own part."""
    if axis.size == 1:
        return parts.mean(-1, keepdim=True)
    return axis.copy(axis.sum(parts.sum(-1, keepdim=True))) / width


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
