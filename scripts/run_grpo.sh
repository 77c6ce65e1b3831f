#!/usr/bin/env bash
# The documented training command. Every variable can be overridden; further options are passed on:
#   OUTDIR=runs/lora scripts/run_grpo.sh --use_peft true --learning_rate 2e-5
set -euo pipefail
cd "$(dirname "$0")/.."

CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0,1,2,3,4,5,6,7}" accelerate launch \
  --config_file="${ACCELERATE_CONFIG:-deepspeed_2.yaml}" \
  r1_prompter.py \
  --data "${DATA:-data/generation_prompts_1k_filterd.txt}" \
  --gpt_path "${GPT_PATH:-Qwen/Qwen2.5-3B-Instruct}" \
  --sdmodel_name "${SDMODEL_NAME:-black-forest-labs/FLUX.1-dev}" \
  --outdir "${OUTDIR:-r1_prompter_with_flux}" \
  "$@"
