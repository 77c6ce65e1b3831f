#!/usr/bin/env bash
# All weights of the image model, or a LoRA. On the miniature.
# Options given go to every run; SEEDS, JOBS and more of the environment: scripts/ablate.sh.
source "$(dirname "$0")/ablate.sh"
launch="$flow"
ablate flow_lora \
  --variant "full:" \
  --variant "lora: --use_peft true --lora_r 16 --lora_alpha 32 --learning_rate 3e-3" \
  -- "${short_flow[@]}" "$@"
