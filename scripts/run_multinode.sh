#!/usr/bin/env bash
# The documented training command on several machines: run this same script on each of them.
#
#   by hand, machine 0 of 2:   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 scripts/run_multinode.sh --num_train_epochs 3
#   by hand, machine 1 of 2:   NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 scripts/run_multinode.sh --num_train_epochs 3
#   Slurm:                     sbatch --nodes=8 --ntasks-per-node=1 --gpus-per-node=8 --wrap 'srun scripts/run_multinode.sh'
#
# Under Slurm the three variables are taken from the job. Further options go to r1_prompter.py, the same on every machine.
# --outdir must lie in a folder that all machines see. Each process keeps whole groups, whatever the number of machines;
# docs/speed.md says what that costs and when another lever is cheaper.
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ -n "${SLURM_JOB_NODELIST:-}" ]]; then
  NNODES="${NNODES:-$SLURM_NNODES}"
  NODE_RANK="${NODE_RANK:-$SLURM_NODEID}"
  MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
fi
for name in NNODES NODE_RANK MASTER_ADDR; do
  if [[ -z "${!name:-}" ]]; then
    echo "$0: $name is not set. Give NNODES (machines), NODE_RANK (this one, from 0) and MASTER_ADDR (address of machine 0)" >&2
    exit 2
  fi
done
if ! [[ "$NNODES" =~ ^[1-9][0-9]*$ && "$NODE_RANK" =~ ^[0-9]+$ ]] || ((NODE_RANK >= NNODES)); then
  echo "$0: NODE_RANK is $NODE_RANK of NNODES $NNODES: ranks run from 0 to NNODES - 1" >&2
  exit 2
fi
GPUS_PER_NODE="${GPUS_PER_NODE:-8}"

exec accelerate launch \
  --config_file "${ACCELERATE_CONFIG:-deepspeed_2.yaml}" \
  --num_machines "$NNODES" \
  --machine_rank "$NODE_RANK" \
  --num_processes "$((NNODES * GPUS_PER_NODE))" \
  --main_process_ip "$MASTER_ADDR" \
  --main_process_port "${MASTER_PORT:-29500}" \
  r1_prompter.py \
  --data "${DATA:-data/generation_prompts_1k_filterd.txt}" \
  --gpt_path "${GPT_PATH:-Qwen/Qwen2.5-3B-Instruct}" \
  --sdmodel_name "${SDMODEL_NAME:-black-forest-labs/FLUX.1-dev}" \
  --outdir "${OUTDIR:-r1_prompter_with_flux}" \
  "$@"
