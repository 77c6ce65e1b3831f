#!/usr/bin/env bash
# The whole recipe, each part left out in turn: examples -> cold start -> GRPO -> evaluation, anew for each seed. Columns
# of sft+rl: the prompt itself (raw), SFT alone (before), both (after); rl_only starts from the instruct model.
# On the miniature: the cold start here is scripts/cold_start.sh.
# Options given go to every run; SEEDS, JOBS and more of the environment: scripts/ablate.sh.
source "$(dirname "$0")/ablate.sh"
out="${OUTDIR:-runs/recipe}" launch="${LAUNCH:-$python scripts/demo.py}"
for seed in $seeds; do
  scripts/cold_start.sh "$out/cold_start_s$seed" "$seed"
done
ablate recipe \
  --variant "sft+rl: --gpt_path $out/cold_start_s{seed}" \
  --variant "rl_only: --gpt_path miniature/weights/instruct" \
  -- "$@"
