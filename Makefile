# The one entry for people and for CI: `make help` lists the targets.
#   OFFLINE=1        never fetch the model; tests that need it are skipped, each with its reason
#   PYTHON=python3   the interpreter for .venv; else the first of python3.11, 3.12, 3.13, python3

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.NOTPARALLEL:
.DEFAULT_GOAL := help

OFFLINE ?= 0
PYTHONS := $(or $(PYTHON),python3.11 python3.12 python3.13 python3)
BIN := .venv/bin
RECIPE := recipes/quickstart.yaml
RUN := runs/quickstart
export OFFLINE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install model quickstart check test faults bench generate clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */\1\t/' | expand -t 12

install: .venv/installed  ## make .venv with the lorakit command and the tools of development

$(BIN)/python:
	@for python in $(PYTHONS); do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "$$python -m venv .venv"; exec $$python -m venv --clear .venv; \
	    fi; \
	done; \
	echo "lorakit needs Python 3.11 or newer; none of '$(PYTHONS)' is: make PYTHON=/path/to/python" >&2; \
	exit 1

.venv/installed: pyproject.toml constraints.txt lorakit/__init__.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

model: install  ## fetch SmolLM2-135M-Instruct (once) into lorakit's cache folder
ifeq ($(OFFLINE),1)
	@echo 'OFFLINE=1: the model is not fetched' >&2
else
	$(BIN)/python scripts/fetch_smollm2.py
endif

quickstart: model  ## the main job on a real model: train, merge, eval with gates, one answer
	$(BIN)/lorakit train $(RECIPE) --overwrite
	$(BIN)/lorakit eval $(RECIPE)
	$(BIN)/lorakit generate $(RUN)/adapter 'My Tollwyn Juicer still is not here. Please refund me, and do not rush.'

check: install  ## formatting, lint, types, architecture, freshness of generated files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python scripts/make_schema.py --check
	$(BIN)/python scripts/make_reference.py --check
	$(BIN)/python scripts/make_support_data.py --check
	$(BIN)/python scripts/make_memory_table.py --check
	$(BIN)/python -m pytest --quiet tests/test_architecture.py

test: model check  ## check, then the whole suite; fails without the model unless OFFLINE=1
	$(BIN)/python -m pytest --numprocesses logical --dist loadfile

faults: install  ## try every fault in full; a stopped run goes on; writes tests/faults/README.md
	$(BIN)/python -m tests.faults

bench: model  ## measure start-up and the training loop; speed is never a test
	$(BIN)/python scripts/bench/run.py

generate: install  ## write the generated files again: schema, reference, support data, memory table
	$(BIN)/python scripts/make_schema.py
	$(BIN)/python scripts/make_reference.py
	$(BIN)/python scripts/make_support_data.py
	$(BIN)/python scripts/make_memory_table.py

clean:  ## remove what make made; runs/ and the cache folder stay
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find lorakit scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
