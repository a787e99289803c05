#!/usr/bin/env bash
# Everything that wants a GPU, in one call of under 10 minutes: `bash scripts/gpu_check.sh [DIRECTORY]`.
# Writes a log of each part to DIRECTORY (default: $OUT, else runs/gpu-check); the tables go into docs/BENCHMARKS.md.
# Needs pip install -e '.[cuda,test]'; a torch that sees the card is measured beside the engine where there is one.
# SMALL=1 does the same in miniature on the CPU, to see that it runs. No GPU has run it yet.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-${OUT:-runs/gpu-check}}
mkdir -p "$out"
export PYTHONPATH=. PYTHONUNBUFFERED=1 JAX_COMPILATION_CACHE_DIR=${TMPDIR:-/tmp}/grpo_jax-gpu-check
python=${PYTHON:-python3}
card=() step=()
if [ -n "${SMALL:-}" ]; then
  card=(--set vocab=61 prompts=2 samples=4 prompt_len=8 cap=16 mean=6 layers=2 width=32 heads=2 kv_heads=1
    head_dim=16 ffn=48)
  step=("${card[@]}")
  export JAX_PLATFORMS=cpu
else
  export JAX_PLATFORMS=cuda,cpu
fi
status=0

part() { # name, seconds, command
  local name=$1 limit=$2 code
  shift 2
  echo "== $name"
  timeout "$limit" "$@" 2>&1 | tee "$out/$name.log"
  code=${PIPESTATUS[0]}
  [ "$code" = 0 ] || { echo "== $name failed with $code" | tee -a "$out/$name.log"; status=1; }
}

bench() { # name, seconds, options
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$python" scripts/bench_rollout.py "$@"
}

part versions 30 bash -c "$python -c 'import jax; print(jax.__version__, jax.devices())'; nvidia-smi \
  --query-gpu=name,memory.total --format=csv || true"
XLA_PYTHON_CLIENT_MEM_FRACTION=.92 bench rollout-0.5b 90 --only 0.5b --peers --turns 2 "${card[@]}"
XLA_PYTHON_CLIENT_MEM_FRACTION=.92 bench rollout-1.5b 90 --only 1.5b --peers --turns 2 "${card[@]}"
XLA_PYTHON_CLIENT_MEM_FRACTION=.92 bench rollout-7b 110 --only 7b --peers --turns 2 "${card[@]}"
export XLA_PYTHON_CLIENT_PREALLOCATE=false # from here on several processes share the card
bench step-0.5b 90 --only step-0.5b --peers --turns 2 "${step[@]}"
part tests 110 "$python" -m pytest -m gpu tests/test_gpu.py
if "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
  bench transformers-0.5b 60 --only 0.5b --peers transformers --python "$(command -v "$python")" --turns 1 \
    --set prompts=8 cap=512 mean=142
fi
exit $status
