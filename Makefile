# Every target sets up what it needs: .venv with the pinned development environment, the package in place, the native build.
#
#   make demo    pre-train a small MAE on real images and show what it learned     STEPS=... to change the number of steps
#   make test    the test suite
#   make bench   the full benchmarks: JSON, table and chart under benchmarks/results/<machine>/
#   make lint    ruff, clang-format, mypy
#
# PYTHON=... chooses the interpreter; one that already has torch lends it, and torch is then not downloaded.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h') CMakeLists.txt setup.py pyproject.toml maefast/schemas.inc

.PHONY: demo test bench lint clean
.DELETE_ON_ERROR:

# An interpreter with torch lends its site-packages through a .pth file: that works from inside a virtual environment too.
$(VENV)/.environment: requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@lent=$$($(PYTHON) -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' 2>/dev/null); \
	if [ -n "$$lent" ]; then \
	  echo "$$lent" > $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lent-torch.pth; \
	else \
	  $(BIN)/python -m pip install $(TORCH); \
	fi
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@

$(VENV)/.build: $(VENV)/.environment $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --no-build-isolation --no-deps -e .
	touch $@

demo: $(VENV)/.build
	$(BIN)/maefast demo $(if $(STEPS),--steps $(STEPS))

test: $(VENV)/.build
	$(BIN)/python -m pytest

bench: $(VENV)/.build
	$(BIN)/python -m pytest benchmarks --benchmark-only --full

lint: $(VENV)/.environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $$(find csrc -name '*.cpp' -o -name '*.h')
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build maefast/*.so *.egg-info
