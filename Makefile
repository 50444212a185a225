# Each target does all of its set-up in $(VENV); `make VENV=path` takes another place, `make PYTHON=python3.12` another Python.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test lint types check build clean

quickstart: $(VENV)/.train
	test -d data/digits || $(BIN)/dreal-timm data digits data/digits
	$(BIN)/dreal-timm train quickstart

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4

lint: $(VENV)/.dev
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

check: lint types test

build: $(VENV)/.dev
	$(BIN)/python -m build

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install -q -e ".[train]"
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install -q -e ".[dev]"
	touch $@ $(VENV)/.train

clean:
	rm -rf $(VENV) build dist *.egg-info
