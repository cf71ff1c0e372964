# Each target does all the set-up that it needs, and is quick when run again.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := smollm2-135m
READY := $(VENV)/.ready
AUDITOR := $(VENV)/.auditor

.DEFAULT_GOAL := help
.PHONY: help demo test gpu mutants soak faults lint audit lock check format model clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

demo: model ## watch a real model learn a feed, a change of it, and a rollback
	@$(BIN)/kbsync demo

# Without a PostgreSQL server its half of the ledger's tests is skipped; tests/postgres.py says what it found.
# One thread per worker: small models lose more by threads that wait for each other than they gain.
test: model ## run the tests
	@$(BIN)/python -m tests.postgres
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --numprocesses 2 --dist worksteal

gpu: model ## the engine's tests on a CUDA device; its speed, memory and hashes there
	@$(BIN)/python -m tests.gpu

mutants: $(READY) ## small defects in the decisions: each must fail a test (about 10 minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants

soak: $(READY) ## a thousand passes of a tiny model on a simulated clock: what must stay bounded (about 8 minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak

faults: $(READY) ## kill, stop, refuse, mislead kbsync at hundreds of points: what must hold all the same
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults

lint: $(READY) ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: $(AUDITOR) ## known vulnerabilities of what is deployed; its bill of materials in dist/
	@$(BIN)/python -m tests.audit

# Newest versions that pyproject.toml allows; `tests/test_supply_chain.py` holds the two together.
lock: $(AUDITOR) ## pin what is deployed, with hashes: deploy/requirements.lock
	@$(BIN)/uv pip compile pyproject.toml --extra postgres --universal --python-version 3.11 --upgrade --generate-hashes \
	  --no-annotate --no-emit-index-url --quiet --custom-compile-command "make lock" --output-file deploy/requirements.lock

check: test lint audit ## test, lint, audit

format: $(READY) ## let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

model: $(READY) ## fetch the embedded model into the user's cache
	@$(BIN)/kbsync model pull $(MODEL)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kbsync needs Python 3.11 or newer: make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

$(AUDITOR): $(READY)
	$(BIN)/pip install --quiet --editable '.[audit]'
	@touch $@

clean: ## remove the virtual environment and caches of the tools
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
