.PHONY: help demo test test-all check format clean
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

help:  ## show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(READY)  ## dense against sparse training on scikit-learn's digits, a minute or two
	$(BIN)/lightning-ast demo

test: $(READY)  ## the test suite, without what is marked slow
	$(BIN)/python -m pytest

test-all: $(READY)  ## every test
	$(BIN)/python -m pytest -m ""

check: $(READY)  ## lint, format, types, README against its records
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python benchmarks/summarize.py --check

format: $(READY)  ## rewrite files in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment and caches
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
