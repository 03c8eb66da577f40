"""Stages in C++ for passes that need no gradient on a CPU: `recurrence.cpp`, compiled when first needed.

At the widths that run on a CPU a block of torch's operations is calls, not arithmetic: sixty of them for what
one processor multiplies in twenty microseconds. Here all recurrences of a pass are one call. What this does
not take goes through the model's modules, as everything does where there is no compiler.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fourfold_parallel.common import native
from fourfold_recurrent_depth.cache import CandidateCache, RecurrentCache, SlotView
from fourfold_recurrent_depth.fast.row_caches import RowCache, RowCaches
from fourfold_recurrent_depth.stages import Pass, Stage

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
        ("sizes", _NUMBER * 13),
        ("blocks", _POINTER),
        ("slots", _POINTER),
        ("adapter", _POINTER),
        ("injected", _POINTER),
        ("rotary", _POINTER),
        ("mask", _POINTER),
        ("running", _POINTER),
        ("cached", _Store),
        ("own", _Store),
        ("lines", _POINTER),
        ("eps", ctypes.c_float),
    )


_LONGEST, _STEPS = 4, 6
"""Numbers among `sizes`: of tokens cached at most, and of recurrences."""
_NOWHERE = _Store(None, None, (_NUMBER * 4)(), None)


def library() -> ctypes.CDLL | None:
    """The compiled blocks, or None where nothing here can compile them."""
    return native.load("fourfold_recurrent_depth.fast", "recurrence.cpp")


def compiled_stages(
    model: Any,
    embedded: Float[Tensor, "batch token width"],
    this_pass: Pass,
    written: Mapping[type, Callable[..., Any]],
) -> Mapping[str, Stage]:
    """The pass's stages, in C++ where this pass and all parts of the stage allow it.

    Args:
        model: whose blocks.
        embedded: what the pass begins with.
        this_pass: with the stages that stand where these do not go.
        written: the parts that the compiled code stands for, with their forward passes as they were written.
    """
    if model.config.family != "huginn_raven":
        return this_pass.stages  # `recurrence.cpp` is Huginn's block and adapter
    compiled = library()
    if compiled is None or not _is_plain_pass(model, embedded, this_pass):
        return this_pass.stages
    stages = dict(this_pass.stages)
    for name, plain in this_pass.stages.items():
        blocks = list(model.part(name))
        adapter = model.part("adapter") if name == "core_block" else None
        is_exact = adapter is not None and model.config.reference_semantics
        if not is_exact and _have_addresses(blocks, adapter, written):
            stages[name] = CompiledStage(blocks, _addresses(blocks), adapter, plain, compiled)
    return stages


@dataclass(frozen=True, slots=True, eq=False)
class CompiledStage:
    """The blocks of one stage for one forward pass, by the addresses of their tensors."""

    blocks: Sequence[Any]
    addresses: ctypes.Array[_Block]
    adapter: nn.Linear | None
    """The core's."""
    plain: Stage
    """The same stage for what the compiled code does not take."""
    compiled: ctypes.CDLL
    packed: list[Tensor] = field(default_factory=list)
    """The weights of each block in panels, once a call of this pass has many tokens."""
    made: list[_Pass] = field(default_factory=list)
    """The arguments of calls with rows that have caches of their own."""

    def __call__(
        self,
        x: Float[Tensor, "batch token width"],
        this_pass: Pass,
        slots: Sequence[int],
        injected: Float[Tensor, "batch token width"] | None = None,
    ) -> Float[Tensor, "batch token width"]:
        """See `Stage`."""
        if torch.is_grad_enabled() or not _takes(x, this_pass):
            return self.plain(x, this_pass, slots, injected)
        if isinstance(this_pass.cache, RowCaches):
            return self._rows(x, this_pass, this_pass.cache, slots, injected)
        block = self.blocks[0]
        batch, tokens, width = x.shape
        heads, head_width = block.attn.qk_bias.shape[-2:]
        hidden = block.mlp.proj.weight.shape[1]
        x = x.clone(memory_format=torch.contiguous_format)
        rotary = torch.view_as_real(this_pass.rotary).contiguous()
        mask, cache, cached_tokens, running = this_pass.mask, this_pass.cache, 0, None
        if isinstance(cache, RecurrentCache | CandidateCache):
            cached_tokens = cache.get_seq_length()
            like = x.new_empty(batch, heads, tokens, head_width)
            views = cache.views(like, slots, len(self.blocks))
            cached, own, running = _store(views[0]), _store(views[1]), views[2]
        else:
            keys, values = x.new_empty(2, 1, batch, heads, tokens, head_width)
            cached = own = _store(SlotView(keys=keys, values=values, is_one_slot=True))
        adapter = None if self.adapter is None else self.adapter.weight
        injected = None if injected is None else injected.expand_as(x).contiguous()
        steps = (_NUMBER * len(slots))(*slots)
        sizes = (
            tokens, width, heads, hidden, cached_tokens, len(self.blocks), len(slots),
            rotary.stride(0) if rotary.shape[0] > 1 else 0,
            rotary.stride(1) if rotary.shape[1] > 1 else 0,
            mask.stride(0) if mask is not None and mask.shape[0] > 1 else 0,
            0 if mask is None else mask.stride(2), tokens >= MANY, 0,
        )  # fmt: skip
        arguments = _Pass(
            (_NUMBER * 13)(*sizes), ctypes.addressof(self.addresses), ctypes.addressof(steps),
            _address(adapter), _address(injected), _address(rotary), _address(mask), _address(running),
            cached, own, None, block.norm_1.eps,
        )  # fmt: skip
        if tokens >= MANY and not self.packed:
            self._pack(width, hidden)
        return self._run(arguments, x, len(slots))

    def close(self, caches: RowCaches, rows: Sequence[int]) -> None:
        """`RowCaches.close`, in one call."""
        lines = _POINTER(caches.lines.data_ptr())
        self.compiled.fourfold_close(lines, (_NUMBER * len(rows))(*rows), _NUMBER(len(rows)))
        for row in rows:
            caches.caches[row].length += 1

    def _rows(
        self,
        x: Float[Tensor, "row 1 width"],
        this_pass: Pass,
        caches: RowCaches,
        slots: Sequence[int],
        injected: Float[Tensor, "row 1 width"] | None,
    ) -> Float[Tensor, "row 1 width"]:
        """One token of rows with caches of their own: the arguments are made once, and changed."""
        if not self.made:
            block, width = self.blocks[0], x.shape[2]
            sizes = (
                1, width, block.attn.qk_bias.shape[2], block.mlp.proj.weight.shape[1], 0,
                len(self.blocks), 0, width // block.attn.qk_bias.shape[2], 0, 0, 0, 0, caches.around,
            )  # fmt: skip
            adapter = None if self.adapter is None else self.adapter.weight
            self.made.append(
                _Pass(
                    (_NUMBER * 13)(*sizes), ctypes.addressof(self.addresses), None, _address(adapter),
                    None, None, None, None, _NOWHERE, _NOWHERE, None, block.norm_1.eps,
                )
            )  # fmt: skip
        (arguments,) = self.made
        arguments.sizes[_LONGEST], arguments.sizes[_STEPS] = caches.get_seq_length(), len(slots)
        steps = (_NUMBER * len(slots))(*slots)
        arguments.slots = ctypes.addressof(steps)
        arguments.rotary = this_pass.rotary.data_ptr()
        arguments.lines = caches.lines.data_ptr()
        arguments.injected = _address(injected)
        return self._run(arguments, x.clone(memory_format=torch.contiguous_format), len(slots))

    def _run(
        self, arguments: _Pass, x: Float[Tensor, "batch token width"], steps: int
    ) -> Float[Tensor, "batch token width"]:
        """The call, in place, on as many threads as it is worth."""
        pointer, states = ctypes.byref(arguments), _POINTER(x.data_ptr())

        def recur(first: int, last: int) -> None:
            self.compiled.fourfold_recur(pointer, states, _NUMBER(first), _NUMBER(last))

        width, hidden = arguments.sizes[1], arguments.sizes[3]
        per_token = width * (4 * width + 3 * hidden) * len(self.blocks) * steps
        if x.shape[0] * x.shape[1] * per_token < WORTH_SHARING:
            recur(0, len(x))
        else:
            native.share(len(x), recur)
        return x

    def _pack(self, width: int, hidden: int) -> None:
        for address in self.addresses:
            panels = torch.empty(width * (4 * width + 3 * hidden))
            address.panels = panels.data_ptr()
            self.compiled.fourfold_pack(
                ctypes.byref(address), _NUMBER(width), _NUMBER(hidden), _POINTER(address.panels)
            )
            self.packed.append(panels)


