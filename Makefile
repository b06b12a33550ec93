# `make serve` and `make test` install what they need into .venv first, and then do their job.

PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
TORCH := torch==2.13.0

TORCH_STAMP := $(VENV)/.$(TORCH)
RUNTIME_STAMP := $(VENV)/.runtime
DEV_STAMP := $(VENV)/.dev

# The clients of `make conformance` need what Headlong does not, in versions of their own.
CLIENTS := .venv-clients
CLIENTS_STAMP := $(CLIENTS)/.installed

# Of these only HOST is never taken from the environment: shells export it as the machine's name.
SERVE_ARGS := $(if $(MODEL),'$(MODEL)') \
	$(if $(PROFILE),--profile '$(PROFILE)') \
	$(if $(PORT),--port '$(PORT)') \
	$(if $(filter command line,$(origin HOST)),--host '$(HOST)')

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

.PHONY: help
help: ## Say what there is.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "make serve takes MODEL=folder-or-hub-id PROFILE=file PORT=number HOST=address."
	@echo "PYTHON=python3.12 chooses the interpreter that .venv is made of."

.PHONY: serve
serve: $(RUNTIME_STAMP) ## Serve a model on 127.0.0.1:8000; the embedded one unless MODEL is given.
	@exec $(BIN)/headlong serve $(SERVE_ARGS)

.PHONY: test
test: $(DEV_STAMP) ## Run the tests.
	$(BIN)/python -m pytest --quiet --durations=5
	TRITON_INTERPRET=1 $(BIN)/python -m pytest --quiet --durations=5 --numprocesses=auto -m triton

.PHONY: kernels
kernels: $(DEV_STAMP) ## Compile every GPU kernel for sm_80 and sm_90; needs no GPU.
	$(BIN)/python -m headlong.kernels.triton_check

.PHONY: conformance
conformance: $(DEV_STAMP) $(CLIENTS_STAMP) ## Run lm_eval, guidellm and schemathesis against a real server.
	PYTHONPATH=benchmarks $(BIN)/python tests/conformance/run.py --clients $(CLIENTS)/bin

.PHONY: image
image: $(DEV_STAMP) ## Check docker/ and build, start and ask the CPU image (Debian, root, buildah).
	docker/check.sh

.PHONY: gpu
gpu: $(RUNTIME_STAMP) ## Check and time everything on this machine's CUDA device (GPU_ARGS=--help).
	$(BIN)/python benchmarks/gpu.py $(GPU_ARGS)

.PHONY: check
check: lint format-check types test kernels ## Lint, formatting, types, tests, kernels.

.PHONY: lint
lint: $(DEV_STAMP)
	$(BIN)/ruff check

.PHONY: format-check
format-check: $(DEV_STAMP)
	$(BIN)/ruff format --check

.PHONY: types
types: $(DEV_STAMP)
	$(BIN)/mypy
	$(BIN)/pyright

.PHONY: format
format: $(DEV_STAMP) ## Put the code into its standard form.
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: install
install: $(DEV_STAMP) ## Only install, with what development needs.

.PHONY: clean
clean: ## Remove .venv and everything that was built.
	rm -rf $(VENV) $(CLIENTS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(RUNTIME_STAMP): $(TORCH_STAMP) pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable .
	@touch $@

$(DEV_STAMP): $(TORCH_STAMP) pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(RUNTIME_STAMP) $@

$(CLIENTS_STAMP): tests/conformance/requirements.txt | $(BIN)/python
	'$(PYTHON)' -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip --disable-pip-version-check --no-input install --quiet $(TORCH)
	$(CLIENTS)/bin/python -m pip --disable-pip-version-check --no-input install --quiet \
		--requirement tests/conformance/requirements.txt
	@touch $@

# On its own and first: where pip is given an index of CPU builds (PIP_EXTRA_INDEX_URL), the version
# alone finds the CPU build there, and nothing after this asks for another.
$(TORCH_STAMP): | $(BIN)/python
	$(PIP) install --constraint constraints.txt $(TORCH)
	@touch $@

$(BIN)/python:
	@command -v '$(PYTHON)' >/dev/null || { \
		echo "Python 3.11 or newer is needed and '$(PYTHON)' was not found: install python3," \
			"or name another with PYTHON=" >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed, '$(PYTHON)' is $$('$(PYTHON)' -V 2>&1):" \
			"name another with PYTHON=" >&2; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$(PYTHON)' has no venv module: install it with 'apt install python3-venv'" >&2; \
		exit 1; }
	'$(PYTHON)' -m venv $(VENV)
