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

# The trainer of the image model: a fifth of its demo's steps, half its pictures.
flow="${LAUNCH:-$python scripts/demo_flow.py --processes 1 --samples 1}"
short_flow=(--max_steps 20 --prompts_per_step 8 --render_batch_size 32 --save_steps 20)
path="--loss grpo --learning_rate 1e-4" # a loss over denoising steps, which wants smaller ones

# The trainer of the Janus: a quarter of its demo's steps.
janus="${LAUNCH:-$python scripts/demo_janus.py --processes 1 --samples 1}"
short_janus=(--max_steps 30 --save_steps 30)
