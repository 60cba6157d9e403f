# Everything a person or CI does here. Each target makes .venv first when it is missing or out of date.
#
#   PYTHON=python3.12     the interpreter .venv is made with (3.11 or newer)
#   TORCH_INDEX=<url>     a package index to take torch, and only torch, from: on Linux the default build of torch brings
#                         several GB of CUDA packages, which a machine without an NVIDIA GPU does not need
#   WORKERS=2             test processes; each uses one thread
#   TEST_SECONDS=3000     `make test` is stopped after that long
#   GPU=sm_80             the GPU that `make emulate` emulates
#   ARGS="-k memory"      more arguments for pytest, or for the demo

PYTHON ?= python3
TORCH_INDEX ?=
WORKERS ?= 2
TEST_SECONDS ?= 3000
ARGS ?=
GPU ?= sm_90

BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check -qq -c constraints.txt
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
PYTEST := $(ONE_THREAD) $(BIN)/python -m pytest -q
ON_GPU := $(foreach name,memory linear decode stepping,tests/kernels/test_triton_$(name).py)
PARALLEL := -n $(WORKERS) --dist worksteal
BOUND := $(shell command -v timeout >/dev/null 2>&1 && echo "timeout --foreground -k 30 $(TEST_SECONDS)")

.DEFAULT_GOAL := help
.PHONY: help setup demo test emulate check nightly coverage format golden docs clean

help: ## this list
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z]*\):.*## /  \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14
	@echo "variables: see the first lines of the Makefile"

setup: $(STAMP) ## make .venv and install the project into it, editable, with the tested versions

demo: $(STAMP) ## see the project work
	@$(BIN)/titans-graph demo $(ARGS)

test: $(STAMP) ## the tests, without the long ones
	@echo "Tests: $(WORKERS) processes, stopped after $(TEST_SECONDS) s"
	@$(ONE_THREAD) $(BOUND) $(BIN)/python -m pytest -q tests -m "not nightly" $(PARALLEL) $(ARGS)

check: $(STAMP) ## format, lint and types: what CI checks
	@bad=0; \
	$(BIN)/ruff format --check . || bad=1; \
	$(BIN)/ruff check . || bad=1; \
	$(BIN)/mypy --strict || bad=1; \
	exit $$bad

emulate: $(STAMP) ## the Triton kernels' tests as compiled for a GPU, on an emulated one (GPU=sm_90 or sm_80)
	@EMULATED_GPU=$(GPU) $(PYTEST) -p tests.emulator.plugin $(PARALLEL) tests/emulator/on_gpu_*.py $(ON_GPU) $(ARGS)

nightly: $(STAMP) ## every test, with many more examples: hours (docs/reliability.md)
	@echo "All tests with the hypothesis profile 'nightly': this takes hours, see docs/reliability.md"
	@HYPOTHESIS_PROFILE=nightly $(PYTEST) tests $(PARALLEL) -o faulthandler_timeout=3600 $(ARGS)

coverage: $(STAMP) ## the tests again in one process, then the lines no test reached
	@$(ONE_THREAD) $(BIN)/coverage run -m pytest -q tests -m "not nightly" $(ARGS)
	@$(BIN)/coverage combine -q
	@$(BIN)/coverage report

format: $(STAMP) ## format, and mend what the linter can mend
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

golden: $(STAMP) ## write the golden files anew; look at the diff before you commit it
	@$(PYTEST) tests -m golden --update-golden $(ARGS) || [ $$? -eq 5 ]

docs: golden ## the same: the generated tables in docs/ are golden files

clean: ## remove what builds, tests and tools left behind, except .venv and runs/
	@rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache htmlcov .coverage .coverage.*
	@find . -name .venv -prune -o -type d -name __pycache__ -exec rm -rf {} +

# torch goes in first and alone, so that its index can be chosen; the second step then adds whatever it depends on.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: '$(PYTHON)' was not found; choose a Python with: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $$($(PYTHON) -V) is too old, 3.11 or newer is needed; choose another with: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: this $(PYTHON) cannot make virtual environments (no ensurepip or venv): on Debian and Ubuntu install" >&2; \
	  echo "       the package python3-venv, or choose another Python with: make PYTHON=/path/to/python3" >&2; exit 1; }
	@[ -x $(BIN)/python ] || { rm -rf .venv && $(PYTHON) -m venv .venv; }
	@echo "Installing into .venv, step 1 of 2: torch$(if $(TORCH_INDEX), from the given index) (one to ten minutes)"
	@[ -n "$(TORCH_INDEX)" ] || [ "$$(uname)" != Linux ] || command -v nvidia-smi >/dev/null || \
	  echo "  (no NVIDIA GPU seen; if this fetches several GB of CUDA packages, see TORCH_INDEX in the Makefile)"
	@$(PIP) --no-deps $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") torch
	@echo "Installing into .venv, step 2 of 2: the project and its tools (one to five minutes)"
	@$(PIP) -e '.[dev]'
	@touch $@
