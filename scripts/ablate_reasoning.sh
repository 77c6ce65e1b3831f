#!/usr/bin/env bash
# Think before rewriting (base), or write the rewrite at once: cold start and RL both with it or both without.
# Only on the miniature: the cold start here is scripts/cold_start.sh.
# SEEDS="0 1 2" and JOBS=1 (runs at once) may be set; further options go to every run.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-.venv/bin/python}"
[ -x "$python" ] || python=python
cold="${OUTDIR:-runs/ablate}/cold_start_direct"
scripts/cold_start.sh "$cold" 0 --reasoning false
"$python" scripts/ablate.py \
  --outdir "${OUTDIR:-runs/ablate}" --table "${OUTDIR:-runs/ablate}/reasoning.md" \
  --launch "${LAUNCH:-$python scripts/demo.py --images 1}" --seeds ${SEEDS:-0 1 2} --jobs "${JOBS:-1}" \
  --variant "base:" \
  --variant "direct: --reasoning false --gpt_path $cold" \
  -- --max_steps 15 --per_device_train_batch_size 64 "$@"
