# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON  ?= python3
VENV    ?= .venv
BIN     := $(VENV)/bin
RUN_DIR ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)
WORKERS ?= 2
STAMP   := $(VENV)/.installed
PYTEST  := $(BIN)/python -m pytest -q --numprocesses $(WORKERS) --dist loadscope
NATIVE  := CMakeLists.txt pyproject.toml constraints.txt $(wildcard csrc/*.cpp csrc/*.h)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-portable test-slow check check-aarch64 bench dist clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install everstep with everything the tests need

# The extension is compiled into an editable install: Python files are used in place.
$(STAMP): $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable '.[all,dev]'
	@touch $(STAMP)

demo: $(STAMP) ## train a small language model on 4 ranks, on real text, in a few minutes
	$(BIN)/everstep train demo --run-dir $(RUN_DIR)

test: $(STAMP) ## the test suite (10 minutes at most on two cores)
	$(PYTEST) -m "not slow and not gpu"

test-portable: $(STAMP) ## the kernel and checkpoint tests with the portable kernels forced
	EVERSTEP_PORTABLE_KERNELS=1 $(PYTEST) -m "not slow and not gpu" \
	  tests/unit/csrc tests/unit/checkpoint tests/property

test-slow: $(STAMP) ## the slow suite (an hour at most on two cores)
	$(PYTEST) -m "slow and not gpu" --timeout 1800
	EVERSTEP_PORTABLE_KERNELS=1 $(PYTEST) -m "not slow and not gpu"

check: $(STAMP) ## format, lint, types, import layers, C++ format, aarch64 compilation
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p everstep
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h
	PATH="$(abspath $(BIN)):$$PATH" csrc/check_aarch64.sh

bench: $(STAMP) ## run the benchmarks and rewrite benchmarks/results/
	$(BIN)/python benchmarks/copy_kernels.py --json benchmarks/results/copy_kernels.json
	$(BIN)/python benchmarks/loop_overhead.py --json benchmarks/results/loop_overhead.json
	$(BIN)/python benchmarks/data_limits.py --json benchmarks/results/data_limits.json
	$(BIN)/python benchmarks/checkpoint_io.py --json benchmarks/results/checkpoint_io.json \
	  --plot benchmarks/results/checkpoint_io.png
	$(BIN)/python benchmarks/snapshot_inflation.py \
	  --json benchmarks/results/snapshot_inflation.json \
	  --plot benchmarks/results/snapshot_inflation.png
	$(BIN)/python benchmarks/snapshot_restore.py --json benchmarks/results/snapshot_restore.json

dist: $(STAMP) ## build sdist and wheel, and try both in empty environments
	tests/support/try_dist.sh $(BIN)/python

clean: ## remove what was built here (runs/ stays)
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
