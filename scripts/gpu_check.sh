#!/usr/bin/env bash
# All that needs a GPU, in one go and without a network: builds in place, runs the GPU tests, then the benchmarks.
#
#     [PYTHON=python3] [OUT=build/gpu] [GPU_CHECK="tests ops step"] [GPU_CHECK_SECONDS=540] scripts/gpu_check.sh
#
# GPU_CHECK picks parts: tests (with compute-sanitizer where it is installed), ops, step, tune (the table of choices, to $OUT/tuned.json).
# Needs torch with CUDA, Triton, nvcc, cmake, ninja, pytest, pytest-benchmark and, for the chart, matplotlib.
#
# Each command writes its log, and the benchmarks their JSON, to $OUT when it is done. One that runs out of its own time or of what is
# left of the whole is stopped, one that has too little left is skipped; what the others found stays. The last thing printed is a
# table of the commands. Exits with 0 where all passed, 1 where one failed or was stopped, 2 without a GPU or something it needs.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
PARTS=${GPU_CHECK:-tests ops step}
BUDGET=${GPU_CHECK_SECONDS:-540}
OUT=${OUT:-build/gpu}

for part in $PARTS; do
  case $part in tests | ops | step | tune) ;; *) echo "GPU_CHECK must be of tests, ops, step, tune; it is '$PARTS'" >&2 && exit 2 ;; esac
done
"$PYTHON" - <<'PY' || exit 2
import shutil
import sys
from importlib.util import find_spec

if find_spec("torch"):
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"gpu-check needs a GPU that torch can use; torch {torch.__version__} finds none")
modules = ("torch", "triton", "pytest", "pytest_benchmark")
missing = [name for name in modules if not find_spec(name)] + [name for name in ("nvcc", "cmake", "ninja") if not shutil.which(name)]
if missing:
    sys.exit(f"gpu-check needs {', '.join(missing)}")
PY

mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export OUT PYTHONPATH="$PWD"
SUMMARY=()
FAILED=0

# run NAME LEAST MOST COMMAND...: for at most MOST seconds, or not at all where fewer than LEAST are left; output in $OUT/NAME.log.
run() {
  local name=$1 least=$2 most=$3 left=$((BUDGET - SECONDS)) begin=$SECONDS status
  shift 3
  if ((left < least)); then
    SUMMARY+=("$(printf '%-20s skipped, %d s left' "$name" "$left")")
    return 1
  fi
  echo "-- $name"
  timeout --signal=INT --kill-after=10 $((left < most ? left : most)) "$@" >"$OUT/$name.log" 2>&1
  status=$?
  tail -n 12 "$OUT/$name.log"
  case $status in
    0) status=passed ;;
    124 | 137) status="stopped, out of time" FAILED=1 ;;
    *) status="FAILED with status $status" FAILED=1 ;;
  esac
  SUMMARY+=("$(printf '%-20s %s, %d s' "$name" "$status" $((SECONDS - begin)))")
  [[ $status == passed ]]
}

tests() {
  run tests-cuda 2 90 "$PYTHON" -m pytest -q tests/gpu
  run tests-triton 2 90 "$PYTHON" -m pytest -q tests/kernels
  command -v compute-sanitizer >/dev/null || return
  # Without torch's cache of memory each tensor is an allocation of its own, whose end memcheck knows.
  for tool in memcheck racecheck; do
    run "sanitizer-$tool" 20 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$PYTHON" -m pytest -q tests/gpu/test_attention.py tests/gpu/test_masking_ops.py \
      -k "not (large or graph or compiled or opcheck)"
  done
}

ops() {
  run attention 20 60 "$PYTHON" scripts/gpu_attention.py
  run ops 30 120 "$PYTHON" scripts/gpu_ops.py --seconds 70
}

step() {
  local contenders=reference-math-fp16,reference-sdpa,reference-sdpa-compiled,maefast,maefast-no-pred,maefast-compiled,maefast-graphed
  rm -f "$OUT"/step-*.json
  for model in vit_b16 vit_b16_batch8 vit_l16 vit_h14; do
    run "step-$model" 40 150 "$PYTHON" -m pytest -q benchmarks/test_step.py --benchmark-only --full --device cuda \
      --contenders "$contenders" -k "step-$model-bf16" --benchmark-json="$OUT/step-$model.json"
  done
  local found=()
  for json in "$OUT"/step-*.json; do [[ -s $json ]] && found+=("$json"); done
  # The report takes seconds, and without it the rest is hard to read: it runs also when the time is up.
  ((${#found[@]} == 0)) || BUDGET=$((SECONDS + 30)) run report 0 30 "$PYTHON" benchmarks/report.py "${found[@]}" --out "$OUT/step"
  [[ -f $OUT/step/full.md ]] && sed -n '/^## /,$p' "$OUT/step/full.md"
}

tune() {
  run tune 60 400 "$PYTHON" -m maefast.kernels.tune --output "$OUT/tuned.json"
}

if CUDAARCHS=native MAEFAST_CUDA=1 run build 1 200 "$PYTHON" setup.py build_ext --inplace; then
  for part in $PARTS; do $part; done
fi
printf '%s\n' "" "logs and results in $OUT" "${SUMMARY[@]}"
exit $FAILED
