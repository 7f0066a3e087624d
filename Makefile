# Every target does its own set-up: python3, make and a package index are all that is needed.
# `make` lists the targets.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
DEMO_ARGS ?=
BENCH_ARGS ?=
PAYOFF_ARGS ?=
MUTANT_ARGS ?=

BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n $(WORKERS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two pips must never write into one environment.
.NOTPARALLEL:
.PHONY: help demo test slow coverage mutants lint types format bench payoff docs clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: $(VENV)/.stamp-demo  ## train, predict and plot into demo_out/ (DEMO_ARGS passes options on)
	$(BIN)/blr-optax demo --out demo_out $(DEMO_ARGS)

# One run for tests and doctests: one start-up, and one closing line to read.
test: $(VENV)/.stamp-test  ## fast tests and the doctests of the package
	$(PYTEST) -m "not slow and not device" --doctest-modules tests blr_optax

slow: $(VENV)/.stamp-test  ## the tests marked slow
	$(PYTEST) -m "slow and not device" tests

coverage: $(VENV)/.stamp-test  ## lines and branches that all tests reach
	$(PYTEST) -m "not device" --doctest-modules --cov --cov-report=term-missing:skip-covered tests blr_optax

mutants: $(VENV)/.stamp-test  ## seeded faults that tests must notice (MUTANT_ARGS passes options on)
	$(BIN)/python tests/mutants.py $(MUTANT_ARGS)

lint: $(VENV)/.stamp-lint  ## ruff: rules and format; basedpyright: types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python --baselinemode $(if $(CI),discard,auto)

format: $(VENV)/.stamp-lint  ## let ruff repair what it can
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: $(VENV)/.stamp-bench  ## the benchmarks (BENCH_ARGS passes options on)
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

payoff: $(VENV)/.stamp-payoff  ## where a posterior pays, resumable (PAYOFF_ARGS passes options on)
	$(BIN)/python -m benchmarks.payoff $(PAYOFF_ARGS)

docs: $(VENV)/.stamp-docs  ## the documentation, into docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

clean:  ## remove the environment and everything that was generated
	rm -rf $(VENV) demo_out docs/_build build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- set-up: one stamp per extra, so that a second run installs nothing ----------------------------

$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "blr_optax needs Python 3.11 or newer, and $(PYTHON) is" \
	    "$$($(PYTHON) --version 2>&1); choose another with make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.stamp-%: pyproject.toml $(VENV)/.stamp-venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $@
