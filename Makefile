# Two commands matter: `make train` and `make test`. Both set up .venv from constraints.txt if it is not there.

PYTHON ?= python3
VENV := .venv
BIN := $(abspath $(VENV))/bin
READY := $(VENV)/.ready
TORCH := $(shell grep '^torch==' constraints.txt)

# DeepSpeed builds with ninja, and torchrun is looked up, on PATH.
export PATH := $(BIN):$(PATH)
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= true

CONFIG ?= configs/quickstart.yaml
ARGS ?=
# One rank a GPU, or two ranks on a CPU; fewer where the configuration cannot be cut that way.
RANKS ?= $(shell $(BIN)/python -m launch._ranks $(CONFIG) $(ARGS))

.DEFAULT_GOAL := help
.PHONY: help setup train ablation-demo test test-slow layouts faults check static bench bench-peers lm-eval audit gpu gpu-bench clean

help: ## show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

setup: $(READY) ## create .venv and compile what DeepSpeed and the CPU experts need

$(READY): constraints.txt pyproject.toml moe/cpu_experts.cpp
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; run make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || { echo "error: no C++ compiler; install g++ (DeepSpeed and the CPU experts compile an extension)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first, at its exact version: with no torch installed, a looser requirement elsewhere pulls gigabytes of CUDA.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	$(BIN)/python -m launch.warmup
	@touch $(READY)

train: $(READY) ## prepare the quickstart's text and train it (CONFIG=..., ARGS="key=value ...", RANKS=...)
	$(BIN)/python -m launch.prepare $(CONFIG) $(ARGS)
	$(BIN)/python -m launch.torchrun --standalone --nproc_per_node=$(RANKS) -m launch.train $(CONFIG) $(ARGS)

ablation-demo: $(READY) ## 18 small runs, three ways to balance x two ways to weigh x three seeds, compared; goes on where it was stopped
	$(BIN)/python -m launch.ablate configs/grids/ablation-demo.yaml $(ARGS)
	$(BIN)/python -m launch.report runs/ablation-demo

test: $(READY) ## run the tests (not the slow ones)
	$(BIN)/python -m pytest

test-slow: $(READY) ## run the long matrices
	$(BIN)/python -m pytest -m slow

layouts: $(READY) ## train every layout on four ranks, and write the table of trainer/LAYOUTS.md
	WRITE_LAYOUTS=1 $(BIN)/python -m pytest -m slow tests/dist/test_layouts.py

faults: $(READY) ## break runs in every way of the fault grid; one line a row
	$(BIN)/python -m pytest -q -p tests.faults.table -m fault tests/faults tests/dist tests/launch tests/data

static: $(READY) ## format, lint, types, imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: static ## everything a commit must pass: static checks and the tests that take seconds
	$(BIN)/python -m pytest --ignore=tests/dist --ignore=tests/launch

bench: $(READY) ## time layers and hooks on this machine, as ratios
	$(BIN)/python -m tests.bench

bench-peers: $(READY) ## install the peers of the bench that are no dependency, into .venv-bench
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/bench/peers.txt

lm-eval: $(READY) ## install lm-evaluation-harness, which is no dependency, into .venv-bench
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	@# It sees the packages of .venv, so torch and transformers are there once, at the versions we test.
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
		"$$(.venv-bench/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/evenkeel.pth"
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/bench/lm_eval.txt

audit: ## look up every pinned version in the Python advisory database; fails if one cannot be looked up
	test -x .venv-audit/bin/python || $(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	.venv-audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip --strict --progress-spinner off

gpu: ## on a machine with a CUDA GPU: device tests and a short bf16 training over NCCL
	bash launch/gpu.sh

gpu-bench: ## on a machine with a CUDA GPU: layers, steps, hooks and loss head against bounds, peers and targets
	bash launch/gpu_bench.sh $(ARGS)

clean: ## remove .venv, prepared data and caches; runs/ stays
	rm -rf $(VENV) data build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
