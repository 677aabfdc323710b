# The two commands of the README: `make demo` and `make test`. Both need Python 3.11 or newer and pip, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-full models lint clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python demo/demo.py

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest --numprocesses 2 -m 'not full' --cov --cov-report term:skip-covered

test-full: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses 2 -m full

models: $(VENV)/.installed
	$(BIN)/python -m tests.models

lint: $(VENV)/.installed
	$(BIN)/ruff check src tests demo
	$(BIN)/ruff format --check src tests demo
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache demo/out
