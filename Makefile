# make setup | test | test-all | lint | format | docs | demo | wheel | clean. `setup` runs by itself, once, until pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := demo

.PHONY: setup test test-all lint format docs demo wheel clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$($(PYTHON) --version) found, 3.11 or newer needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

# The long tests one at a time: some measure.
test-all: test
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The reference of all public functions, from their docstrings: site/index.html. Warnings and dead links are errors.
docs: $(STAMP)
	$(BIN)/python docs/reference.py site

wheel: $(STAMP)
	$(BIN)/python -m build --wheel

# The main job on a synthetic set: about 3 minutes on two CPU cores.
demo: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" sh tools/demo.sh $(DEMO)

clean:
	rm -rf $(DEMO) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
