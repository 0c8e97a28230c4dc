# Everything a checkout needs, each by one word: `make help`.
# PYTHON=python3.12 picks the interpreter, VENV=folder the environment's place.

VENV ?= .venv
PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11,\
	$(shell $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))
PIP := $(VENV)/bin/python -m pip
READY := $(VENV)/.installed
CHECKED := llmrecipes custom_datasets benchmarks

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help environment quickstart test soak lint format lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

environment: $(READY) ## make the virtual environment and install the project into it

quickstart: $(READY) ## fine-tune a small model on arithmetic and compare it with its base; 12 minutes on 2 cores
	PYTHON=$(abspath $(VENV))/bin/python recipes/quickstart.sh

test: $(READY) ## run the tests; no network, no GPU needed
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive $(VENV)/bin/python -m pytest

soak: $(READY) ## random kills, full disks and spoiled checkpoints by the hundred; 15 minutes (SOAK=0.1: a tenth)
	HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive $(VENV)/bin/python -m pytest -m soak

lint: $(READY) ## ruff and mypy
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy $(CHECKED)

format: $(READY) ## let ruff put the code in order
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

# What PyPI's PyTorch for Linux needs of CUDA stands apart, so that a CPU build can do without.
lock: $(READY) ## write the hashes of what constraints.txt pins into requirements.lock and requirements-cuda.lock
	$(PIP) install -q uv
	$(VENV)/bin/uv pip compile -q --universal --generate-hashes --no-annotate --custom-compile-command 'make lock' \
		--python-version 3.11 --extra dev -c constraints.txt setup.cfg -o $(VENV)/locked.txt
	awk '/^[^ ]/ { cuda = /^(cuda|nvidia)-/ } { print > (cuda ? "requirements-cuda.lock" : "requirements.lock") }' \
		$(VENV)/locked.txt

clean: ## remove what building, testing and linting left; keeps the environment, data, models and outputs
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# Stamps: pip is called again only when what it reads has changed.
$(READY): $(VENV)/.torch setup.cfg pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

# By itself and first: it is nine tenths of the download, and a change of setup.cfg does not touch it.
$(VENV)/.torch: constraints.txt | $(VENV)/bin/pip
	$(PIP) install -c constraints.txt torch
	@touch $@

$(VENV)/bin/pip:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed; name it: make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: $(PYTHON) is no Python 3.11 or newer"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "error: Python's venv module is missing (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
