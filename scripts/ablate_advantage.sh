#!/usr/bin/env bash
# How rewards become advantages: their weighted sum, in units of the batch's spread (base), or each reward normalised in
# its group before they are summed.
# SEEDS="0 1 2" and JOBS=1 (runs at once) may be set; further options go to every run. On GPUs: LAUNCH, as in
# scripts/ablate_rewards.sh, and steps and batch of your own at the end.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-.venv/bin/python}"
[ -x "$python" ] || python=python
"$python" scripts/ablate.py \
  --outdir "${OUTDIR:-runs/ablate}" --table "${OUTDIR:-runs/ablate}/advantage.md" \
  --launch "${LAUNCH:-$python scripts/demo.py --images 1}" --seeds ${SEEDS:-0 1 2} --jobs "${JOBS:-1}" \
  --variant "base:" \
  --variant "normalize_then_sum: --multi_objective_aggregation normalize_then_sum" \
  -- --max_steps 15 --per_device_train_batch_size 64 "$@"
