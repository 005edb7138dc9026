# make train · make test · make check · make test-slow · make test-real
# PYTHON=python3.12 chooses the interpreter; TORCH_INDEX=URL the package index that torch comes from.

SHELL := /bin/bash
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
TORCH_INDEX ?=
TORCH := torch==2.13.0
BIN := .venv/bin
PARALLEL := -n logical --maxprocesses 8 --dist worksteal

.PHONY: setup train test check format test-slow test-real clean

setup: .venv/ready

.venv/ready: requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "empo2 needs Python 3.11 or newer: install it, or name it with make PYTHON=…"; exit 1; }
	$(PYTHON) -m venv .venv
	@if [ -z "$(TORCH_INDEX)" ] && [ "$$(uname -s)" = Linux ] && \
	  ! $(BIN)/pip download --quiet --no-deps --no-index --dest /tmp $(TORCH) >/dev/null 2>&1; then \
	  echo "note: torch from the default index brings several GB of CUDA packages; without a GPU, add"; \
	  echo "      TORCH_INDEX=<the index of PyTorch's CPU builds, see pytorch.org>"; fi
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-deps -e .
	@touch .venv/ready

# Coin Collector in four games that are found soon: minutes on two cores.
train: setup
	$(BIN)/empo2 train coin --env.variations 14,26,45,94 --eval.train_variations 4 --eval.every 5 --train.steps 20

test: setup
	$(BIN)/pytest $(PARALLEL)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest $(PARALLEL)

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Minutes: learning in small, kill and resume of whole processes.
test-slow: setup
	$(BIN)/pytest -m slow

# Needs the fetched models and the simulator.
test-real: setup
	$(BIN)/empo2 fetch
	$(BIN)/pytest -m real

clean:
	rm -rf .venv build dist src/*.egg-info
