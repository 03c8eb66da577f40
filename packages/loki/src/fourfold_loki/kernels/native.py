"""Decoding on a CPU with a C++ compiler at hand: `decode.cpp`, compiled for this processor when first needed.

torch's operations read the chosen pages twice (once to copy them together, once to multiply) and compute in
bfloat16, which few processors can; the compiled kernel reads each number once and computes in float32.
Without a compiler, or for what it does not take, `cpu.py` computes the same.
"""

import ctypes
import math

import torch
from jaxtyping import Float
from torch import Tensor

from fourfold_loki.cache import TILE
from fourfold_loki.kernels.page_read import PageRead
from fourfold_parallel.common import native

LANES = 16
"""Head widths are multiples of it."""
WORTH_SHARING = 1 << 20
"""Bytes read from which a second thread (50 microseconds to wake) pays."""


class _Call(ctypes.Structure):
    _fields_ = (
        ("queries", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("leading", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("logs", ctypes.c_void_p),
        ("sizes", ctypes.c_int64 * 11),
        ("is_bfloat16", ctypes.c_int64),
    )


def takes(queries: Tensor, keys: Tensor, values: Tensor, leading: Tensor) -> bool:
    """True where `decode` can compute with these and there is something to compile it with."""
    parts = (keys, values, leading)
    batch, kv_heads, room, head_width = keys.shape
    return (
        queries.device.type == "cpu"
        and queries.dtype in (torch.float32, torch.bfloat16)
        and all(part.dtype == queries.dtype and part.is_contiguous() for part in parts)
        # The sizes that the kernel reads are the keys': any other would be read beyond its end.
        and queries.shape == (batch, queries.shape[1], 1, head_width)
        and queries.shape[1] % kv_heads == 0
        and values.shape[:3] == keys.shape[:3]
        and leading.shape == (batch, kv_heads, room // TILE, leading.shape[3], TILE)
        and leading.shape[3] <= head_width
        and head_width % LANES == 0
        and values.shape[-1] % LANES == 0
        and room % TILE == 0
        and not torch.compiler.is_compiling()
        and library() is not None
    )


def decode(
    queries: Float[Tensor, "batch heads 1 head_width"],
    keys: Float[Tensor, "batch kv_heads room head_width"],
    values: Float[Tensor, "batch kv_heads room value_width"],
    leading: Float[Tensor, "batch kv_heads tile width place"],
    read: PageRead,
) -> Float[Tensor, "batch heads 1 value_width"]:
    """`cpu.decode` in one sweep over the cache; of pages that rank alike it reads the earliest.

    Sequences and key/value heads are shared out among `torch.get_num_threads()` threads; where they do not
    come out even, so are the pages of each, whose parts are put together by their log-sum-exp.

    Args:
        queries: in the basis of the layer.
        keys: in the basis, with room for more than `read.length` tokens; see `takes`.
        values: as cached.
        leading: the first coordinates of the keys, in tiles; see `cache`.
        read: which tokens are held, and how many pages of them to read.

    Raises:
        ValueError: for tensors that `takes` refuses, or more pages than there are.
    """
    if not takes(queries, keys, values, leading):
        raise ValueError(
            f"queries {tuple(queries.shape)} of {queries.dtype} on {queries.device} with keys "
            f"{tuple(keys.shape)}, values {tuple(values.shape)} and leading coordinates "
            f"{tuple(leading.shape)}: the compiled kernel takes tensors of one cache, contiguous float32 or "
            f"bfloat16 on a CPU, widths that are multiples of {LANES}, room of {TILE}, and needs "
            f"one of {', '.join(native.COMPILERS)} or {native.WHEEL}; use kernels.cpu"
        )
    filled = -(-read.length // read.page)
    if not (1 <= read.length <= keys.shape[2] and 1 <= read.pages <= filled):
        raise ValueError(
            f"pages={read.pages} of length={read.length} with pages of {read.page} and room for "
            f"{keys.shape[2]}; use 1 to {filled} pages, and a length that fits the room"
        )
    compiled = library()
    assert compiled is not None
    batch, heads, _, head_width = queries.shape
    kv_heads, room = keys.shape[1:3]
    stacks, value_width = batch * kv_heads, values.shape[-1]
    group = heads // kv_heads
    width, tokens = leading.shape[3], read.pages * read.page
    bytes_read = keys.itemsize * (width * read.length + (head_width + value_width) * tokens)
    threads = torch.get_num_threads() if stacks * bytes_read >= WORTH_SHARING else 1
    parts = min(threads // math.gcd(stacks, threads), read.pages) if stacks else 1
    wide = (queries.float() * read.scaling).contiguous()
    output = torch.empty(batch, heads, 1, value_width)
    parted = output if parts == 1 else torch.empty(stacks, parts, group, value_width)
    logs = torch.empty(stacks, parts, group)
    call = _Call(
        wide.data_ptr(), keys.data_ptr(), values.data_ptr(), leading.data_ptr(), parted.data_ptr(),
        logs.data_ptr(),
        (ctypes.c_int64 * 11)(
            group, head_width, value_width, width, room,
            read.length, read.pages, read.page, read.sinks, read.window, parts,
        ),
        keys.dtype == torch.bfloat16,
    )  # fmt: skip
    native.share_call(compiled, "fourfold_loki_decode", call, stacks * parts, threads=threads)
    if parts > 1:
        compiled.fourfold_loki_merge(
            ctypes.byref(call), ctypes.c_void_p(output.data_ptr()), ctypes.c_int64(stacks)
        )
    return output.to(queries.dtype)


def library() -> ctypes.CDLL | None:
    """The compiled kernel, or None where nothing here can compile it."""
    return native.load("fourfold_loki.kernels", "decode.cpp")
