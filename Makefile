# make demo: install what is missing and run the experiment of config/config.yaml.

BIN := .venv/bin
INSTALLED := .venv/.installed
PYTHON := $(or $(shell command -v python3.11),$(shell command -v python3))
SUPPORTED := import sys; sys.exit(sys.version_info < (3, 11))
# Steps that want a GPU run one per GPU; where there is none, one per core.
SLOTS := $(or $(filter-out 0,$(shell nvidia-smi --list-gpus 2> /dev/null | wc -l)),$(shell nproc))
REPORT := data/results/report.html

export DVC_NO_ANALYTICS := 1

# Tests run in several processes, each with one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses logical --maxprocesses 8 --dist loadfile

.PHONY: help setup demo benchmark test test-all docs

help: ## show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

setup: $(INSTALLED) ## create .venv and install everything into it, if not done yet

demo: setup ## run the experiment of config/config.yaml and write the report
	$(BIN)/snakemake --cores all --resources gpu=$(SLOTS) --quiet reason host
	@echo "The report is $(REPORT)"

benchmark: setup ## run the demo with three random seeds (three times as long)
	$(BIN)/snakemake --cores all --resources gpu=$(SLOTS) --quiet reason host --configfile config/seeds.yaml
	@echo "The report is $(REPORT)"

test: setup ## check style, workflow, pages and code
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/mkdocs build --strict --quiet --site-dir .venv/site
	$(PYTEST)

test-all: setup ## run all tests, those too that take minutes
	$(PYTEST) -m ""

docs: setup ## write the generated pages, and show all of them on http://127.0.0.1:8000
	$(BIN)/python scripts/tools/config_reference.py
	$(BIN)/python scripts/tools/lab.py
	$(BIN)/mkdocs serve

# torch first: torchvision must find its torch and not bring another.
$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing Python packages into .venv (once; some minutes)"
	@$(PYTHON) -c '$(SUPPORTED)' 2> /dev/null || \
		{ echo "error: this project needs Python 3.11 or later; '$(PYTHON)' is not. Put python3.11 on the PATH, or: make PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
