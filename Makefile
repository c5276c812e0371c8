# Aliases; the work is done by robeval/bootstrap.py and by the tools in .venv.
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format types build bench clean

help:
	@echo "make demo    set up .venv, then train, attack, certify and verify two models on real digits"
	@echo "make test    set up .venv, then run the whole test suite"
	@echo "make setup   set up .venv only"
	@echo "make lint    ruff: rules and format"
	@echo "make format  ruff: apply fixes and format"
	@echo "make types   mypy"
	@echo "make build   source archive and wheel in dist/"
	@echo "make bench   run every script in benchmarks/ (minutes)"
	@echo "make clean   remove builds and caches; .venv and runs/ stay"

setup demo test:
	@python3 -m robeval.bootstrap $@

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: setup
	$(BIN)/mypy

build: setup
	rm -rf dist
	$(BIN)/python -m build

bench: setup
	@set -e; for script in $$(grep -l __main__ benchmarks/*.py); do \
	    name=benchmarks.$$(basename $$script .py); echo "== $$name"; $(BIN)/python -m $$name; done

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
