# Two commands set everything up on a fresh machine: `make run` and `make test`.
.DEFAULT_GOAL := help
.PHONY: help install run panel test soak verify check style docs lab bench bench-gpu calibrate wheel clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := requirements.lock settings.ini setup.py pyproject.toml

help: ## Show this list
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint requirements.lock --upgrade pip

$(VENV)/core.done: $(SOURCES) | $(BIN)/python
	$(PIP) install --quiet --constraint requirements.lock --editable .
	touch $@

$(VENV)/all.done: $(SOURCES) | $(BIN)/python
	$(PIP) install --quiet --constraint requirements.lock --editable '.[dev,market,panel,tracking,study,cluster]'
	touch $@ $(VENV)/core.done

install: $(VENV)/all.done ## Make .venv with everything, from requirements.lock

run: $(VENV)/core.done ## Build the SP500 data and run the study: five budgets, three seeds, two verdicts, one report
	$(BIN)/finpatch data fetch SP500
	$(BIN)/finpatch data build SP500 --tier raw6
	$(BIN)/finpatch study --config sp500_study

$(VENV)/panel.done: $(SOURCES) | $(BIN)/python
	$(PIP) install --quiet --constraint requirements.lock --editable '.[panel]'
	touch $@ $(VENV)/core.done

panel: $(VENV)/panel.done ## Fetch and build twenty stocks of the package skfolio and run the study of them
	$(BIN)/finpatch data fetch --universe skfolio
	$(BIN)/finpatch data build --universe skfolio --tier c12
	$(BIN)/finpatch study --config skfolio_panel

verify: $(VENV)/core.done ## Build what is missing of the embedded data, then verify every file
	@for symbol in SP500 NASDAQ; do \
	  $(BIN)/finpatch data fetch $$symbol && \
	  $(BIN)/finpatch data build $$symbol --tier a20 && \
	  $(BIN)/finpatch data build $$symbol --tier raw6 || exit 1; done
	$(BIN)/finpatch verify

test: $(VENV)/all.done ## Run every notebook once, the tests, and the sync gate
	PATH="$(CURDIR)/$(BIN):$$PATH" bash .ci/test

soak: $(VENV)/all.done ## Run the tests that take long: kills at random moments, memory limits, JupyterLab
	PATH="$(CURDIR)/$(BIN):$$PATH" bash .ci/soak

check: $(VENV)/all.done ## Export, clean, lint, then everything that `test` and `soak` run
	$(BIN)/nbdev_export && $(BIN)/nbdev_clean
	$(BIN)/ruff check nbs tests setup.py finpatch benchmarks
	PATH="$(CURDIR)/$(BIN):$$PATH" bash .ci/test
	PATH="$(CURDIR)/$(BIN):$$PATH" bash .ci/soak

style: $(VENV)/all.done ## Print the house figures of each notebook
	$(BIN)/python .ci/style.py

docs: $(VENV)/all.done ## Build the site into _docs, with Quarto or its stand-in; no network is needed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash .ci/docs/build

$(VENV)/bench.done: $(SOURCES) | $(BIN)/python
	$(PIP) install --quiet --constraint requirements.lock --editable '.[dev,market,panel,tracking,study,cluster,bench]'
	touch $@ $(VENV)/core.done $(VENV)/all.done

bench: $(VENV)/bench.done ## Time this project beside its peers and write benchmarks/RESULTS.md
	$(BIN)/python -m benchmarks

bench-gpu: $(VENV)/bench.done ## Time a training step on the CUDA device of this machine, and name it
	$(BIN)/python -m benchmarks.gpu

calibrate: $(VENV)/all.done ## Train ladders on series whose answer is known and write the page of their verdicts
	$(BIN)/python -m benchmarks.calibrate

lab: $(VENV)/all.done ## Open JupyterLab on the first tutorial
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/tutorials/first_run.ipynb nbs

wheel: $(VENV)/all.done ## Build the wheel into dist
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .

clean: ## Remove the environment and what was built, never data or runs
	rm -rf $(VENV) build dist _docs _proc *.egg-info
