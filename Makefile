# Everything here runs in ./.venv, which is made from the lock files; nothing outside the repository is touched.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
JOBS ?= 2
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test chaos vanish fuzz fuzz-coverage soak setup check lint types layers bench bench-losses lock schemas wheel clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.demo ## four learners share a pool of CartPoles over a real nats-server, and learn it
	$(BIN)/meshrl demo

test: $(VENV)/.dev ## the suite, against a real nats-server; what needs torch or EnvPool runs where they are installed
	$(BIN)/pytest -n $(JOBS) --dist worksteal --ignore tests/chaos/test_chaos.py $(PYTEST_ARGS)

# Box2D is an extra of this package, here of the version that CI has; without it CartPole stands in for LunarLander.
chaos: $(VENV)/.dev ## a thousand episodes by ten learners while workers, server and network fail, ten minutes; CHAOS_SEED=1
	$(PIP) box2d==2.3.10
	MESHRL_CHAOS=long CHAOS_SEED=$(or $(CHAOS_SEED),1) $(BIN)/pytest tests/chaos/test_chaos.py -s $(PYTEST_ARGS)

vanish: $(VENV)/.dev ## ten thousand clients that open a session and are killed: no slot stays taken, no memory used
	MESHRL_VANISH=10000 $(BIN)/pytest tests/mesh/test_vanishing.py -s $(PYTEST_ARGS)

fuzz: $(VENV)/.dev ## a million mutated messages to real workers, and 50,000 calls of a client that is told mutants
	MESHRL_FUZZ_MESSAGES=1000000 MESHRL_FUZZ_ANSWERS=50000 $(BIN)/pytest tests/fuzz -s $(PYTEST_ARGS)

# In an environment of its own: atheris has wheels for Linux alone, and nothing else here needs it.
fuzz-coverage: ## the coverage-guided fuzzer on codec, lanes and sessions, a minute each; keeps what it finds
	$(MAKE) setup VENV=.venv-fuzz
	.venv-fuzz/bin/pip install --quiet --disable-pip-version-check atheris==3.0.0
	.venv-fuzz/bin/python -m tests.fuzz.coverage --seconds $(or $(FUZZ_S),60)

soak: $(VENV)/.dev ## five minutes of sessions that come and go, which may leave no memory behind
	MESHRL_SOAK_S=300 $(BIN)/pytest tests/mesh/test_memory.py --timeout=600 $(PYTEST_ARGS)

setup: $(VENV)/.dev ## the environment alone, with the tools of the checks

check: lint types layers test ## lint, types, import layers, tests: the first part of what CI runs

lint: $(VENV)/.dev ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.dev ## mypy, strict
	$(BIN)/mypy

layers: $(VENV)/.dev ## import-linter: imports only point down
	$(BIN)/lint-imports

bench: $(VENV)/.dev ## meshrl and every peer in one run, 25 to 45 minutes; writes docs/benchmarks.md
	$(BIN)/python benchmarks/run.py --write-docs

bench-losses: $(VENV)/.dev ## what resuming costs a step, and how long a killed worker is missed; 14 minutes
	$(BIN)/python benchmarks/losses.py

schemas: $(VENV)/.dev ## write schemas/v1 anew from the code
	$(BIN)/python -m schemas.generate

lock: $(VENV)/.dev ## resolve the lock files anew
	$(PIP) uv
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --extra demo --generate-hashes --no-header --upgrade -q -o requirements.lock
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --extra demo --group dev --generate-hashes --no-header --upgrade -q -c requirements.lock -o requirements-dev.lock

wheel: $(VENV)/.dev ## build the wheel into dist/
	$(BIN)/python -m build --wheel

clean: ## remove the environment and everything made
	rm -rf $(VENV) .venv-oldest .venv-sb3 .venv-fuzz .venv-3.* dist build demo-out .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not ((3, 11) <= sys.version_info[:2] < (3, 14)))' || \
		{ echo "meshrl needs Python 3.11, 3.12 or 3.13; this is $$($(PYTHON) --version). Say which: make PYTHON=python3.12"; exit 1; }
	@echo "making $(VENV) (about half a minute, once)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: requirements.lock pyproject.toml | $(BIN)/python
	$(PIP) --require-hashes -r requirements.lock
	$(PIP) --no-deps -e .
	@touch $@

$(VENV)/.dev: requirements-dev.lock pyproject.toml | $(BIN)/python
	$(PIP) --require-hashes -r requirements-dev.lock
	$(PIP) --no-deps -e .
	@touch $@ $(VENV)/.demo
