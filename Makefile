# setup, demo, test, check: all a newcomer needs. Each creates .venv first if it is missing.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: help setup demo test check lint unit parity resume reliability bench clean

help: ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: $(VENV)/.ready ## create .venv with everything pinned in constraints.txt

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	@touch $@

demo: setup ## extract a corpus from Python's own documentation, pre-train, fine-tune, generate; runs/demo/report.html
	$(BIN)/tencentpretrain demo --output_dir runs/demo

test: setup ## all tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

check: lint unit ## lint, types, architecture laws, unit tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: setup
	$(BIN)/python -m pytest -n $(WORKERS) tests/unit

parity: setup ## recorded numbers of the reference, if ../shared is there
	$(BIN)/python -m pytest -n $(WORKERS) tests/parity

resume: setup ## kill runs of three objectives 20 times each and compare their ends with runs left alone
	$(BIN)/python scripts/kill_test.py --kills 20

reliability: setup ## inject all faults at full counts; prints and records promise and figure
	$(BIN)/python scripts/reliability.py --scale full --record benchmarks/results/reliability.json --page docs/reliability.md

bench: setup ## measure against transformers and tokenizers; nothing else should run; writes benchmarks/results
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/matmul_bound.py
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/preprocessing.py --memory

clean: ## remove caches and build output, never runs
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
