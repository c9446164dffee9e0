#!/usr/bin/env bash
# The same command on every node; they find each other at HEAD (the name of any one of them).
#
#   HEAD=node1 NODES=2 GPUS=8 launch/cluster/torchrun.sh --preset 8b --run_dir runs/8b
#
# RUN_DIR must lie on storage that all nodes see. With --ds_config FILE it is DeepSpeed's ZeRO.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec torchrun --nnodes "${NODES:?how many nodes}" --nproc_per_node "${GPUS:-gpu}" \
    --rdzv_backend c10d --rdzv_endpoint "${HEAD:?name of one node}:${PORT:-29400}" \
    --rdzv_id "${RUN_ID:-lw_fast}" launch/train.py "$@"
