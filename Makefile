# Penstock: `make serve` to use it, `make test` to change it, `make help` for the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
GRAPH ?= deploy/local.yaml
ARGS ?=
CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/penstock

.PHONY: help serve test lint format check test-nixl test-transformers parity soak clean

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

# NIXL's packages declare torch and CUDA builds that moving memory needs nothing of: --no-deps.
test-nixl: $(VENV)/.dev ## KV moved over NIXL, in parts and in a graph (installs it: 330 MB)
	$(PIP) install --quiet --no-deps nixl==1.5.1 nixl-cu13==1.5.1
	$(BIN)/pytest tests/transfer/with_nixl.py tests/e2e/test_document.py tests/e2e/test_equality.py $(ARGS)

# In an environment of its own, kept between runs: torch is large. pip must find torch's CPU build, or
# it fetches gigabytes of CUDA.
test-transformers: ## the reference engine against transformers, live (installs torch)
	$(MAKE) VENV=$(CACHE)/transformers parity

parity: $(VENV)/.dev
	$(PIP) install --quiet torch==2.13.0 transformers safetensors
	$(BIN)/pytest tests/engines/reference/live/parity.py $(ARGS)

lint: $(VENV)/.dev ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## let ruff put it in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test ## what CI runs

soak: $(VENV)/.serve ## 64 clients for 5 minutes: no error, no leak
	$(BIN)/python benchmarks/soak.py $(ARGS)

clean: ## remove what the other targets made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
