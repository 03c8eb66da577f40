"""Attention of one decoded token, timed: Loki with pages beside the library's own and packed dense attention.

Contenders take turns within a round, so that a busy machine slows all alike.
"""

import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fourfold_loki.cache import tiled
from fourfold_loki.kernels import cpu
from fourfold_loki.kernels.dispatch import twin
from fourfold_loki.kernels.page_read import PageRead

Contender = Callable[[], Tensor]


def contenders(
    heads: int,
    kv_heads: int,
    head_width: int,
    *,
    tokens: int,
    dtype: torch.dtype,
    share: float = 0.25,
    page: int = 16,
    divisor: int = 4,
) -> dict[str, Contender]:
    """Every contender on the same cache of random numbers, on this CPU.

    `sdpa` is transformers' own function without a mask; `packed sdpa` and `packed` are the same attention
    with the query heads of a group as one matrix; `loki` reads a share of the keys, by the compiled kernel
    where there is a compiler, and `loki by torch` by torch's operations.
    """
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    queries = normal(1, heads, 1, head_width)
    keys, values = normal(1, kv_heads, tokens, head_width), normal(1, kv_heads, tokens, head_width)
    leading = tiled(keys[..., : head_width // divisor])
    scaling = head_width**-0.5
    module: Any = SimpleNamespace(num_key_value_groups=heads // kv_heads, is_causal=True)
    packed = queries.view(1, kv_heads, -1, head_width)
    read = PageRead(
        length=tokens,
        pages=int(tokens * share) // page,
        page=page,
        sinks=0,
        window=0,
        scaling=scaling,
    )
    cached = (queries, keys, values, leading)
    fastest = twin(*cached)
    return {
        "sdpa": lambda: sdpa_attention_forward(module, queries, keys, values, None)[0],
        "packed sdpa": lambda: F.scaled_dot_product_attention(packed, keys, values),
        "packed": lambda: cpu.dense(queries, keys, values, length=tokens, scaling=scaling),
        "loki": lambda: fastest(*cached, read),
        "loki by torch": lambda: cpu.decode(*cached, read),
    }


@torch.no_grad()
def timed(
    run: Mapping[str, Contender], *, seconds: float, patience_s: float = 0.5
) -> dict[str, list[float]]:
    """Milliseconds by contender, round by round, at least five rounds.

    Args:
        run: the contenders.
        seconds: after which no further round begins.
        patience_s: a contender that takes longer is timed three times only.
    """
    times_ms: dict[str, list[float]] = {name: [] for name in run}
    for call in run.values():
        call()
    until_s = time.perf_counter() + seconds
    rounds = 0
    while time.perf_counter() < until_s or rounds < 5:
        rounds += 1
        for name, call in run.items():
            if len(times_ms[name]) >= 3 and min(times_ms[name]) > 1e3 * patience_s:
                continue
            started_s = time.perf_counter()
            call()
            times_ms[name].append(1e3 * (time.perf_counter() - started_s))
    return times_ms
