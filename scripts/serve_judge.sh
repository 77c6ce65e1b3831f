#!/usr/bin/env bash
# The VLM judge of the rewards `judge` and `preference`: UnifiedReward-Think (8 billion parameters, about 18 GB in
# bfloat16, fetched at the first start; its licence is on its model card) behind vLLM's OpenAI-compatible API.
#
#   scripts/serve_judge.sh                                    # http://127.0.0.1:8080/v1, as the rewards expect
#   CUDA_VISIBLE_DEVICES=6,7 TENSOR_PARALLEL=2 scripts/serve_judge.sh
#   VLLM=~/vllm/bin/vllm GPU_MEMORY=0.5 scripts/serve_judge.sh --max-num-seqs 64
#
# vLLM pins its own torch: give it an environment of its own and name its program in VLLM. Off this machine the server
# needs a key, and even then only its /v1 asks for it: put it behind a firewall or a proxy that lets /v1 through alone.
set -euo pipefail

VLLM="${VLLM:-vllm}"
HOST="${HOST:-127.0.0.1}"
PORT="${PORT:-8080}"

if ! command -v "$VLLM" >/dev/null; then
  cat >&2 <<MESSAGE
$VLLM is not installed. Give vLLM (>= 0.11) an environment of its own and name it:
  python3 -m venv ~/vllm && ~/vllm/bin/pip install 'vllm>=0.11'
  VLLM=~/vllm/bin/vllm $0
MESSAGE
  exit 1
fi

case "$HOST" in
  127.* | localhost | ::1) ;;
  *)
    if [[ -z "${VLLM_API_KEY:-}" ]]; then
      echo "HOST=$HOST can be reached from other machines: set VLLM_API_KEY, or leave HOST at 127.0.0.1" >&2
      exit 1
    fi
    ;;
esac

exec "$VLLM" serve "${MODEL:-CodeGoat24/UnifiedReward-Think-qwen3vl-8b}" \
  --host "$HOST" \
  --port "$PORT" \
  --served-model-name "${NAME:-UnifiedReward}" \
  --tensor-parallel-size "${TENSOR_PARALLEL:-1}" \
  --gpu-memory-utilization "${GPU_MEMORY:-0.9}" \
  --max-model-len "${MAX_MODEL_LEN:-16384}" \
  --limit-mm-per-prompt '{"image": 2, "video": 0}' \
  --enable-prefix-caching \
  "$@"
