#!/usr/bin/env bash
# Compiles the sources for aarch64 and runs tests of the ops under qemu. On Debian 12, or where its packages are found.
#
#     [PYTHON=python3] scripts/aarch64.sh [PYTEST-ARGUMENT ...]
#
# Needs aarch64-linux-gnu-g++ (g++-aarch64-linux-gnu), qemu-aarch64 (qemu-user), cmake and ninja; apt-get fetches Debian's Python
# for aarch64, pip torch's CPU build, together 0.9 GB on disk in build/aarch64. Nothing is installed into the system.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
WORK=$PWD/build/aarch64
DEBIAN=(python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libc6 libstdc++6 libgcc-s1 libgomp1 zlib1g libexpat1 libssl3
  libffi8 libbz2-1.0 liblzma5 libuuid1)
PYPI=(torch==2.10.0 filelock fsspec jinja2 markupsafe mpmath networkx numpy sympy typing-extensions
  pytest iniconfig packaging pluggy pygments)

for tool in aarch64-linux-gnu-g++ qemu-aarch64 cmake ninja apt-get dpkg; do
  command -v "$tool" > /dev/null || { echo "test-aarch64 needs $tool" >&2 && exit 2; }
done

if [[ ! -x $WORK/sysroot/usr/bin/python3.11 ]]; then
  mkdir -p "$WORK"/apt/lists/partial "$WORK"/apt/cache/archives/partial "$WORK"/debs
  apt() {
    apt-get -q -o Dir::State::Lists="$WORK/apt/lists" -o Dir::State::status=/dev/null -o Dir::Cache="$WORK/apt/cache" \
      -o APT::Architecture=arm64 -o APT::Architectures=arm64 "$@"
  }
  apt update
  (cd "$WORK/debs" && apt download "${DEBIAN[@]}")
  for package in "$WORK"/debs/*.deb; do dpkg -x "$package" "$WORK/sysroot"; done
fi
if [[ ! -d $WORK/site/pytest ]]; then
  # Without dependencies: pip judges them by the machine that it runs on.
  "$PYTHON" -m pip install -q --target "$WORK/site" --upgrade --no-deps --only-binary=:all: --python-version 3.11 \
    --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 "${PYPI[@]}"
fi

rm -rf "$WORK/tree"
mkdir -p "$WORK/tree"
tar -c --exclude='*.so' --exclude=__pycache__ maefast tests benchmarks pyproject.toml | tar -x -C "$WORK/tree"
cmake -S . -B "$WORK/native" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DTORCH_ROOT="$WORK/site/torch" -DMAEFAST_OUTPUT_DIR="$WORK/tree/maefast"
cmake --build "$WORK/native"

cd "$WORK/tree"
export PYTHONPATH=$WORK/site OMP_NUM_THREADS=1
python=(qemu-aarch64 -L "$WORK/sysroot" "$WORK/sysroot/usr/bin/python3.11")
"${python[@]}" -c 'import platform, maefast; print(platform.machine()); maefast.explain()'
if (($# == 0)); then set -- tests/ops/test_unshuffle.py; fi
"${python[@]}" -m pytest -q "$@"
