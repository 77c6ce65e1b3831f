#!/usr/bin/env bash
# How pictures are spent: one (base), two or four of each rewrite at equal rendering cost, so of half and a quarter of
# the prompts; and each member of a group drawn from noise of its own. On the miniature.
# SEEDS="0 1 2" and JOBS=1 (runs at once) may be set; further options go to every run.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-.venv/bin/python}"
[ -x "$python" ] || python=python
"$python" scripts/ablate.py \
  --outdir "${OUTDIR:-runs/ablate}" --table "${OUTDIR:-runs/ablate}/pictures.md" \
  --launch "${LAUNCH:-$python scripts/demo.py --images 1}" --seeds ${SEEDS:-0 1 2} --jobs "${JOBS:-1}" \
  --variant "base:" \
  --variant "images_2: --images_per_rewrite 2 --per_device_train_batch_size 32" \
  --variant "images_4: --images_per_rewrite 4 --per_device_train_batch_size 16" \
  --variant "own_noise: --common_seeds false" \
  -- --max_steps 15 --per_device_train_batch_size 64 "$@"
