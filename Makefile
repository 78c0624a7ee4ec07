# One runner, few verbs. Every verb sets up what it needs by itself: the first one in a fresh clone takes a minute or two.
.DEFAULT_GOAL := help
SHELL := /bin/sh
VENV := .venv
RUN := $(VENV)/bin
READY := $(VENV)/.installed
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
# The first Python on the PATH that Pintail runs on; `make PYTHON=/path/to/python3` decides otherwise.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && { command -v $$p; break; }; done)
ARGS ?=

.PHONY: help setup demo dev test check bench bench-ingest bench-recovery bench-sink bench-query fmt clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## Make the virtual environment from the lock file, once per change of it

demo: $(READY) ## Watch the whole system at work on 336,776 real flights
	$(RUN)/python -m loadtest.demo $(ARGS)

dev: $(READY) ## Run the whole system on this machine until Ctrl-C
	$(RUN)/pintail dev $(ARGS)

test: $(READY) ## Run all tests, on real servers (ARGS="-k name" for some)
	@.ci/need-kcat
	$(RUN)/python -m pytest $(ARGS)

check: $(READY) ## Check style and types of everything, tests included, and the matrix of invariants
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/python -m tests.invariants_page --check

bench: $(READY) ## Measure throughput and latency against the targets
	$(RUN)/python -m loadtest.bench $(ARGS)

bench-ingest: $(READY) ## Drain one topic with Pintail, Faust, Quix Streams, a bare loop and no Kafka at all
	$(RUN)/python -m loadtest.bench_ingest $(ARGS)

bench-recovery: $(READY) ## Measure how fast 1 GB of state comes back, and what its snapshots cost
	$(RUN)/python -m loadtest.bench_recovery $(ARGS)

bench-sink: $(READY) ## Measure one sink worker: draining, freshness, CPU per row, parts in ClickHouse
	$(RUN)/python -m loadtest.bench_sink $(ARGS)

bench-query: $(READY) ## Time answers over the query topic, next to plain Faust's ask()
	$(RUN)/python -m loadtest.bench_query $(ARGS)

fmt: $(READY) ## Format everything and mend what can be mended
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

clean: ## Remove what can be made again; .pintail, the data of the local stack, stays
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements.lock pyproject.toml
	@$(or $(PYTHON),false) -c '$(SUPPORTED)' || { \
		echo "Pintail needs Python 3.11, 3.12 or 3.13 as python3 (or: make PYTHON=/path/to/python3)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
		echo "this Python cannot make virtual environments; Debian, Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing the locked dependencies into $(VENV); the first time takes a minute or two ..."
	@$(PYTHON) -m venv $(VENV)
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@
