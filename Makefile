# make demo, make test and make docs do all the set-up on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
DEMO := build/demo
JOBS ?= 2
NAMES ?= "brush,broom,pen,teapot"

# Processes keep what they compile: the tests start hundreds of them, and PyTorch's modules take seconds to compile.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test lint bench docs clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: .venv/.done ## create .venv with everything that tests, linters and the demo need

.venv/.done: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '.[test]'
	touch $@

demo: setup ## five methods on drawings in a style that is new to the packaged CLIP: table, page, predictions
	$(BIN)/maple sweep demo --output $(DEMO)/runs --jobs $(JOBS)
	$(BIN)/maple report $(DEMO)/runs --output $(DEMO)/report.html
	$(BIN)/maple data draw icons-objects/neon --count 1 --output $(DEMO)/images
	$(BIN)/maple predict $(DEMO)/runs/*_maple_*_seed1_* $(DEMO)/images --zero-shot --classes $(NAMES) --ask

test: setup ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal

lint: setup ## ruff, mypy --strict and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup ## training and evaluation at ViT-B/16 size, maple-clip against the way of the reference code
	$(BIN)/python -m benchmarks.floors --output build/benchmarks

docs: .venv/.docs ## the documentation, as a site in build/site
	$(BIN)/python scripts/build_docs.py

.venv/.docs: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

clean: ## remove everything that make has created
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
