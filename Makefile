# make setup | test | test-all | lint | format | docs | demo | wheel | clean. What a target needs is installed into .venv by itself, once, until
# pyproject.toml or constraints.txt change: for demo the commands alone, for the others all that `make setup` installs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime
DEVELOPMENT := $(VENV)/.development
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
DEMO := demo
# PyTorch's default wheels bring 5 GB of CUDA's libraries. Where no NVIDIA driver is visible, those for the CPU are installed: TORCH=cpu or cuda chooses.
TORCH := $(or $(TORCH),$(shell if test -e /proc/driver/nvidia/version || command -v nvidia-smi >/dev/null; then echo cuda; else echo cpu; fi))
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: setup test test-all lint format docs demo wheel clean

setup: $(DEVELOPMENT)

$(RUNTIME): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$($(PYTHON) --version) found, 3.11 or newer needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@case "$(TORCH)" in cpu | cuda) ;; *) echo "error: TORCH=$(TORCH): expected cpu or cuda" >&2; exit 1 ;; esac
	$(PYTHON) -m venv $(VENV)
	@test "$(TORCH)" = cuda || { echo "PyTorch for the CPU, from $(TORCH_CPU_INDEX) (with an NVIDIA driver, or TORCH=cuda: for CUDA)"; \
		$(PIP) -qqq --retries 1 --timeout 15 --no-deps --index-url "$(TORCH_CPU_INDEX)" torch 2>/dev/null \
		|| echo "no PyTorch for the CPU found there: pip's usual one, which may bring CUDA's libraries"; }
	$(PIP) --editable .
	@touch $@

$(DEVELOPMENT): $(RUNTIME)
	$(PIP) --editable '.[dev]'
	@touch $@

test: $(DEVELOPMENT)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8

# The long tests one at a time: some measure.
test-all: test
	$(BIN)/python -m pytest -m slow

lint: $(DEVELOPMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

format: $(DEVELOPMENT)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The reference of all public functions, from their docstrings: site/index.html. Warnings and dead links are errors.
docs: $(DEVELOPMENT)
	$(BIN)/python docs/reference.py site

wheel: $(DEVELOPMENT)
	$(BIN)/python -m build --wheel

# The main job on a synthetic set: about 3 minutes on two CPU cores.
demo: $(RUNTIME)
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh tools/demo.sh "$(DEMO)"

# Not the folder of the demo: what is in it may be a user's own.
clean:
	rm -rf site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
