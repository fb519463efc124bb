#!/usr/bin/env bash
# M-VAR d30 as published. Set the variables for several machines; further flags (--data_path, --vae, --ac) go behind.
set -euo pipefail
cd "$(dirname "$0")/.."
torchrun --nproc_per_node="${GPUS:?set GPUS to the number of GPUs of this machine}" --nnodes="${NODES:-1}" \
  --node_rank="${NODE_RANK:-0}" --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${MASTER_PORT:-29500}" \
  train.py --depth=30 --bs=1024 --ep=350 --tblr=8e-5 --fp16=1 --alng=1e-5 --wpe=0.01 --twde=0.08 "$@"