def _is_plain_pass(model: Any, embedded: Tensor, this_pass: Pass) -> bool:
    """True where nobody watches this pass, and its numbers are float32 of a CPU throughout."""
    is_watched = (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or _is_transformed()
        or _has_any_global_hook()
        or torch.is_autocast_enabled(embedded.device.type)
    )
    is_sdpa = model.config._attn_implementation == "sdpa" and not this_pass.options  # noqa: SLF001
    formats = (embedded.dtype, this_pass.rotary.real.dtype)
    return not is_watched and is_sdpa and embedded.is_cpu and formats == (torch.float32,) * 2


def _have_addresses(
    blocks: Sequence[nn.Module],
    adapter: nn.Module | None,
    written: Mapping[type, Callable[..., Any]],
) -> bool:
    """True where parts are as they were written, with weights in float32, row by row, on a CPU."""
    modules = [part for block in blocks for part in _parts(block)]
    modules += [] if adapter is None else [adapter]
    if not blocks or not all(_is_as_written(part, written) for part in modules):
        return False
    weights = [weight for part in modules for weight in vars(part)["_parameters"].values()]
    weights = [weight for weight in weights if weight is not None]
    for weight in weights:
        is_float = type(weight) is nn.Parameter and weight.dtype == torch.float32
        if not (is_float and weight.is_cpu and weight.is_contiguous()):
            return False
    written_blocks: Any = blocks  # their modules are those of Huginn's blocks, as was checked above
    shapes = {
        (part.mlp.proj.weight.shape, part.attn.qk_bias.shape, part.mlp.fc.weight.shape)
        for part in written_blocks
    }
    norms = {part.eps for part in modules if hasattr(part, "eps")}
    (width, hidden), bias, _ = next(iter(shapes))
    return len(shapes) == len(norms) == 1 and not any(
        size % LANES for size in (width, hidden, bias[-1])
    )


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """`modules`, without its names, and without the calls of a server, which no pass of ours makes."""
    yield module
    for name, child in vars(module)["_modules"].items():
        if name != "calls":
            yield from _parts(child)


