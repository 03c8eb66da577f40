#!/usr/bin/env bash
# torch 2.13.0: FlopCounterMode counts no FLOPs for scaled_dot_product_attention on a CPU, and says nothing. On the default
# path the operator is _scaled_dot_product_flash_attention_for_cpu, for which the counter has no formula; its formulas are
# for the kernels of GPUs. The same call restricted to the math backend is counted in full (two products of 2 T^2 d a head).
# So a transformer's step that is counted on a CPU, or on the CPU before it goes to a GPU, lacks its attention.
# Exits 1 where this behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

rows, heads, tokens, width = 2, 4, 64, 32
q, k, v = (torch.randn(rows, heads, tokens, width) for _ in range(3))


def counted(*backends):
    with FlopCounterMode(display=False) as counter, sdpa_kernel([*backends]):
        scaled_dot_product_attention(q, k, v)
    return counter.get_total_flops()


by_hand = 2 * 2 * rows * heads * tokens * tokens * width
fused, plain = counted(SDPBackend.FLASH_ATTENTION, SDPBackend.MATH), counted(SDPBackend.MATH)
print(f"torch {torch.__version__}: by hand {by_hand}, fused {fused}, math backend {plain}")
assert (fused, plain) == (0, by_hand)
PY
# Seen:
# torch 2.13.0+cpu: by hand 4194304, fused 0, math backend 4194304
