# One door: every way to build, check and run this project. `make` alone prints the list.

PYTHON ?= python3
PIP_ARGS ?=
WORKERS ?= 2
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast check format bench docs clean

help:  ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12 chooses the interpreter (3.11 or newer), WORKERS=4 the test processes."
	@echo "  Without a GPU, PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu' saves"
	@echo "  gigabytes of CUDA libraries."

setup: .venv/.stamp  ## Create .venv and install the pinned packages (again only when pins change)

# torch comes first, alone and pinned: found as a CPU build where pip knows of one, it keeps the
# second step from choosing another
.venv/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fedllm needs Python 3.11 or newer, and '$(PYTHON)' is not." \
	    "Try: make PYTHON=python3.12 setup"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup  ## Fine-tune a tiny model in a federation of 8 clients, into runs/demo
	@if [ -e runs/demo ]; then \
	  n=1; while [ -e runs/demo-$$n ]; do n=$$((n + 1)); done; \
	  mv runs/demo runs/demo-$$n; echo "The earlier run is kept as runs/demo-$$n."; fi
	$(BIN)/fedllm run examples/demo.yaml

test: setup  ## Run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-fast: setup  ## Run the tests that take no more than about two seconds each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

check: setup  ## Check format, lint, types, import layers and spelling; change nothing
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

format: setup  ## Format the code, mend what can be mended, rewrite the generated pages
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/python scripts/docs_reference.py
	$(BIN)/python scripts/docs_algorithms.py

bench: setup  ## Measure speed and memory against PEFT, into benchmarks/out
	$(BIN)/python -m benchmarks

docs: setup  ## Build the documentation into build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## Delete caches and built pages (never runs/, never .venv)
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} +