def _is_as_written(part: nn.Module, written: Mapping[type, Callable[..., Any]]) -> bool:
    """True where a part has the forward pass that it was written with, no bias and no listeners."""
    own = vars(part)
    is_hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own
    is_same = written.get(type(part)) is getattr(type(part), "forward", None)
    return is_same and not is_hooked and own["_parameters"].get("bias") is None


def _addresses(blocks: Sequence[Any]) -> ctypes.Array[_Block]:
    addresses = (_Block * len(blocks))()
    for address, block in zip(addresses, blocks, strict=True):
        attention, mlp = block.attn, block.mlp
        gains = (block.norm_1.weight, block.norm_2.weight, block.norm_3.weight, block.norm_4.weight)
        products = (
            attention.Wqkv.weight, attention.qk_bias, attention.proj.weight, mlp.fc.weight, mlp.proj.weight,
        )  # fmt: skip
        address.gains[:] = [gain.data_ptr() for gain in gains]
        address.weights[:] = [weight.data_ptr() for weight in products]
    return addresses


def _takes(x: Tensor, this_pass: Pass) -> bool:
    """True where this call's tensors are of the form that the compiled code reads."""
    batch, tokens = x.shape[:2]
    cache, mask, rotary = this_pass.cache, this_pass.mask, this_pass.rotary
    if type(x) is not Tensor or not x.is_cpu or x.dtype != torch.float32:
        return False
    if type(cache) not in (type(None), RecurrentCache, RowCache, CandidateCache, RowCaches):
        return False
    if not getattr(cache, "in_place", True):
        return False
    if isinstance(cache, RowCaches):
        # What rows see follows from their lengths alone.
        return tokens == 1 and rotary.is_contiguous() and len(rotary) == batch
    if rotary.shape[0] not in (1, batch) or rotary.shape[1] not in (1, tokens):
        return False
    if mask is None:
        return True
    context = tokens + (0 if cache is None else cache.get_seq_length())
    return (
        isinstance(mask, Tensor)
        and mask.dtype == torch.bool
        and mask.shape[0] in (1, batch)
        and mask.shape[1:] == (1, tokens, context)
        and mask.stride(-1) == 1
    )


def _is_transformed() -> bool:
    """True under forward derivatives and vmap, which see torch's operations alone."""
    functions: Any = torch._C  # noqa: SLF001
    is_mapped = functions._functorch.peek_interpreter_stack() is not None  # noqa: SLF001
    return is_mapped or torch.autograd.forward_ad._current_level >= 0  # noqa: SLF001


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _store(view: SlotView) -> _Store:
    keys, values = view.keys, view.values
    before = view.place * keys.shape[-1] * keys.element_size()
    between_slots = 0 if view.is_one_slot else keys.stride(0)
    return _Store(
        keys.data_ptr() + before, values.data_ptr() + before,
        (_NUMBER * 4)(view.first_slot, between_slots, *keys.stride()[1:3]), _address(view.rows),
    )  # fmt: skip
