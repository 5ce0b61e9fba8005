#!/bin/bash
# The same command on every node of a SLURM job:
#
#     sbatch --nodes=4 experiments/launch/slurm.sh --config=configs/masked_lm.py:base \
#         --workdir=/shared/runs/mlm --config.mesh.fsdp=8
#
# from the folder of this repository, which all nodes see, as they see --workdir and data.cache.
#SBATCH --job-name=pretraining
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
# SIGTERM to the processes 5 minutes before the time is up: they save and end with 143.
#SBATCH --signal=TERM@300
set -uo pipefail

# One process drives all GPUs of its node. Left to itself, JAX takes the GPU that has the number of
# the task on its node: with one task that is the first one, and the others would idle.
if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
    export JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
fi

# The processes themselves tell which of them is gone; SLURM is not to kill them before they do.
srun --kill-on-bad-exit=0 .venv/bin/python -m pretraining.train "$@" --distributed
status=$?

# 143: told to stop, and saved. 75: another process was lost. Both go on where they stopped.
case $status in
75 | 143)
    state=$(squeue --noheader --job "$SLURM_JOB_ID" --format=%T)
    if [ "$state" = RUNNING ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ]; then # not after scancel
        scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
exit $status
