#!/usr/bin/env bash
# KL from the cold start: none (base), 0.01, 0.04 (TRL's former default).
# SEEDS="0 1 2" and JOBS=1 (runs at once) may be set; further options go to every run. On GPUs: LAUNCH, as in
# scripts/ablate_rewards.sh, and steps and batch of your own at the end.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-.venv/bin/python}"
[ -x "$python" ] || python=python
"$python" scripts/ablate.py \
  --outdir "${OUTDIR:-runs/ablate}" --table "${OUTDIR:-runs/ablate}/kl.md" \
  --launch "${LAUNCH:-$python scripts/demo.py --images 1}" --seeds ${SEEDS:-0 1 2} --jobs "${JOBS:-1}" \
  --variant "base:" \
  --variant "kl_0.01: --beta 0.01" \
  --variant "kl_0.04: --beta 0.04" \
  -- --max_steps 15 --per_device_train_batch_size 64 "$@"
