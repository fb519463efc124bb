#!/usr/bin/env bash
# M-VAR d16 as published. Set the variables for several machines; further flags (--data_path, --vae, --ac) go behind.
set -euo pipefail
cd "$(dirname "$0")/.."
torchrun --nproc_per_node="${GPUS:?set GPUS to the number of GPUs of this machine}" --nnodes="${NODES:-1}" \
  --node_rank="${NODE_RANK:-0}" --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${MASTER_PORT:-29500}" \
  train.py --depth=16 --bs=768 --ep=200 --fp16=1 --alng=1e-3 --wpe=0.1 "$@"
