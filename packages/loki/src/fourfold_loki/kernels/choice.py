"""The forms of decoding that a machine is fastest with, found by timing them for a moment.

Selecting keys reads a quarter of the bytes, but a processor may be faster with all of them: in short caches,
where its dense attention has instructions that the kernel has not, without a compiler. With
`Budget(dense_below=WhereItPays())` the forms are timed once for a shape of heads, when a session begins, and
the whole cache is read wherever that was not slower.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fourfold_loki.attention_mode import NEVER, Forms
from fourfold_loki.cache import TILE
from fourfold_loki.kernels import cpu, native
from fourfold_loki.kernels.page_read import PageRead
from fourfold_parallel.common.native import instruction_set

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
ROUNDS = 5
MARGIN = 0.95
"""A selection pays where it takes at most this share of the dense time, beyond what two timings differ by."""
LARGEST_BYTES = 1 << 29
"""Of a cache that is made to be timed."""


Form = Callable[[], Tensor]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """The heads that a timing is for, and what is read of them."""

    heads: int
    kv_heads: int
    head_width: int
    width: int
    """Coordinates that rank."""
    page: int
    share: float
    """Of the keys that are read."""
    dtype: torch.dtype
    device: torch.device
    threads: int


def forms_for(heads: Heads, *, clock: Callable[[], float] = time.perf_counter) -> Forms:
    """The fastest forms for these heads: timed once a process, some tenths of a second, and logged.

    Args:
        heads: their shape, what is read of them, and where.
        clock: gives seconds.
    """
    return _found(heads, clock)


@cache
def _found(heads: Heads, clock: Callable[[], float]) -> Forms:
    dense = sparse = ""
    pays_from = NEVER
    for length in LENGTHS:
        each = 2 * heads.kv_heads * heads.head_width * heads.dtype.itemsize
        if length * heads.share < heads.page or length * each > LARGEST_BYTES:
            continue
        ways = _ways(heads, length)
        times = dict.fromkeys(ways, math.inf)
        for _ in range(ROUNDS):
            for name, way in ways.items():
                started_s = clock()
                way()
                if heads.device.type == "cuda":
                    torch.cuda.synchronize()
                # The first round warms up, and is not the fastest.
                times[name] = min(times[name], clock() - started_s)
        dense = min(cpu.DENSE, key=times.__getitem__)
        sparse = min(set(times) - set(cpu.DENSE), key=times.__getitem__)
        if times[sparse] <= MARGIN * times[dense]:
            pays_from = length
            break
    forms = Forms(
        dense=dense or next(iter(cpu.DENSE)),
        sparse=sparse or "torch",
        pays_from=pays_from,
        instructions=instruction_set(),
    )
    log.info(
        "%d query heads, %d key/value heads of width %d, %s, %d threads: %s",
        heads.heads, heads.kv_heads, heads.head_width, heads.dtype, heads.threads, forms,
    )  # fmt: skip
    return forms


@torch.no_grad()
def _ways(heads: Heads, length: int) -> dict[str, Form]:
    """Every form on one cache; what numbers it holds makes no difference."""

    def made(*shape: int) -> Tensor:
        return torch.full(shape, 0.01, dtype=heads.dtype, device=heads.device)

    queries = made(1, heads.heads, 1, heads.head_width)
    keys, values = made(2, 1, heads.kv_heads, length, heads.head_width)
    leading = made(1, heads.kv_heads, length // TILE, heads.width, TILE)
    scaling = heads.head_width**-0.5
    read = PageRead(
        length=length,
        pages=int(length * heads.share) // heads.page,
        page=heads.page,
        sinks=0,
        window=0,
        scaling=scaling,
    )
    cached = (queries, keys, values, leading)
    ways: dict[str, Form] = {
        name: lambda form=form: form(queries, keys, values, length=length, scaling=scaling)
        for name, form in cpu.DENSE.items()
    }
    ways |= {
        name: lambda form=form: form(*cached, read) for name, form in sparse_forms(*cached).items()
    }
    return ways


def sparse_forms(
    queries: Tensor, keys: Tensor, values: Tensor, leading: Tensor
) -> dict[str, Callable[..., Tensor]]:
    """The twins that take these tensors, the one that is mostly fastest first."""
    if queries.device.type == "cuda":
        # Triton is an extra, and its import needs a GPU's driver or the interpreter.
        from fourfold_loki.kernels import triton

        return {"triton": triton.decode}
    compiled = {"compiled": native.decode} if native.takes(queries, keys, values, leading) else {}
    return {**compiled, "torch": cpu.decode}
