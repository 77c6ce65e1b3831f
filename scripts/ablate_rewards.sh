#!/usr/bin/env bash
# Which rewards, alone and in the published combinations (T2I-R1's table: H HPS, D GroundingDINO, V GIT-VQA, O ORM).
# By default on the miniature, where the oracle has the last word; on eight GPUs the same with
#   LAUNCH="accelerate launch --config_file=deepspeed_2.yaml r1_prompter.py \
#     --data data/generation_prompts_1k_filterd.txt" \
#   HELD_OUT=pickscore OUTDIR=runs/ablate_rewards_flux scripts/ablate_rewards.sh
# Options given go to every run, as --max_steps 30; SEEDS (0 here), JOBS and more of the environment: scripts/ablate.sh.
source "$(dirname "$0")/ablate.sh"
out="${OUTDIR:-runs/ablate_rewards}" launch="${LAUNCH:-$python scripts/demo.py}" seeds="${SEEDS:-0}"
ablate rewards \
  --variant "H: --rewards hps format --reward_weights 1 0.3" \
  --variant "D: --rewards gdino format --reward_weights 1 0.3" \
  --variant "V: --rewards git format --reward_weights 1 0.3" \
  --variant "O: --rewards orm format --reward_weights 1 0.3" \
  --variant "H+D: --rewards hps gdino format --reward_weights 1 1 0.3" \
  --variant "H+D+V: --rewards hps gdino git format --reward_weights 1 1 1 0.3" \
  --variant "H+D+V+O: --rewards hps gdino git orm format --reward_weights 1 1 1 1 0.3" \
  -- --held_out ${HELD_OUT:-pickscore} "$@"
