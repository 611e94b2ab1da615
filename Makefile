# Needs Python 3.10+, pip and make; everything else comes into .venv on first use.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test quick check test-gpu-choices test-plain-kernels fix bench clean

help: ## say what the targets are
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-20s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Editable, so that only a change of the dependencies asks for a new install.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("error: PYTHON=$(PYTHON) is older than 3.10: set PYTHON=python3.12, say")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=24'
	@# setuptools warns of every editable install that the folder may take precedence: it is meant to
	PYTHONWARNINGS='ignore:Editable installation' $(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## an answer of the default model, plain against drafted
	$(BIN)/redrafter demo

test: $(STAMP) ## all tests
	$(BIN)/python -m pytest -q -n 2

quick: $(STAMP) ## the tests of a minute
	$(BIN)/python -m pytest -q -n 2 -m "not slow and not real and not network"

check: $(STAMP) ## what must pass before a change lands: lint, format, types, import contract, all tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q -n 2
	$(MAKE) --no-print-directory test-gpu-choices test-plain-kernels

# What differs between a GPU and a CPU, with and without the faster kernels.
CORE := tests/test_decode.py tests/test_drafters_beam.py tests/test_drafters_lookup.py tests/test_drafters_precision.py \
	tests/test_drafters_recurrent.py tests/test_drafters_recurrent_network.py tests/test_target.py \
	tests/test_target_cache.py

# Compiled for packing and acceptance only: the C++ compiler takes half an hour for the sampling filters of every shape.
test-gpu-choices: $(STAMP) ## the core's tests with what is chosen on a GPU
	REDRAFTER_PRETEND_GPU=1 MLX_DISABLE_COMPILE=1 $(BIN)/python -m pytest -q -n 2 $(CORE) tests/test_sampling_*.py \
		tests/test_tree.py tests/test_accept.py
	REDRAFTER_PRETEND_GPU=1 $(BIN)/python -m pytest -q tests/test_tree.py tests/test_accept.py

test-plain-kernels: $(STAMP) ## the core's tests without the faster kernels for a CPU
	REDRAFTER_CPU=off $(BIN)/python -m pytest -q -n 2 $(CORE)

fix: $(STAMP) ## repair what ruff can repair
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## speculative against plain decoding on this machine
	$(BIN)/redrafter bench

clean: ## remove the environment and what tools left behind
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
