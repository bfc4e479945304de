#!/usr/bin/env bash
#SBATCH --job-name=convnext-seeds
#SBATCH --array=0-2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --output=convnext-%A_%a.log
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
#
# NAME
#     array.sh - one recipe under several seeds, a run each
#
# SYNOPSIS
#     RECIPE=in1k_tiny DATA=/data/imagenet sbatch slurm/array.sh
#     RECIPE=in1k_tiny DATA=/data/imagenet sbatch --array=0-9%2 slurm/array.sh
#
#     The numbers of the array are the seeds; %2 lets two of them run at a time. The runs are
#     NAME-seed0, NAME-seed1, ...; `convnext runs compare` shows them side by side.
#
# Variables, logs, signals and exit codes are those of multinode.sh, which each task runs and which
# is looked for beside this file. A task is requeued alone.

set -euo pipefail

if [[ -z ${SLURM_ARRAY_TASK_ID:-} || -z ${RECIPE:-} ]]; then
    echo "error: this is a job array, and RECIPE says what it trains" >&2
    echo >&2
    echo "hint: RECIPE=in1k_tiny DATA=/data/imagenet sbatch $0" >&2
    exit 2
fi
# sbatch runs a copy of this file; the job knows where the original lies.
here=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p' | head -n 1)
stem=${RECIPE##*/}
export NAME=${NAME:-${stem%.*}}-seed$SLURM_ARRAY_TASK_ID
export EXTRA="${EXTRA:-} seed=$SLURM_ARRAY_TASK_ID"
# shellcheck source=slurm/multinode.sh
source "$(dirname "$here")/multinode.sh"
