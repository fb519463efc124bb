#!/usr/bin/env bash
# M-VAR d12 as published. Set GPUS; on several machines NODES, HEAD and JOB too (see docs/training.md). Further flags go behind.
set -euo pipefail
cd "$(dirname "$0")/.."
# seconds that a signal to stop leaves for the last step and its checkpoint
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
torchrun --nnodes="${NODES:-1}" --nproc_per_node="${GPUS:?set GPUS to the number of GPUs of this machine}" \
  --rdzv_backend=c10d --rdzv_endpoint="${HEAD:-localhost}:${PORT:-29500}" --rdzv_id="${JOB:-mvar}" --max-restarts=3 \
  train.py --depth=12 --bs=768 --ep=200 --fp16=1 --alng=1e-3 --wpe=0.1 "$@"
