"""One linear layer on the grid: the algorithm of the paper.

    Y = X Wᵀ + b        X [m, k]    W [n, k]    Y [m, n]

`m` counts the tokens of the whole batch, `k` and `n` the input and output features. The grid has
`D * Z * R * C` ranks (data, depth, row, col), and a rank holds or computes:

==============  ==========================  ======================================================
tensor          local shape                 cut over
==============  ==========================  ======================================================
X, dX           `[m / DZ, k / C]`           tokens over data and depth, features over col
W, dW piece     `[n / RZ, k / C]`           rows over row, then depth; columns over col
W, dW tile      `[n / R,  k / C]`           rows over row, columns over col; gathered over depth
b, db           `[n / R]`                   row
Y, dY           `[m / DZ, n / R]`           tokens over data and depth, features over row
==============  ==========================  ======================================================

What is not named in the last column is held in copies. Six things are communicated, and these are
all; `payload` is the full tensor that a collective assembles, spreads or sums. A ring of `p` ranks
moves `(p - 1) / p` of it, and an all-reduce twice that.

====  ===========================  =====  =================  ======================================
step  collective                   axis   payload, elements  started ... waited for
====  ===========================  =====  =================  ======================================
1     all-gather of W's pieces     depth  `n k / (R C)`      before the preceding product ... here
3     all-reduce of Y              col    `m n / (D Z R)`    here ... here
4     all-gather of W's pieces     depth  `n k / (R C)`      before the following layer's ... here
5     all-reduce of dX             row    `m k / (D Z C)`    here ... after dW is computed
6     reduce-scatter of dW         depth  `n k / (R C)`      here ... after the preceding layer's dW
7     all-reduce of db             depth  `n / R`            here ... after the preceding layer's dW
====  ===========================  =====  =================  ======================================

The sum of dW's and db's pieces over data happens once an optimizer step (`gradients.py`), not here.

A *swapped* layer exchanges row and col everywhere above. A plain layer takes features cut over col
and gives features cut over row, a swapped one the reverse, so a plain and a swapped layer in turn
need nothing in between. On an axis of size one a collective is the identity, so that `(1, R, 1)`
is Megatron's column-then-row split, `(1, 1, Z)` is ZeRO-3, and one rank is `torch.nn.Linear`.

Singh et al. 2024, "Democratizing AI: Open-source Scalable LLM Training on GPU-based
Supercomputers" (SC'24), sections III and V.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fourfold_parallel.grid.collectives import Axis, Context
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
            memory of all tiles, but nothing inside a checkpointed region, which drops it anyway.
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
        products: Products,
    ) -> None:
        super().__init__(mesh=mesh, name=name, schedule=schedule)
        self.swapped, self.keeps_tile, self.products = swapped, keeps_tile, products
        self.out_features, self.in_features = weight.shape
        n, k = self.out_features, self.in_features
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

    def forward(self, x: Float[Tensor, "*batch piece"]) -> Float[Tensor, "*batch piece_out"]:
        """From this rank's tokens and input features to its output features."""
        visit = self.visit()
        weight = visit.held["weight"].piece
        bias = visit.held["bias"].piece if self.bias is not None else None
        x = x.to(weight.dtype)  # what autocast would do; the product then need not be told
        if not torch.is_autocast_enabled(x.device.type):
            return _GridProduct.apply(x, weight, bias, self, visit)
        with torch.autocast(x.device.type, enabled=False):
            return _GridProduct.apply(x, weight, bias, self, visit)


class _GridProduct(torch.autograd.Function):
    """Steps 1 to 7. Autograd sees the local pieces of X, W and b, and of their gradients."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, piece: Tensor, bias: Tensor | None, layer: Linear, visit: Visit
    ) -> Tensor:
        # 1. The pieces of the depth siblings make the tile. The gather was started while the layer
        #    before this one computed, and the next layer's gather has been started by now.
        tile = visit.tile("weight")

        # 2. The local product. Only the first rank of the contracted axis adds the bias: the sum
        #    that follows then adds it once.
        observe = layer.mesh.observer.product
        observe("forward", layer.name)
        b = bias if layer.contracted.rank == 0 else None
        partial = layer.products.forward(x, tile, b, site=layer.site)

        # 3. Every rank of the contracted axis had a part of the input features, so that the parts
        #    of the output add up. Waited for at once: the next layer needs it.
        y = layer.contracted.all_reduce(partial, layer=layer.name).wait()

        ctx.layer = layer
        ctx.late = {name: held.late for name, held in visit.held.items()}
        ctx.save_for_backward(x, tile if layer.keeps_tile else piece)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Context, dy: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        layer: Linear = ctx.layer
        overlaps = layer.schedule.overlaps
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad[:3]
        observe = layer.mesh.observer.product
        x, kept = ctx.saved_tensors
        dx = dw = db = dx_sum = None

        if needs_dx:
            # 4. The tile again, gathered while the following layer's backward computed.
            if layer.keeps_tile:
                tile = kept
            else:
                tile = layer.revisit(kept.dtype).tile("weight")

            # 5. Every rank of the produced axis had a part of the output features, so that the
            #    parts of the input's gradient add up. Started here ...
            observe("input_gradient", layer.name)
            dx_sum = layer.produced.all_reduce(
                layer.products.input_gradient(dy, tile, site=layer.site), layer=layer.name
            )
            if not overlaps.input_gradient:
                dx_sum.wait()

        if needs_dw:
            # 6. The tile's gradient, from this rank's tokens. Its depth siblings saw other tokens:
            #    the sum over depth is the tile's whole gradient, of which each keeps its piece.
            #    Started here, and waited for after the preceding layer's products: see schedule.py.
            observe("weight_gradient", layer.name)
            spread = layer.mesh.depth.reduce_scatter(
                layer.products.weight_gradient(dy, x, site=layer.site), layer=layer.name
            )
            dw = ctx.late["weight"].start(spread)

        if needs_db:
            # 7. The bias is added after the sum of step 3, so that dY is its gradient on every rank
            #    of the contracted axis alike; only the tokens of the depth siblings are missing.
            db = ctx.late["bias"].start(layer.start_sum("bias", dy.flatten(0, -2).sum(0)))

        if dx_sum is not None:
            # ... and waited for here, with the weight's gradient computed in the meantime.
            dx = dx_sum.wait()
        return dx, dw, db, None, None


def weight_cut(*, swapped: bool) -> Cut:
    """How `W` is cut: rows over the produced axis and then depth, columns over the contracted."""
    if swapped:
        return {"col": 0, "row": 1, "depth": 0}
    return {"row": 0, "col": 1, "depth": 0}


def bias_cut(*, swapped: bool) -> Cut:
    """How `b` is cut: over the produced axis."""
    return {"col": 0} if swapped else {"row": 0}
