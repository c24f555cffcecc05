# `make run` and `make test` are complete on a machine that has only Python 3.11+, make and a package index.
# TORCH_INDEX: an optional index for torch, for example that of PyTorch's CPU builds (the default build brings CUDA on Linux).
PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin

.PHONY: install run test test-slow check docs clean

install: .venv/installed

.venv/installed: requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	$(BIN)/delib models pull
	touch $@

run: install
	$(BIN)/delib run

test: install
	$(BIN)/python -m pytest

test-slow: install
	$(BIN)/python -m pytest -m slow

check: install
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

# The site of docs/, in site/; it has an environment of its own, for it needs nothing of delib.
docs: .venv-docs/installed
	.venv-docs/bin/mkdocs build --strict

.venv-docs/installed: requirements-docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet -r requirements-docs.txt
	touch $@

clean:
	rm -rf .venv .venv-docs site
