#!/usr/bin/env bash
# Train the runs of a sweep by an array of SLURM jobs, with the options of `maple sweep`:
#
#   sbatch --array=0-7 examples/slurm_sweep.sh base-to-novel --methods coop,maple --datasets eurosat,dtd --seeds 1-3
#
# All tasks are given the same command. Each takes the runs that no other one has locked, so they share the work without
# a server, and more tasks may join or leave at any time. Submit it again to resume what a time limit has interrupted.
#
# MAPLE_RUNS is the folder of the runs, which all nodes share (default: runs). Its file system must support locks.
#
#SBATCH --job-name=maple-sweep
#SBATCH --array=0-3
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-task=1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --output=maple-sweep-%A_%a.log
set -euo pipefail

if [ "$#" -eq 0 ]; then
    echo "usage: sbatch $0 WHAT [options of maple sweep]" >&2
    exit 2
fi
runs=${MAPLE_RUNS:-runs}
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
# Each task trains alone: variables of a launcher would make it wait for others.
unset WORLD_SIZE RANK LOCAL_RANK

echo "task ${SLURM_ARRAY_TASK_ID:-0} of job ${SLURM_ARRAY_JOB_ID:-none} on $(hostname): $*"
status=0
maple sweep "$@" --output "$runs" || status=$?
if [ "$status" -eq 1 ]; then
    # 1 means that runs are left: only failed ones make this task fail, since other tasks are training the others.
    plan=$(maple sweep "$@" --output "$runs" --plan --json)
    [[ $plan == *'"status": "failed"'* ]] || status=0
fi
exit "$status"
