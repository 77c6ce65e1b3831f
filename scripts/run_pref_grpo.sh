#!/usr/bin/env bash
# The image model itself, on one machine; start the judge first (scripts/serve_judge.sh, on GPUs of its own). Every
# variable can be overridden; further options are passed on:
#   OUTDIR=runs/nft scripts/run_pref_grpo.sh --loss nft --learning_rate 3e-4
set -euo pipefail
cd "$(dirname "$0")/.."

CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0,1,2,3,4,5,6,7}" accelerate launch \
  --config_file="${ACCELERATE_CONFIG:-deepspeed_2.yaml}" \
  pref_grpo.py \
  --config "${CONFIG:-configs/pref_grpo_flux.yaml}" \
  --data "${DATA:-data/generation_prompts_1k_filterd.txt}" \
  --outdir "${OUTDIR:-pref_grpo_flux}" \
  "$@"
