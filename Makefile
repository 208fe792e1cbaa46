# Every target sets up what it needs: .venv with the pinned development environment, the package in place, the native build.
#
#   make demo    pre-train a small MAE on real images and show what it learned     STEPS=... to change the number of steps
#   make test    the test suite
#   make test-torch TORCH=torch==2.11.0   the test suite beside another torch, in an environment of its own under build/
#   make test-abi         a wheel built beside the oldest torch, tested beside every other
#   make wheels           the source distribution and the wheels, in dist/
#   make test-wheels      the wheel beside torch with every Python from 3.10 to 3.13 that is found, without a compiler
#   make test-aarch64     the sources cross-compiled, and tests of ops under qemu; needs what docs/install.md lists
#   make bench   the full benchmarks: JSON, table and chart under benchmarks/results/<machine>/
#   make lint    ruff, clang-format, mypy
#   make test-aot         every GPU kernel compiled ahead of time, five minutes: no spills; writes docs/kernels.csv, needs nvcc
#   make gpu-check        on a machine with a GPU: builds, tests, benchmarks, at most nine minutes, no network (scripts/gpu_check.sh)
#   make test-sanitize    the tests of the ops on a build with AddressSanitizer and UndefinedBehaviorSanitizer
#   make fuzz             2,000 mutated images, containers and checkpoints from a seed, two minutes; COUNT=... SEED=...
#   make kills            200 times `kill -9` at random moments of a resumed pre-training: none lost, no other loss
#   make test-pillow      the tests of what is read, on the oldest Pillow that pyproject.toml takes
#
# PYTHON=... chooses the interpreter; one that already has torch lends it, and torch is then not downloaded.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0  # where torch does not bring its own
TESTS ?=
SANITIZED := build/sanitize/site
SANITIZED_TESTS ?= tests/ops tests/test_bad_input*.py tests/test_library.py
VENV := .venv
BIN := $(VENV)/bin

SOURCES := $(shell find csrc -name "*.cpp" -o -name "*.h" -o -name "*.cu" -o -name "*.cuh") CMakeLists.txt setup.py pyproject.toml maefast/schemas.inc maefast/attention_tiles.inc maefast/_version.py

.PHONY: demo test test-torch test-abi wheels test-wheels test-aarch64 test-aot test-pillow test-sanitize fuzz kills gpu-check bench lint clean
.DELETE_ON_ERROR:

