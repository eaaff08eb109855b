# make demo trains a small model with FIPO on this machine; make test checks everything. Both set themselves up first.

.PHONY: help install demo demo-dapo docs lint test test-fast test-docs test-browser test-engines test-slurm test-long clean
.DEFAULT_GOAL := help

# The first of these that is Python 3.11 or 3.12 makes the environment; PYTHON=/path/to/python3.12 overrides.
SUPPORTED := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
HEADERS := import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	$$python -c '$(SUPPORTED)' 2>/dev/null && echo $$python && break; done)

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

export OMP_NUM_THREADS := 1
# Empty, so that what is compiled once is kept even where images are set up to keep nothing: tests start many a process.
export PYTHONDONTWRITEBYTECODE :=

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## set up .venv with the pinned dependencies

# torch goes first and alone: later packages find it there and cannot draw in another build of it.
$(INSTALLED): setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed, and python3, python3.12 and python3.11 are neither." \
		"Install one of them, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c '$(SUPPORTED)' || { echo "PYTHON=$(PYTHON) is not Python 3.11 or 3.12." >&2; exit 1; }
	@command -v $${CC:-cc} >/dev/null && $(PYTHON) -c '$(HEADERS)' || { echo "A C compiler and Python's headers are" \
		"needed to build pycosat, on which reasoning-gym depends (Debian, Ubuntu: gcc, python3-dev)." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt torch
	@echo "Installing the other pinned dependencies: a minute or two"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# ENGINE=sglang or ENGINE=vllm: a real server, on the CPU, from an environment of its own.
SERVER = python=$$($(BIN)/python tools/engines/install.py $(ENGINE)); \
	set -- rollout.engine=$(ENGINE) servers.python="$$python" run.name=quickstart-$(ENGINE);

# Where a demonstration's run lies: ARGS may say so.
FOLDER = $(or $(patsubst run.output_dir=%,%,$(filter run.output_dir=%,$(ARGS))),$\
	outputs/$(or $(patsubst run.name=%,%,$(filter run.name=%,$(ARGS))),$(1)))

demo: $(INSTALLED) ## train the quick-start model with FIPO (ENGINE=sglang or vllm: on that server; ARGS="key=value …"), and report
	@set -e; $(if $(ENGINE),$(SERVER)) \
	set -x; $(BIN)/megatron-fipo train examples/quickstart/fipo.yaml --nproc 2 "$$@" $(ARGS); \
	$(BIN)/megatron-fipo report $(call FOLDER,quickstart$(if $(ENGINE),-$(ENGINE)))

demo-dapo: $(INSTALLED) ## the same with DAPO, the baseline
	$(BIN)/megatron-fipo train examples/quickstart/fipo.yaml --nproc 2 \
		algorithm=dapo run.name=quickstart-dapo $(ARGS)
	$(BIN)/megatron-fipo report $(call FOLDER,quickstart-dapo)

# MkDocs has an environment of its own: it reads the package's source and needs none of what the package needs.
DOCS := .venv-docs
$(DOCS)/.installed: tools/docs/requirements.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed; name one: make docs PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --requirement $<
	@touch $@

docs: $(DOCS)/.installed ## this documentation as a site with the API reference, in build/site
	$(DOCS)/bin/python tools/docs/site.py
	@echo "To read it, with search: python3 -m http.server --bind 127.0.0.1 --directory build/site 8000"

lint: $(INSTALLED) ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One test more at a time than there are cores, because some wait; at most eight. A file's tests stay together, because
# they share what its fixtures made; the files that take minutes come first.
JOBS ?= $(shell cores=$$(nproc); echo $$((cores < 7 ? cores + 1 : 8)))
TOGETHER := --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

test: lint ## style, types and all tests, on all cores (JOBS=1: one at a time)
	$(BIN)/python -m pytest $(TOGETHER) $(ARGS)

test-fast: $(INSTALLED) ## unit tests that start no processes: less than a minute
	$(BIN)/python -m pytest tests/unit -m 'not slow and not ci' $(TOGETHER) $(ARGS)

test-docs: $(INSTALLED) $(DOCS)/.installed ## the site builds strictly, and does not where something is broken
	MEGATRON_FIPO_DOCS_PYTHON=$(DOCS)/bin/python $(BIN)/python -m pytest -m docs $(ARGS)

test-browser: $(INSTALLED) ## the report's page in Chromium (root installs Debian's, where there is none)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile -m browser $(ARGS)

test-engines: $(INSTALLED) ## the rollout engines against real SGLang and vLLM servers, installed if they are not there
	@set -e; sglang=$$($(BIN)/python tools/engines/install.py sglang); \
	vllm=$$($(BIN)/python tools/engines/install.py vllm); \
	set -x; MEGATRON_FIPO_SGLANG_PYTHON=$$sglang MEGATRON_FIPO_VLLM_PYTHON=$$vllm \
		$(BIN)/python -m pytest -m "(sglang or vllm) and not long" $(ARGS)

test-slurm: $(INSTALLED) ## jobs on a real Slurm of two nodes on this host (root; its Debian packages are installed)
	$(BIN)/python -m pytest -m slurm $(ARGS)

test-long: $(INSTALLED) ## kill the quick-start at twenty random moments and compare what it comes to
	$(BIN)/python -m pytest -m "long and not sglang and not vllm" -s $(ARGS)

clean: ## remove the environment and caches; runs in outputs/ stay
	rm -rf $(VENV) $(DOCS) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
