# `make` or `make help` lists what there is. `make check PYTHON=/path/to/python` uses another
# environment as it is and skips set-up.

PYTHON = .venv/bin/python

# One rendering thread per simulator process: more are slower.
export LP_NUM_THREADS ?= 1

ifeq ($(origin PYTHON),file)
SETUP := scripts/setup.sh
else
SETUP := true
endif

# A file's tests stay together, because they share what was expensive to make. In the order of their folders: the slow
# files of e2e are then not the last ones, when nobody is left to share the work.
# One thread each: two that compute on two threads on two cores wait for each other more than they work.
IN_PARALLEL = -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help setup packages train test check lint bench clean

help: ## list the targets
	@sed -nE 's/^([a-z]+):[^#]*## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

setup: ## prepare this machine: .venv and a Vulkan driver
	@$(SETUP)

packages:
	@$(SETUP) --packages

train: setup ## make an SFT checkpoint, refine it with PPO, report
	@$(PYTHON) scripts/make_train.py

lint:
	@$(PYTHON) -m ruff check
	@$(PYTHON) -m ruff format --check
	@$(PYTHON) -m mypy

test: setup lint ## everything that must hold: ruff, mypy, all tests
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest $(IN_PARALLEL)

check: packages lint ## before every commit: ruff, mypy, unit and contract tests without simulators
	@$(PYTHON) -m pytest -m "not simulator and not slow" tests/unit tests/contract algos

bench: setup ## measure speed layer by layer, write docs/benchmarks/speed.md
	@$(PYTHON) scripts/bench/run.py

clean: ## remove caches and .venv; runs and datasets stay
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