# An interpreter with torch lends its site-packages through a .pth file: that works from inside a virtual environment too. Naming
# that torch keeps pip from replacing it where a requirement of it is not met.
$(VENV)/.environment: requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@lent=$$($(PYTHON) -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' 2>/dev/null); \
	if [ -n "$$lent" ]; then \
	  echo "$$lent" > $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lent-torch.pth; \
	else \
	  $(BIN)/python -m pip install $(TORCH); \
	fi
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install $(TRITON)
	$(BIN)/python -m pip install -r requirements-dev.txt "torch==$$($(BIN)/python -c 'from importlib.metadata import version; print(version("torch"))')"
	touch $@

$(VENV)/.build: $(VENV)/.environment $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --no-build-isolation --no-deps -e .
	touch $@

demo: $(VENV)/.build
	$(BIN)/maefast demo $(if $(STEPS),--steps $(STEPS))

# Two processes, each of one thread unless a test asks for more.
test: $(VENV)/.build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(TESTS)

# A copy of the sources, with an environment and a build of its own. WHEEL=... takes the package of that wheel instead of building.
TREE = build/$(subst ==,-,$(TORCH))
test-torch:
	mkdir -p $(TREE)
	find $(TREE) -mindepth 1 -maxdepth 1 ! -name .venv ! -name build ! -name dist -exec rm -r {} +
	tar -c --exclude=./.git --exclude=./.venv --exclude=./build --exclude='*.so' . | tar -x -C $(TREE)
	rm -f $(TREE)/.venv/.build
	$(MAKE) -C $(TREE) .venv/.environment
	$(if $(WHEEL),cd $(TREE) && $(BIN)/python -m pip install --no-deps --force-reinstall $(abspath $(WHEEL)) && rm -r maefast && \
	  ln -s $$(cd / && $(abspath $(TREE))/$(BIN)/python -c 'import maefast; print(*maefast.__path__)') maefast && touch .venv/.build)
	MAEFAST_CUDA=$${MAEFAST_CUDA:-0} $(MAKE) -C $(TREE) test

OLDEST := 2.10.0
TORCHES ?= 2.11.0 2.12.0 2.13.0 2.14.1
ABI_TESTS ?= tests/ops tests/test_bad_input*.py tests/test_blocks*.py tests/test_compile.py tests/test_export.py tests/test_library.py \
  tests/test_model.py tests/test_parity.py
test-abi:
	$(MAKE) test-torch TORCH=torch==$(OLDEST) TESTS=tests/test_library.py
	cd build/torch-$(OLDEST) && rm -rf dist && MAEFAST_CUDA=0 PATH="$$PWD/$(BIN):$$PATH" \
	  $(BIN)/python -m pip wheel --no-build-isolation --no-deps -w dist .
	for version in $(TORCHES); do \
	  $(MAKE) test-torch TORCH=torch==$$version WHEEL=$$(echo build/torch-$(OLDEST)/dist/*.whl) TESTS="$(ABI_TESTS)" || exit 1; \
	done

# PATH is for cmake and ninja.
wheels: $(VENV)/.environment
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python scripts/wheels.py build

# Each Python takes a torch from pip, which may be a CUDA build of gigabytes.
test-wheels: $(VENV)/.environment
	$(BIN)/python scripts/wheels.py test $(TORCH) $(TESTS)

test-aarch64: $(VENV)/.environment
	PATH="$(CURDIR)/$(BIN):$$PATH" PYTHON=$(BIN)/python scripts/aarch64.sh $(TESTS)

# CUTLASS's headers; what else its wheel asks for they do not need.
CUTLASS := nvidia-cutlass==4.2.0.0
$(VENV)/.cutlass: $(VENV)/.environment
	$(BIN)/python -m pip install --no-deps $(CUTLASS)
	touch $@

test-aot: $(VENV)/.build $(VENV)/.cutlass
	$(BIN)/python scripts/aot_table.py
	$(BIN)/python tests/aot_gemm.py

# Not through $(VENV): what sets it up may need a network.
gpu-check:
	PYTHON=$(PYTHON) scripts/gpu_check.sh

# A copy of the package with instrumented objects, by GCC. libstdc++ comes along because the sanitizer looks for its exceptions at
# start-up; fresh memory holds 0x7f, as mallopt makes it elsewhere; a test wants its SIGSEGV; CPython leaks at exit.
test-sanitize: $(VENV)/.environment
	MAEFAST_SANITIZE=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py -q build_ext --build-lib $(SANITIZED)
	tar -c --exclude='*.so' --exclude=__pycache__ maefast | tar -x -C $(SANITIZED)
	PYTHONPATH=$(CURDIR)/$(SANITIZED) MAEFAST_SANITIZE=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:handle_segv=0:malloc_fill_byte=127:max_malloc_fill_size=16777216 \
	UBSAN_OPTIONS=print_stacktrace=1 \
	$(BIN)/pytest --capture=sys $(SANITIZED_TESTS)

COUNT ?= 2000
SEED ?= 0
fuzz: $(VENV)/.build
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/run.py --count $(COUNT) --seed $(SEED)

kills: $(VENV)/.build
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/kills.py --seed $(SEED)

PILLOW := $(shell sed -n 's/^train.*"pillow>=\([0-9.]*\)".*/\1/p' pyproject.toml)
test-pillow: $(VENV)/.build
	$(BIN)/python -m pip install --no-deps --upgrade --target build/pillow-$(PILLOW) pillow==$(PILLOW)
	PYTHONPATH=build/pillow-$(PILLOW) $(BIN)/python -m pytest tests/test_data*.py tests/test_image_modes.py

bench: $(VENV)/.build
	$(BIN)/python -m pytest benchmarks --benchmark-only --full

lint: $(VENV)/.environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc examples tests/cuda_emulator -regex '.*\.\(cpp\|h\|cu\|cuh\)')
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist maefast/*.so *.egg-info
