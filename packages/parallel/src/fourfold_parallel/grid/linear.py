"""One linear layer on the grid: the algorithm of the paper.

    Y = X Wᵀ + b        X [m, k]    W [n, k]    Y [m, n]

`m` counts the tokens of the whole batch, `k` and `n` the input and output features. The grid has
`D * Z * R * C` ranks: D along data, Z along depth, R along row, C along col.

Forward multiplies and adds `m * n * k` times: once for each token, output feature and input
feature. Data and depth cut `m`, row cuts `n`, col cuts `k`, so that every rank computes one block.
Each matrix lacks one of the three indices, and the ranks along the axis that cuts this index share
one block of it:

- Y lacks `k`: along col each rank computes one term of Y; then all hold their sum.
- X lacks `n`: along row all hold X, and each computes one term of dX; then all hold their sum.
- W lacks `m`: along depth it is not held in copies but cut once more, gathered where it is used,
  and the terms of dW are summed into its pieces. Data cuts `m` as well: along it all hold W, and
  the terms of dW are summed once a step.

==============  ==================  ================================================================
tensor          local shape         along each axis
==============  ==================  ================================================================
X, dX           `[m / (D Z), k/C]`  tokens cut over data, then depth; features over col; row: copies
W, dW piece     `[n / (R Z), k/C]`  rows cut over row, then depth; columns over col; data: copies (a)
W tile          `[n / R, k/C]`      rows cut over row, columns over col; depth, data: copies
dW tile         `[n / R, k/C]`      cut as W's tile; depth, data: terms of a sum
b, db           `[n / R]`           cut over row; depth, col, data: copies (a)
Y, dY           `[m / (D Z), n/R]`  tokens cut over data, then depth; features over row; col: copies
==============  ==================  ================================================================

(a) Gradients: terms of a sum over data, until the sum of step 8.

With n = 8, k = 12, m = 16 and D = 1, Z = R = C = 2, rank (z, r, c) holds tokens 8z to 8z + 7 and
features 6c to 6c + 5 of X, and of W those columns and the rows 4r + 2z and 4r + 2z + 1. Its tile has
the rows 4r to 4r + 3; so has its b; its Y has tokens 8z to 8z + 7 and these features.

====  ====================  =====  ================  =======================  ======================
step  collective            axis   payload           started                  waited for
====  ====================  =====  ================  =======================  ======================
1     all-gather of W       depth  `n k / (R C)`     before 2 of layer i - 1  before 2
3     all-reduce of Y       col    `m n / (D Z R)`   after 2                  at once
4     all-gather of W       depth  `n k / (R C)`     before 5 of layer i + 1  before 5
5     all-reduce of dX      row    `m k / (D Z C)`   after its product        after the product of 6
6     reduce-scatter of dW  depth  `n k / (R C)`     after its product        after layer i - 1's 5-7
7     all-reduce of db      depth  `n / R`           after its local sum      after layer i - 1's 5-7
8     all-reduce of dW, db  data   `n k / (Z R C)`,  when a bucket of them    at the end of the
                                   `n / R`           is full                  last microbatch
====  ====================  =====  ================  =======================  ======================

Layer `i` is this one, `i - 1` the one before it in forward, `i + 1` the one after. Step 2 is the
local product of forward; 5 to 7, in this order, make up backward, and each begins with a local
product or sum.

Three overlaps follow, each with a switch in `Overlaps`: `weights` (1 and 4 run under the products of
a neighbour), `input_gradient` (5 under the product of 6), `weight_gradient` (6 and 7 under the
backward of layer i - 1). Depth has one communicator for gathers and one for sums, so that 4 does not
queue behind 6. `Schedule` learns the order of layers from one forward and backward, recomputation
of activations (steps 1 to 3 again) included; until then 1 and 4 start where they are waited for,
and 6 and 7 are waited for before the backward of layer i - 1. Where there is no neighbour: the first
layer's 1 starts where it is waited for, and its 6 and 7 are waited for at once; the last layer's 4
starts before its own 2, in forward.

The payload counts the elements of the full tensor that a collective assembles, spreads or sums, each
of the computation's number format in steps 1 to 7, of the parameter's in step 8, or of the format
that the axis has for its wire. In a ring of `p` ranks each rank sends `(p - 1) / p` of it, and twice
that for an all-reduce. A length that an axis does not divide is cut into pieces of `ceil(length /
size)`, the last ones shorter or empty, and padded on the wire where it is gathered or spread.

A layer that keeps its tile skips 4, one whose X needs no gradient skips 4 and 5; a frozen b skips 7,
a frozen W skips 6, and then nothing hides 5. A layer used twice takes steps 1 to 7 twice, and its
gradients meet before 8.

Step 8 is in `gradients.py`: it runs in the backward of the last microbatch, and sends a gradient
only after its sum of step 6 or 7. All are sums, not means: the loss is already divided by the
number of targets in the whole batch.

A *swapped* layer exchanges row and col (and R and C) everywhere above. A plain layer takes features
cut over col and gives features cut over row, a swapped one the reverse, so a plain and a swapped
layer in turn need nothing in between.

On an axis of size one a collective is the identity. So row alone is Megatron's split, where its
"column-parallel" layer is our plain one and its "row-parallel" layer our swapped one; depth alone
is ZeRO-3 for W (b is copied); data alone is DistributedDataParallel; one rank is `torch.nn.Linear`.

In the *sequence form* (`sequence.py`) the tokens between two blocks are cut over row as well. Then a
swapped layer spreads the sum of step 3 instead of holding it in copies, and a plain layer leaves
that of step 5 to the gather that brought its tokens together, once for all plain layers that a block
begins with. Row moves no more than before, but waits for these gathers and spreads at once.

Singh et al. 2024, "Democratizing AI: Open-source Scalable LLM Training on GPU-based
Supercomputers" (SC'24), sections III and V.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fourfold_parallel.grid.collectives import ALONE, SILENT, Axis, Context
from fourfold_parallel.grid.mesh import Cut, Mesh
from fourfold_parallel.grid.products import Products
from fourfold_parallel.grid.schedule import Layer, Schedule, Visit


class Linear(Layer):
    """`X Wᵀ + b` with `W` cut over row, col and depth.

    Args:
        weight: `[n, k]`, cut as `weight_cut` says.
        bias: None, or `[n]`, cut as `bias_cut` says.
        swapped: Whether row and col change places.
        keeps_tile: Keep the gathered tile from forward to backward, instead of step 4. It costs the
            memory of all tiles; inside a checkpointed region, of that region's while its backward runs.
        cuts_tokens: The sequence form.
        products: How the three matrix products are computed.
        mesh: The grid.
        name: What messages and traces call it.
        schedule: Says when gathers start and gradients are waited for.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        mesh: Mesh,
        name: str,
        schedule: Schedule,
        swapped: bool,
        keeps_tile: bool = False,
        cuts_tokens: bool = False,
        products: Products,
    ) -> None:
        super().__init__(mesh=mesh, name=name, schedule=schedule)
        self.swapped, self.products = swapped, products
        self.keeps_tile = keeps_tile or mesh.depth.size == 1  # the tile is then the piece itself
        self.cuts_tokens = cuts_tokens
        self.out_features, self.in_features = weight.shape
        n, k = self.out_features, self.in_features
        self.is_whole = mesh.depth.size == mesh.row.size == mesh.col.size == 1
        # Names the shape to whoever chooses modes of products: see products.py.
        self.site = f"{n}x{k} over {self.produced.size}x{self.contracted.size}"
        self.hold_tiled("weight", weight)
        if bias is None:
            self.bias = None
        else:
            self.hold_copied("bias", bias, summed=[mesh.depth])

    @property
    def contracted(self) -> Axis:
        """The axis over which input features are cut: the product sums over it."""
        return self.mesh.row if self.swapped else self.mesh.col

    @property
    def produced(self) -> Axis:
        """The axis over which output features are cut."""
        return self.mesh.col if self.swapped else self.mesh.row

    @property
    def sums_output(self) -> Axis:
        """The axis of step 3; none where the sequence form spreads the sum afterwards."""
        return ALONE if self.cuts_tokens and self.swapped else self.contracted

    @property
    def sums_input_gradient(self) -> Axis:
        """The axis of step 5; none where the sequence form sums for all layers of a block."""
        return ALONE if self.cuts_tokens and not self.swapped else self.produced

    def forward(self, x: Float[Tensor, "*batch piece"]) -> Float[Tensor, "*batch2 piece_out"]:
        """From this rank's tokens and input features to its output features."""
        visit = self.visit()  # has this layer's gather under way (step 1), and starts the next's
        weight = visit.parameters["weight"].piece
        bias = visit.parameters["bias"].piece if self.bias is not None else None
        x = x.to(weight.dtype)  # as autocast would; the product itself runs with autocast off
        if self.is_whole and self.mesh.observer is SILENT and type(self.products) is Products:
            return F.linear(x, weight, bias)  # the steps below are identities, which cost time
        if torch.is_autocast_enabled(x.device.type):  # entering the context costs time
            with torch.autocast(x.device.type, enabled=False):
                y = _GridProduct.apply(x, weight, bias, self, visit)
        else:
            y = _GridProduct.apply(x, weight, bias, self, visit)
        if self.cuts_tokens and self.swapped:
            # Step 3 of the sequence form: the sum, of which each rank of the axis keeps its tokens.
            # Waited for at once; its backward gathers dY.
            return self.contracted.split(y, dim=-2)
        return y


