#!/usr/bin/env bash
# All that needs a GPU, in one go and without a network: builds in place, runs the GPU tests, then the benchmarks.
#
#     [PYTHON=python3] [OUT=build/gpu] [GPU_CHECK="tests ops step"] [GPU_CHECK_SECONDS=540] [DEVICE=cuda] scripts/gpu_check.sh
#
# DEVICE=cpu rehearses it without a GPU: the same commands, with small sizes where a benchmark has them.
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
DEVICE=${DEVICE:-cuda}

case $DEVICE:$PARTS in
  cuda:*) ;;
  cpu:*tune*) echo "GPU_CHECK=tune needs a GPU; DEVICE is cpu" >&2 && exit 2 ;;
  cpu:*) ;;
  *) echo "DEVICE must be cuda or cpu; it is '$DEVICE'" >&2 && exit 2 ;;
esac
for part in $PARTS; do
  case $part in tests | ops | step | tune) ;; *) echo "GPU_CHECK must be of tests, ops, step, tune; it is '$PARTS'" >&2 && exit 2 ;; esac
done
"$PYTHON" - "$DEVICE" <<'PY' || exit 2
import shutil
import sys
from importlib.util import find_spec

if find_spec("torch"):
    import torch

    if sys.argv[1] == "cuda" and not torch.cuda.is_available():
        sys.exit(f"gpu-check needs a GPU that torch can use; torch {torch.__version__} finds none")
tools = ("nvcc", "cmake", "ninja") if sys.argv[1] == "cuda" else ("cmake", "ninja")
modules = ("torch", "triton", "pytest", "pytest_benchmark")
missing = [name for name in modules if not find_spec(name)] + [name for name in tools if not shutil.which(name)]
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
  run tests-cuda 2 120 "$PYTHON" -m pytest -q tests/gpu
  run tests-triton 2 90 "$PYTHON" -m pytest -q tests/kernels
  command -v compute-sanitizer >/dev/null || return
  # Without torch's cache of memory each tensor is an allocation of its own, whose end memcheck knows.
  for tool in memcheck racecheck; do
    run "sanitizer-$tool" 20 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$PYTHON" -m pytest -q tests/gpu/test_attention.py tests/gpu/test_masking_ops.py \
      -k "not (large or graph or compiled or opcheck)"
  done
}

# bench NAME LEAST MOST PYTEST-ARGUMENT...: benchmarks, each result checked by the error rule before it is timed.
bench() {
  local name=$1 least=$2 most=$3
  shift 3
  rm -f "$OUT/$name.json"
  run "$name" "$least" "$most" "$PYTHON" -m pytest -q --benchmark-only "${SIZE[@]}" --device "$DEVICE" --benchmark-json="$OUT/$name.json" "$@"
}

# report NAME JSON...: a table and a chart of those that exist. It takes seconds, and without it the rest is hard to read: it runs
# also when the time is up.
report() {
  local name=$1 found=() json
  shift
  for json in "$@"; do [[ -s $json ]] && found+=("$json"); done
  ((${#found[@]} == 0)) && return
  BUDGET=$((SECONDS + 30)) run "report-$name" 0 30 "$PYTHON" benchmarks/report.py "${found[@]}" --out "$OUT/$name"
  cat "$OUT/$name"/*.md | sed -n '/^## /,$p'
}

ops() {
  bench attention 30 90 benchmarks/test_blocks.py -k "attention and $DTYPES"
  bench ops 30 150 benchmarks/test_ops.py -k "$DTYPES"
  bench blocks 30 60 benchmarks/test_blocks.py -k "$DTYPES and not attention"
  report ops "$OUT"/{attention,ops,blocks}.json
}

step() {
  local contenders=reference-math-fp16,reference-sdpa,reference-sdpa-compiled,maefast,maefast-no-pred,maefast-compiled,maefast-graphed
  if [[ $DEVICE == cpu ]]; then
    bench step-tiny 40 150 benchmarks/test_step.py
  else
    for model in vit_b16 vit_b16_batch8 vit_l16 vit_h14; do
      bench "step-$model" 40 150 benchmarks/test_step.py --contenders "$contenders" -k "step-$model-bf16"
    done
  fi
  report step "$OUT"/step-*.json
}

tune() {
  run tune 60 400 "$PYTHON" -m maefast.kernels.tune --output "$OUT/tuned.json"
}

if [[ $DEVICE == cuda ]]; then
  export CUDAARCHS=native MAEFAST_CUDA=1
  SIZE=(--full) DTYPES="(bf16 or autocast)"
else
  export MAEFAST_CUDA=0
  SIZE=() DTYPES="fp32"
fi
if run build 1 200 "$PYTHON" setup.py build_ext --inplace; then
  for part in $PARTS; do $part; done
fi
printf '%s\n' "" "logs and results in $OUT" "${SUMMARY[@]}"
exit $FAILED
