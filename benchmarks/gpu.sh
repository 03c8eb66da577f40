#!/usr/bin/env bash
# Everything that a GPU must check, within 8 minutes: the kernels against their references, then speed and memory.
#
#     benchmarks/gpu.sh [--python PYTHON] [PART...]
#
# Without parts, those whose record is not there yet: a run that was cut goes on where it ended. A part that is
# named runs again. Parts, with the seconds that each may take:
#
#     kernels    60   goldfish's and loki's kernels against their references
#     loki      130   decoding against flash attention and the bandwidth bound
#     goldfish   80   head and loss against Liger's fused linear cross-entropy
#     recurrent  60   generation against the published algorithm
#     training  150   a 1B-class step of the grid against plain torch, MFU, and the planner's memory
#     outofcore 480   a 3B-class Llama on long sequences under budgets of memory; by name only, since it takes all
#                     of the 8 minutes
#
# PYTHON is an interpreter with a CUDA build of torch, triton, transformers, and the packages' small
# dependencies (jaxtyping, einops, accelerate, safetensors, tokenizers, tyro, rich; liger-kernel for goldfish);
# the packages themselves are taken from this checkout. Records go to benchmarks/gpu/.
set -euo pipefail
cd "$(dirname "$0")/.."
python=python
if [ "${1-}" = --python ]; then
    python=$2
    shift 2
fi
for package in packages/*/; do PYTHONPATH="$PWD/${package}src:${PYTHONPATH:-}"; done
export PYTHONPATH JAXTYPING_DISABLE=1
records=benchmarks/gpu
mkdir -p "$records"

part() {
    local name=$1 seconds=$2
    shift 2
    case " $asked " in
    *" $name "*) ;;
    "  ") if [ -s "$records/$name.jsonl" ]; then echo "$name: recorded in $records/$name.jsonl" && return; fi ;;
    *) return ;;
    esac
    echo "$name"
    # A record is whole or absent.
    if timeout "$seconds" "$python" "$@"; then
        mv "$records/$name.part" "$records/$name.jsonl"
    else
        rm -f "$records/$name.part"
        failed="$failed $name"
    fi
}

asked="$*" failed=""
"$python" -c 'import torch; assert torch.cuda.is_available(), "this torch sees no GPU"'
part kernels 60 benchmarks/gpu_kernels.py "$records/kernels.part"
part loki 130 benchmarks/loki_gpu.py "$records/loki.part"
part goldfish 80 benchmarks/goldfish/loss_speed.py --device cuda --dtype bfloat16 --tokens 16384 \
    --vocabulary 128256 --width 2048 --out "$records/goldfish.part"
part recurrent 60 benchmarks/gpu_recurrent.py "$records/recurrent.part"
part training 150 benchmarks/gpu_training.py "$records/training.part" --compile
case " $asked " in
*" outofcore "*) part outofcore 480 benchmarks/gpu_outofcore.py "$records/outofcore.part" ;;
esac
if [ -n "$failed" ]; then
    echo "failed:$failed" >&2
    exit 1
fi
