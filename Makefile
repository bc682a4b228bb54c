# make demo and make test do all the set-up on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
DEMO := build/demo

.PHONY: help setup demo test lint bench docs clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: .venv/.done ## create .venv with everything that tests, linters and the demo need

.venv/.done: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

demo: setup ## train and evaluate MaPLe and zero-shot CLIP on a small folder of drawings
	$(BIN)/python scripts/draw_shapes.py $(DEMO)/shapes
	for method in zero_shot maple; do \
	  $(BIN)/maple train --method $$method --dataset $(DEMO)/shapes --backbone maple-tiny --pretrained random --shots 16 \
	    $$(test $$method = maple && echo --set method.prompt_depth=4 --set train.epochs=20) --output $(DEMO)/runs/$$method && \
	  $(BIN)/maple evaluate $(DEMO)/runs/$$method || exit 1; \
	done

test: setup ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: setup ## ruff, mypy --strict and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup ## a MaPLe training step and an evaluation, ours against the reference's way, in one process
	$(BIN)/python -m benchmarks.step --output build/benchmarks

docs: setup ## the documentation, as a site in site/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	$(BIN)/mkdocs build --strict

clean: ## remove what make has built
	rm -rf .venv build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
