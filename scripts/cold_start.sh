#!/usr/bin/env bash
# Cold-start the miniature's instruct model: examples by the world's own writer, then sft.py. Does nothing if it is done.
#   scripts/cold_start.sh OUTDIR SEED [further options of sft.py]
# A writer that is right a third of the time, eight examples a prompt, those dropped that lost something of the prompt.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-.venv/bin/python}"
[ -x "$python" ] || python=python
usage="usage: scripts/cold_start.sh OUTDIR SEED [options of sft.py]"
out="${1:?$usage}" seed="${2:?$usage}"
shift 2
[ ! -f "$out/report.html" ] || exit 0
mkdir -p "${out}_examples"
for draft in 0 1 2 3 4 5 6 7; do
  "$python" scripts/make_sft.py --teacher miniature --data miniature/prompts/cold_start.txt \
    --seed $((8 * seed + draft)) --out "${out}_examples/$draft.jsonl"
done
cat "${out}"_examples/[0-7].jsonl > "$out.jsonl"
"$python" sft.py --config configs/miniature_cold_start.yaml --data "$out.jsonl" --outdir "$out" --seed "$seed" \
  --resume auto "$@"
