# Penstock: `make serve` to use it, `make test` to change it, `make help` for the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
GRAPH ?= deploy/local.yaml
ARGS ?=

.PHONY: help serve test lint format check bench test-nixl test-transformers clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Penstock needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	-@$(PIP) uninstall --quiet --yes setuptools 2>/dev/null

# Bytecode is made on first use instead of for every module of every package: a smaller, quicker install.
$(VENV)/.serve: pyproject.toml | $(VENV)/bin/python
	$(PIP) install --quiet --no-compile --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(PIP) install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.serve

serve: $(VENV)/.serve ## frontend + 2 prefill + 2 decode workers on http://localhost:8000
	@$(BIN)/penstock up $(GRAPH) $(ARGS)

test: $(VENV)/.dev ## all tests
	$(BIN)/pytest $(ARGS)

lint: $(VENV)/.dev ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## let ruff put it in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test ## what CI runs

clean: ## remove what the other targets made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
