# Every target sets up what it needs: `make demo` in a fresh clone is enough.
# The interpreter and the demo's model can be named: make demo PYTHON=python3.12 MODEL=path/to/checkpoint

PYTHON ?= python3
MODEL ?=

REQUIRED := $(shell sed -n 's/^requires-python = "\(.*\)"/\1/p' pyproject.toml)
INSTALLED := .venv/installed
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadscope
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all check docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED) ## make .venv: quailora in place, with all that its demo, tests and checks need
	@echo 'Installed: $(BIN)/quailora'

demo: $(INSTALLED) ## initialize an adapter for a small real model (or MODEL=path) and measure what it gains
	$(BIN)/python benchmarks/end_to_end/demo.py $(if $(MODEL),'$(MODEL)')

test: $(INSTALLED) ## the quick tests
	$(PYTEST) -m "not slow"

test-all: $(INSTALLED) ## every test, the slow ones too
	$(PYTEST) --ignore tests/kernels/test_compiled.py
	$(PYTEST) --dist worksteal tests/kernels/test_compiled.py  # an hour of single tests, which no process is to have alone

check: $(INSTALLED) docs ## ruff, mypy and the documentation
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(INSTALLED) ## build the documentation into build/site; any warning is an error
	$(BIN)/zensical build --strict

clean: ## remove .venv and everything built
	rm -rf .venv build dist *.egg-info quailora/_C.* .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
	@$(PYTHON) -c 'import re, sys; low, high = [tuple(map(int, v.split("."))) for v in re.findall("[0-9]+[.][0-9]+", "$(REQUIRED)")]; sys.exit(not low <= sys.version_info[:2] < high)' 2>/dev/null \
	  || { echo 'quailora needs Python $(REQUIRED), and $(PYTHON) is not one: make PYTHON=python3.12 ...' >&2; exit 1; }
	@echo 'Installing quailora and its dependencies into .venv (some minutes, the first time)'
	@$(PYTHON) -m venv .venv
	@QUAILORA_EXT=0 $(PIP) --constraint constraints.txt --editable '.[dev]'
	@$(PIP) --no-build-isolation --no-deps --editable .  # the compiled extension, against the torch that is now there
	@touch $@
