# setup: .venv with everything and the native core.  serve, test, check and bench call it first.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8000
MODEL ?=

.PHONY: setup serve test check bench docs clean

setup: $(VENV)/.installed

# torch first and by version: a plain requirement would pull the CUDA build, several gigabytes.
$(VENV)/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml CMakeLists.txt $(wildcard csrc/* csrc/*/*)
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

serve: setup
	$(BIN)/penstock serve $(MODEL) --port $(PORT)

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_budgets.py
	$(BIN)/python tools/generate_docs.py --check

docs: setup
	$(BIN)/python tools/generate_docs.py

bench: setup
	$(BIN)/python benchmarks/run.py --short

clean:
	rm -rf build $(VENV)
