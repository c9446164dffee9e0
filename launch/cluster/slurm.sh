#!/usr/bin/env bash
# Two nodes of eight GPUs under Slurm; starts, stops in time, and goes on after a requeue.
#
#   sbatch launch/cluster/slurm.sh --preset 8b
#
#SBATCH --job-name=lw_fast
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=08:00:00
#SBATCH --requeue
# SIGTERM two minutes before the end: the run saves where it is and stops.
#SBATCH --signal=TERM@120
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

run_dir="${RUN_DIR:-runs/slurm-$SLURM_JOB_ID}"
export NODES="$SLURM_NNODES" GPUS="${SLURM_GPUS_ON_NODE:-8}" RUN_ID="$SLURM_JOB_ID"
HEAD="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export HEAD

# A checkpoint is a folder with a manifest. Without one there is nothing to go on from.
if compgen -G "$run_dir/*/manifest.json" > /dev/null; then
    srun launch/cluster/torchrun.sh --run_dir "$run_dir" --resume "$@"
else
    srun launch/cluster/torchrun.sh --run_dir "$run_dir" --overwrite "$@"
fi
