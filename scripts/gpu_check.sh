#!/usr/bin/env bash
# Everything that wants a GPU, in one call of under 10 minutes: `bash scripts/gpu_check.sh OUTPUT_DIR`.
# Prints what goes into docs/BENCHMARKS.md. Needs pip install -e '.[cuda,test]'. Not run anywhere yet.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu-check}
mkdir -p "$out"
export JAX_PLATFORMS=cuda,cpu PYTHONPATH=. PYTHONUNBUFFERED=1
status=0

part() { # name, seconds, command
  echo "== $1"
  timeout "$2" bash -c "$3" 2>&1 | tee "$out/$1.log"
  local code=${PIPESTATUS[0]}
  [ "$code" = 0 ] || { echo "== $1 failed with $code"; status=1; }
}

part versions 60 "python3 -c 'import jax; print(jax.__version__, jax.devices())'; nvidia-smi --query-gpu=name,memory.total --format=csv"
part tests 150 "python3 -m pytest -m gpu tests/test_gpu.py"
part quickstart 120 "python3 scripts/train.py --steps 40 --output_dir $out/quickstart --compilation_cache none && cat $out/quickstart/summary.json"
part algo 90 "python3 scripts/bench_algo.py head"
part rollout 120 "python3 scripts/bench_rollout.py --quick"
exit $status
