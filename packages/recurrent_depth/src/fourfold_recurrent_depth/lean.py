"""A sandwich block without its modules, for passes that need no gradient.

Decoding a narrow model is a hundred blocks a token, each some sixty calls of modules and small kernels: the
calls are most of the time. Here a block is its tensors and one function. The arithmetic is that of
`SandwichBlock`; a block whose parts are wrapped, hooked, replaced or cut over ranks has no lean form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fourfold_recurrent_depth.fast.elementwise import gated, normalised

if TYPE_CHECKING:
    from fourfold_recurrent_depth.transformers_base import Pass


@dataclass(frozen=True, slots=True, eq=False)
class LeanBlock:
    """Tensors of one block, in the order of their use."""

    gains: tuple[Tensor, Tensor, Tensor, Tensor]
    into_heads: Float[Tensor, "width threefold"]
    bias: Float[Tensor, "2 head head_width"]
    out_of_heads: Float[Tensor, "width width"]
    into_hidden: Float[Tensor, "width twice"]
    out_of_hidden: Float[Tensor, "hidden width"]
    eps: float

    @classmethod
    def of(cls, block: Any, plain: Mapping[type, Callable[..., Any]]) -> LeanBlock | None:
        """The block's tensors, not copies; None unless all its parts are `plain`, float32 or float64."""
        if not all(is_plain(part, plain) for part in block.modules()):
            return None
        attention, mlp = block.attn, block.mlp
        weights = [attention.Wqkv.weight, attention.proj.weight, mlp.fc.weight, mlp.proj.weight]
        for weight in weights:
            is_wide = weight.dtype in (torch.float32, torch.float64)
            if type(weight) is not nn.Parameter or not is_wide:
                return None
        norms = (block.norm_1, block.norm_2, block.norm_3, block.norm_4)
        if len({norm.eps for norm in norms}) > 1:
            return None
        return cls(
            cast(Any, tuple(norm.weight for norm in norms)),
            weights[0].t(), attention.qk_bias.squeeze(1), weights[1].t(), weights[2].t(), weights[3].t(),
            block.norm_1.eps,
        )  # fmt: skip

    def __call__(
        self, x: Float[Tensor, "batch token width"], where: Pass, slot: int
    ) -> Float[Tensor, "batch token width"]:
        """Equation of section 3.2, on tokens as rows."""
        batch, tokens, width = x.shape
        gains, eps = self.gains, self.eps
        rows = x.reshape(-1, width)
        heads = torch.mm(normalised(rows, gains[0], eps), self.into_heads)
        heads = heads.view(batch, tokens, 3, *self.bias.shape[1:])
        qk = torch.view_as_complex((heads[:, :, :2] + self.bias).unflatten(-1, (-1, 2)))
        qk = torch.view_as_real(qk * where.rotary.unsqueeze(2)).flatten(-2)
        q, k = qk.transpose(1, 3).unbind(2)
        v = heads[:, :, 2].transpose(1, 2)
        if where.cache is not None:
            k, v = where.cache.update(k, v, slot)
        is_causal = tokens > 1 and where.mask is None
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=where.mask, is_causal=is_causal)
        mixed = mixed.transpose(1, 2).reshape(-1, width)
        rows = normalised(torch.mm(mixed, self.out_of_heads).add_(rows), gains[1], eps)
        hidden = gated(torch.mm(normalised(rows, gains[2], eps), self.into_hidden))
        rows = torch.mm(hidden, self.out_of_hidden).add_(rows)
        return normalised(rows, gains[3], eps).view(batch, tokens, width)


def is_plain(part: nn.Module, plain: Mapping[type, Callable[..., Any]]) -> bool:
    """Whether a module is one of `plain` with that forward pass, without bias and listeners."""
    own = vars(part)
    is_hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own
    is_same = plain.get(type(part)) is getattr(type(part), "forward", None)
    return is_same and not is_hooked and own["_parameters"].get("bias") is None
