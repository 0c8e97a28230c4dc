#!/usr/bin/env bash
# Purpose: a fine-tuning on a Slurm cluster that survives time limits and pre-emption: it saves, is queued again, goes on.
# Cost:    two minutes' notice before the limit; what it saves in them is the last step, so none is computed twice.
# Expect:  one job number from beginning to end; outputs/slurm/status.json says `done`, the log tells of each stop.
#
#   sbatch recipes/slurm.sh --config configs/quickstart.yaml --output_dir outputs/slurm
#
#SBATCH --job-name=llmrecipes
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120
#SBATCH --time=04:00:00
#SBATCH --gpus=1
set -euo pipefail

# srun passes Slurm's signals on to the run, which finishes its step, saves a checkpoint and leaves with 143. The shell
# itself does nothing at them but wait.
trap : USR1 TERM
srun "${PYTHON:-python3}" -m llmrecipes.finetuning --resume auto --save_steps 500 "$@" &
run=$!
code=0
wait "$run" || code=$?
while kill -0 "$run" 2>/dev/null; do
  code=0
  wait "$run" || code=$?
done

if [[ $code == 143 ]]; then
  echo "stopped and saved; queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
