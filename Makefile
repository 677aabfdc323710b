# The two commands of the README: `make demo` and `make test`. Both need Python 3.11 or newer and pip, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := python -m pytest --numprocesses 2 --dist worksteal

OLDEST := .venv-oldest

.PHONY: demo test test-full test-oldest cover study models lint bench clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python demo/demo.py

test: $(VENV)/.installed lint
	$(BIN)/$(PYTEST) -m 'not full' --durations 20

test-full: $(VENV)/.installed
	$(BIN)/$(PYTEST) -m full

# Apart from `make test`, because it makes the tests slower.
cover: $(VENV)/.installed
	$(BIN)/$(PYTEST) -m 'not full' --cov --cov-report term:skip-covered

# The same tests on the oldest versions. The index's torch of that age brings CUDA along, about 3 GB; where that is too
# much, name an index of CPU builds in PIP_EXTRA_INDEX_URL and write torch==2.11.0+cpu in constraints-oldest.txt.
$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[dev]'
	touch $@

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/$(PYTEST) -m 'not full'

# The report of the paper's study, from its committed records.
study: $(VENV)/.installed
	$(BIN)/python -m study

models: $(VENV)/.installed
	$(BIN)/python -m tests.models

lint: $(VENV)/.installed
	$(BIN)/ruff check src study tests demo examples benchmarks
	$(BIN)/ruff format --check src study tests demo examples benchmarks
	$(BIN)/mypy

# About half an hour; for a GPU too, where there is one. One script with other flags: python -m benchmarks.step --help
bench: $(VENV)/.installed
	for name in startup dropout attention step; do \
	  $(BIN)/python -m benchmarks.$$name --out benchmarks/results/$$(date +%F)/$$name.json || exit 1; \
	done

clean:
	rm -rf $(VENV) $(OLDEST) .mypy_cache .ruff_cache .pytest_cache demo/out