class _GridProduct(torch.autograd.Function):
    """Steps 1 to 7. Autograd sees this rank's pieces, and placeholders for dW and db under way."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, piece: Tensor, bias: Tensor | None, layer: Linear, visit: Visit
    ) -> Tensor:
        # 1. The pieces of the depth siblings (the ranks that differ from this one in depth alone)
        #    make the tile. The visit of the layer before this one started this gather, and ours has
        #    started the next layer's, so that one runs under step 2. We wait here: step 2 reads it.
        #    A wait orders the device's streams; the host goes on.
        tile = visit.wait_for_tile("weight")

        # 2. The local product. Only the first rank of the contracted axis adds the bias: the sum
        #    that follows then adds it once.
        note = layer.mesh.observer.product  # in a trace, from which tests read the overlap
        note("forward", layer.name)
        b = bias if layer.contracted.rank == 0 else None
        partial = layer.products.forward(x, tile, b, site=layer.site)

        # 3. A rank multiplied its slice of the input features only, so its result is one term of Y:
        #    the sum over the contracted axis is Y, on every rank of it. Backward needs no twin of
        #    this sum: these ranks go on alike, so each receives the whole dY of its features.
        #    Waited for at once: the next layer reads it.
        y = layer.sums_output.all_reduce(partial, layer=layer.name).wait()

        ctx.layer = layer
        # Where backward leaves dW and db under way, for `_AwaitGradient` to wait for.
        ctx.late = {name: parameter.late for name, parameter in visit.parameters.items()}
        ctx.dtype, ctx.state = piece.dtype, layer.state()
        # Step 4 gathers the parameter itself; backward refuses one that has changed by then.
        ctx.save_for_backward(x, tile if layer.keeps_tile else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Context, dy: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        layer: Linear = ctx.layer
        overlaps = layer.schedule.overlaps
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad[:3]
        note = layer.mesh.observer.product
        x, kept = ctx.saved_tensors
        layer.refuse_changes(since=ctx.state)
        dx = dw = db = dx_sum = None

        if needs_dx:
            # 4. The tile again. The visit of the following layer's backward started this gather,
            #    before its two products; ours starts the preceding layer's, where that needs one.
            if layer.keeps_tile:
                tile = kept
            else:
                tile = layer.revisit(dtype=ctx.dtype).wait_for_tile("weight")

            # 5. A rank multiplied its slice of the output features only, so its result is one term
            #    of dX: the sum over the produced axis is dX. Started here ...
            note("input_gradient", layer.name)
            dx_sum = layer.sums_input_gradient.all_reduce(
                layer.products.input_gradient(dy, tile, site=layer.site), layer=layer.name
            )
            if not overlaps.input_gradient:
                dx_sum.wait()  # the wait below then finds it done

        if needs_dw:
            # 6. The tile's gradient, from this rank's tokens. Its depth siblings saw other tokens:
            #    the sum over depth is the gradient from all tokens of the replica, of which each
            #    keeps its piece. Started here. No product reads it, the first reader is W's
            #    accumulation; so autograd gets a placeholder, and the node `_AwaitGradient` between
            #    this one and W waits and puts the sum in its place. That node was created before the
            #    preceding layer's product, so autograd runs it after that product's backward.
            note("weight_gradient", layer.name)
            scattered = layer.mesh.depth.reduce_scatter(
                layer.products.weight_gradient(dy, x, site=layer.site), layer=layer.name
            )
            dw = ctx.late["weight"].promise(scattered)

        if needs_db:
            # 7. The sum of step 3 contains the bias once, whichever rank added it. So its gradient
            #    is dY, summed over tokens, on every rank of the contracted axis alike; a rank has
            #    its own tokens only, and the sum over depth adds those of its depth siblings.
            summed = layer.mesh.depth.all_reduce(dy.flatten(0, -2).sum(0), layer=layer.name)
            db = ctx.late["bias"].promise(summed)

        if dx_sum is not None:
            # ... and waited for here, with the weight's gradient computed in the meantime.
            dx = dx_sum.wait()
        return dx, dw, db, None, None


def weight_cut(*, swapped: bool) -> Cut:
    """The cut of `W`: rows over the produced axis and then depth, columns over the contracted."""
    if swapped:
        return {"col": 0, "row": 1, "depth": 0}
    return {"row": 0, "col": 1, "depth": 0}


def bias_cut(*, swapped: bool) -> Cut:
    """The cut of `b`: over the produced axis."""
    return {"col": 0} if swapped else {"row": 0}
