# Sourced by ablate_*.sh: goes to the root of the checkout and defines `ablate NAME options of ablate.py`.
# Of the environment: SEEDS ("0 1 2"), JOBS (runs at once, 1), OUTDIR (runs/ablate), LAUNCH (what trains and measures
# one run; by default scripts/demo.py, on the miniature), PYTHON. The table is OUTDIR/NAME.md.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-.venv/bin/python}"
[ -x "$python" ] || python=python
out="${OUTDIR:-runs/ablate}"
seeds="${SEEDS:-0 1 2}"
launch="${LAUNCH:-$python scripts/demo.py --samples 1}"
short=(--max_steps 15 --per_device_train_batch_size 64)  # a fifth of the demo's steps, half its rollouts

ablate() {
  "$python" scripts/ablate.py --outdir "$out" --table "$out/$1.md" --launch "$launch" --seeds $seeds \
    --jobs "${JOBS:-1}" "${@:2}"
}
