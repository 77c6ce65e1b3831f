#!/usr/bin/env bash
# The whole recipe, each part left out in turn: examples -> cold start -> GRPO -> evaluation, anew for each seed. Columns
# of sft+rl: the prompt itself (raw), SFT alone (before), both (after); rl_only starts from the instruct model.
# Only on the miniature: the cold start here is scripts/cold_start.sh.
# SEEDS="0 1 2" and JOBS=1 (runs at once) may be set; further options go to every run.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-.venv/bin/python}"
[ -x "$python" ] || python=python
out="${OUTDIR:-runs/recipe}"
for seed in ${SEEDS:-0 1 2}; do
  scripts/cold_start.sh "$out/cold_start_s$seed" "$seed"
done
"$python" scripts/ablate.py \
  --outdir "$out" --table "$out/recipe.md" \
  --launch "${LAUNCH:-$python scripts/demo.py}" --seeds ${SEEDS:-0 1 2} --jobs "${JOBS:-1}" \
  --variant "sft+rl: --gpt_path $out/cold_start_s{seed}" \
  --variant "rl_only: --gpt_path miniature/weights/instruct" \
  -- "$@"
