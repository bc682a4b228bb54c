# make demo and make test do all the set-up on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
DEMO := build/demo
JOBS ?= 2
NAMES ?= "grapes,hot dog,green apple,teapot"

.PHONY: help setup demo test lint bench docs clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: .venv/.done ## create .venv with everything that tests, linters and the demo need

.venv/.done: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

demo: setup ## five methods on drawings in a style the packaged CLIP never saw: table, page, and a picture to ask about
	$(BIN)/maple sweep demo --output $(DEMO)/runs --jobs $(JOBS)
	$(BIN)/maple report $(DEMO)/runs --output $(DEMO)/report.html
	$(BIN)/maple data draw emoji-food/lineart --count 1 --output $(DEMO)/pictures
	$(BIN)/maple predict $(DEMO)/runs/*_maple_*_seed1_* $(DEMO)/pictures --zero-shot --classes $(NAMES) --ask

test: setup ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: setup ## ruff, mypy --strict and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup ## training and evaluation at ViT-B/16 size, ours against the reference's way, in one process
	$(BIN)/python -m benchmarks.floors --output build/benchmarks

docs: setup ## the documentation, as a site in site/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	$(BIN)/mkdocs build --strict

clean: ## remove what make has built
	rm -rf .venv build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
