"""One Triton kernel: a chunk's logits become its losses, and in place the gradient of their sum.

Read twice and written once, where the torch operations pass over the chunk five times. Needs `triton`, the
extra of that name; TRITON_INTERPRET=1 runs it on a CPU, which is how it is tested.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK = 4096
"""Logits of a row held at a time: 16 KB of registers in float32."""


@triton.jit
def _softmax_slope(
    logits_pointer,  # Triton gives the types
    targets_pointer,
    nats_pointer,
    stride,
    vocabulary,
    block: tl.constexpr,
) -> None:
    """One row: log-sum-exp in one pass with a running maximum, then softmax minus one-hot in place."""
    row = tl.program_id(0).to(tl.int64)
    logits_pointer += row * stride
    target = tl.load(targets_pointer + row)
    true_logit = tl.load(logits_pointer + target)
    largest = float("-inf")
    partition = 0.0
    for first in range(0, vocabulary, block):
        ids = first + tl.arange(0, block)
        part = tl.load(logits_pointer + ids, mask=ids < vocabulary, other=float("-inf"))
        larger = tl.maximum(largest, tl.max(part))
        partition = partition * tl.exp(largest - larger) + tl.sum(tl.exp(part - larger))
        largest = larger
    for first in range(0, vocabulary, block):
        ids = first + tl.arange(0, block)
        inside = ids < vocabulary
        part = tl.load(logits_pointer + ids, mask=inside, other=float("-inf"))
        slope = tl.exp(part - largest) / partition - tl.where(ids == target, 1.0, 0.0)
        tl.store(logits_pointer + ids, slope, mask=inside)
    tl.store(nats_pointer + row, tl.log(partition) + largest - true_logit)


def losses_and_slopes(
    logits: Float[Tensor, "row vocabulary"], targets: Int[Tensor, " row"]
) -> Float[Tensor, " row"]:
    """Losses in nats; `logits` are overwritten with the gradient of their sum."""
    rows, vocabulary = logits.shape
    nats = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        block = min(_BLOCK, triton.next_power_of_2(vocabulary))
        _softmax_slope[(rows,)](
            logits,
            targets,
            nats,
            logits.stride(0),
            vocabulary,
            block=block,
            enable_fp_fusion=True,  # pyright: ignore[reportCallIssue] - an option of Triton's launch
        )
    return nats
