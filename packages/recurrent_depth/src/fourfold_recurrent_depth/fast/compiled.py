"""Blocks in C++ for passes that need no gradient on a CPU: `recurrence.cpp`, compiled when first needed.

At the widths that run on a CPU a block of torch's operations is calls, not arithmetic: sixty of them for what
one processor multiplies in twenty microseconds. Here all recurrences of a pass are one call. What this does
not take goes through `lean.py`, as everything does where there is no compiler.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fourfold_parallel.common import native
from fourfold_recurrent_depth.cache import Aside, RecurrentCache, Room

if TYPE_CHECKING:
    from fourfold_recurrent_depth.lean import LeanBlock
    from fourfold_recurrent_depth.transformers_base import Pass

LANES = 16
"""Widths of the stream, a head and the hidden layer are multiples of it."""
MANY = 16
"""Tokens of a row from which packing the weights pays, once for a forward pass."""
WORTH_SHARING = 4_000_000
"""Multiplications from which a second thread (50 microseconds to wake) pays."""

_POINTER = ctypes.c_void_p
_NUMBER = ctypes.c_int64


class _Block(ctypes.Structure):
    _fields_ = (("gains", _POINTER * 4), ("weights", _POINTER * 5), ("panels", _POINTER))


class _Store(ctypes.Structure):
    _fields_ = (
        ("keys", _POINTER),
        ("values", _POINTER),
        ("strides", _NUMBER * 4),
        ("rows", _POINTER),
    )


class _Pass(ctypes.Structure):
    _fields_ = (
        ("sizes", _NUMBER * 12),
        ("blocks", _POINTER),
        ("slots", _POINTER),
        ("adapter", _POINTER),
        ("injected", _POINTER),
        ("rotary", _POINTER),
        ("mask", _POINTER),
        ("running", _POINTER),
        ("cached", _Store),
        ("own", _Store),
        ("eps", ctypes.c_float),
    )


def library() -> ctypes.CDLL | None:
    """The compiled blocks, or None where nothing here can compile them."""
    return native.load("fourfold_recurrent_depth.fast", "recurrence.cpp")


@dataclass(frozen=True, slots=True, eq=False)
class CompiledBlocks:
    """The blocks of one stage for one forward pass, by the addresses of their tensors."""

    blocks: Sequence[LeanBlock]
    addresses: ctypes.Array[_Block]
    compiled: ctypes.CDLL
    packed: list[Tensor] = field(default_factory=list)
    """The weights of each block in panels, once a call of this pass has many tokens."""

    @classmethod
    def of(cls, blocks: Sequence[LeanBlock]) -> CompiledBlocks | None:
        """None where there is no compiler, or a block is not float32 on a CPU with widths that fit."""
        compiled = library()
        if compiled is None or not blocks or is_in_torch_dispatch_mode() or _is_transformed():
            return None
        shapes = {(block.eps, block.into_hidden.shape, block.bias.shape) for block in blocks}
        if len(shapes) > 1:
            return None
        addresses = (_Block * len(blocks))()
        for address, block in zip(addresses, blocks, strict=True):
            products = (
                block.into_heads, block.out_of_heads, block.into_hidden, block.out_of_hidden,
            )  # fmt: skip
            held = (*block.gains, block.bias, *(weight.t() for weight in products))
            widths = (*block.out_of_hidden.shape, block.bias.shape[-1])
            if any(width % LANES for width in widths):
                return None
            for tensor in held:
                if not (tensor.is_cpu and tensor.dtype == torch.float32 and tensor.is_contiguous()):
                    return None
            address.gains[:] = [gain.data_ptr() for gain in block.gains]
            address.weights[:] = [
                part.data_ptr() for part in (block.into_heads, block.bias, *products[1:])
            ]
        return cls(blocks, addresses, compiled)

    def takes(self, x: Float[Tensor, "batch token width"], where: Pass) -> bool:
        """Whether this pass's tensors are of the form that the compiled code reads."""
        batch, tokens = x.shape[:2]
        cache, mask = where.cache, where.mask
        if type(x) is not Tensor or not x.is_cpu or x.dtype != torch.float32:
            return False
        if type(cache) not in (type(None), RecurrentCache, Aside):
            return False
        if where.rotary.shape[0] not in (1, batch) or where.rotary.shape[1] not in (1, tokens):
            return False
        if mask is None:
            return True
        held = 0 if cache is None else cache.get_seq_length()
        return (
            isinstance(mask, Tensor)
            and mask.dtype == torch.bool
            and mask.shape[0] in (1, batch)
            and mask.shape[1:] == (1, tokens, held + tokens)
            and mask.stride(-1) == 1
        )

    def __call__(
        self,
        x: Float[Tensor, "batch token width"],
        where: Pass,
        slots: Sequence[int],
        *,
        adapter: Float[Tensor, "width twice"] | None = None,
        injected: Float[Tensor, "batch token width"] | None = None,
    ) -> Float[Tensor, "batch token width"]:
        """The blocks, once for each of `slots` (of their first layer), each time behind the adapter.

        Args:
            x: see `takes`.
            where: cache, mask and positions of the pass.
            slots: of the cache.
            adapter: its weight, of which the state's half is applied.
            injected: the embedding's share.
        """
        block = self.blocks[0]
        batch, tokens, width = x.shape
        heads, head_width = block.bias.shape[1:]
        hidden = block.out_of_hidden.shape[0]
        x = x.clone(memory_format=torch.contiguous_format)
        rotary = torch.view_as_real(where.rotary).contiguous()
        mask, held, running = where.mask, 0, None
        if isinstance(where.cache, RecurrentCache | Aside):
            held = where.cache.get_seq_length()
            fresh = x.new_empty(batch, heads, tokens, head_width)
            cached, own, running = where.cache.rooms(fresh, slots, len(self.blocks))
        else:
            keys, values = x.new_empty(2, 1, batch, heads, tokens, head_width)
            cached = own = Room(keys=keys, values=values, is_one_slot=True)
        injected = None if injected is None else injected.expand_as(x).contiguous()
        steps = (_NUMBER * len(slots))(*slots)
        sizes = (
            tokens, width, heads, hidden, held, len(self.blocks), len(slots),
            rotary.stride(0) if rotary.shape[0] > 1 else 0,
            rotary.stride(1) if rotary.shape[1] > 1 else 0,
            mask.stride(0) if mask is not None and mask.shape[0] > 1 else 0,
            0 if mask is None else mask.stride(2), tokens >= MANY,
        )  # fmt: skip
        told = _Pass(
            (_NUMBER * 12)(*sizes), ctypes.addressof(self.addresses), ctypes.addressof(steps),
            _address(adapter), _address(injected), _address(rotary), _address(mask), _address(running),
            _store(cached), _store(own), block.eps,
        )  # fmt: skip
        if tokens >= MANY and not self.packed:
            self._pack(width, hidden)
        pointer, states = ctypes.byref(told), _POINTER(x.data_ptr())

        def recur(first: int, last: int) -> None:
            self.compiled.fourfold_recur(pointer, states, _NUMBER(first), _NUMBER(last))

        per_token = width * (4 * width + 3 * hidden) * len(self.blocks) * len(slots)
        if batch * tokens * per_token < WORTH_SHARING:
            recur(0, batch)
        else:
            native.share(batch, recur)
        return x

    def _pack(self, width: int, hidden: int) -> None:
        for block, address in zip(self.blocks, self.addresses, strict=True):
            panels = block.bias.new_empty(width * (4 * width + 3 * hidden))
            address.panels = panels.data_ptr()
            self.compiled.fourfold_pack(
                ctypes.byref(address), _NUMBER(width), _NUMBER(hidden), _POINTER(address.panels)
            )
            self.packed.append(panels)


def _is_transformed() -> bool:
    """Whether torch differentiates forwards, or maps over a function, which see torch's operations alone."""
    functions: Any = torch._C  # noqa: SLF001
    is_mapped = functions._functorch.peek_interpreter_stack() is not None  # noqa: SLF001
    return is_mapped or torch.autograd.forward_ad._current_level >= 0  # noqa: SLF001


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _store(room: Room) -> _Store:
    keys, values = room.keys, room.values
    before = room.place * keys.shape[-1] * keys.element_size()
    between_slots = 0 if room.is_one_slot else keys.stride(0)
    return _Store(
        keys.data_ptr() + before, values.data_ptr() + before,
        (_NUMBER * 4)(room.first_slot, between_slots, *keys.stride()[1:3]), _address(room.rows),
    )  # fmt: skip
