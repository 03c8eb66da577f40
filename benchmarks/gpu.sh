#!/usr/bin/env bash
# Everything that a GPU must check, within 8 minutes: the kernels against their references, then speed.
#
#     benchmarks/gpu.sh [PYTHON]
#
# PYTHON is an interpreter with a CUDA build of torch, triton, transformers, and the packages' small
# dependencies (jaxtyping, einops, accelerate, safetensors, tokenizers, tyro, rich); the packages
# themselves are taken from this checkout. Records go beside the benchmarks.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
for package in packages/*/; do PYTHONPATH="$PWD/${package}src:${PYTHONPATH:-}"; done
export PYTHONPATH JAXTYPING_DISABLE=1

"$python" -c 'import torch; assert torch.cuda.is_available(), "this torch sees no GPU"'
timeout 240 "$python" benchmarks/loki_gpu.py
timeout 120 "$python" benchmarks/goldfish/loss_speed.py --device cuda --dtype bfloat16 \
    --tokens 16384 --vocabulary 128256 --width 2048 --out benchmarks/goldfish/loss_speed_gpu.jsonl
