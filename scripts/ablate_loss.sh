#!/usr/bin/env bash
# The loss: DAPO (base), Dr. GRPO, and GSPO's sequence-level ratio with the loss that goes with it. With one optimiser
# step a generation all ratios are 1, and what differs is how tokens and sequences are weighed.
# SEEDS="0 1 2" and JOBS=1 (runs at once) may be set; further options go to every run. On GPUs: LAUNCH, as in
# scripts/ablate_rewards.sh, and steps and batch of your own at the end.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-.venv/bin/python}"
[ -x "$python" ] || python=python
"$python" scripts/ablate.py \
  --outdir "${OUTDIR:-runs/ablate}" --table "${OUTDIR:-runs/ablate}/loss.md" \
  --launch "${LAUNCH:-$python scripts/demo.py --images 1}" --seeds ${SEEDS:-0 1 2} --jobs "${JOBS:-1}" \
  --variant "base:" \
  --variant "dr_grpo: --loss_type dr_grpo" \
  --variant "sequence: --loss_type grpo --importance_sampling_level sequence" \
  -- --max_steps 15 --per_device_train_batch_size 64 "$@"
