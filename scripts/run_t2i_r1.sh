#!/usr/bin/env bash
# A Janus-Pro that plans and draws, on one machine. Every variable can be overridden; further options are passed on:
#   OUTDIR=runs/plans scripts/run_t2i_r1.sh --levels plan
set -euo pipefail
cd "$(dirname "$0")/.."

CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0,1,2,3,4,5,6,7}" accelerate launch \
  --config_file="${ACCELERATE_CONFIG:-deepspeed_2.yaml}" \
  t2i_r1.py \
  --config "${CONFIG:-configs/t2i_r1.yaml}" \
  --data "${DATA:-data/generation_prompts_1k_filterd.txt}" \
  --outdir "${OUTDIR:-t2i_r1_janus}" \
  "$@"
