# `make` lists the targets. Everything runs in .venv, which is made on first use.
PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.stamp
NOTEBOOKS = $(sort $(wildcard notebooks/*.ipynb))
# Two workers of one thread each; one of them at a time takes all tests of a group; long ones come first.
PYTEST = $(PY) -m pytest -n 2 --dist loadgroup --no-loadscope-reorder --nbmake --nbmake-timeout=900
EXECUTE = $(PY) -m nbconvert --log-level=ERROR --execute --ExecutePreprocessor.timeout=900 \
	--ExecutePreprocessor.store_widget_state=False --ExecutePreprocessor.record_timing=False

ROOT_TOO = $(if $(filter 0,$(shell id -u)),--allow-root)  # in a container one often is

.DEFAULT_GOAL := help
.PHONY: help lab test colab quick nightly run notebooks book badges lint format wheel clean

help:  ## this list
	@awk -F ':.*## ' '/^[.a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv: $(STAMP)  ## the environment: exact versions, installed once
$(STAMP): pyproject.toml constraints.txt
	@echo "Installing into .venv; the first time takes minutes."
	@$(PYTHON) -m venv .venv
	@$(PY) -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[lab,test,book]'
	@touch $@

lab: $(STAMP)  ## open the course in JupyterLab
	@echo "Open 00_forget_an_apple_in_a_minute.ipynb first"
	$(PY) -m jupyter lab notebooks $(ROOT_TOO)

test: $(STAMP)  ## all tests, and every notebook executed from top to bottom
	$(PYTEST) notebooks tests

colab: $(STAMP) .colab/.stamp  ## small copies of some notebooks, with the packages that Colab brings
	DUGE_COLAB=$(CURDIR)/.colab $(PYTEST) tests/test_colab.py

.colab/.stamp: constraints-colab.txt $(STAMP)
	@rm -rf .colab
	@$(PY) -m pip install -qq --disable-pip-version-check --no-deps --target .colab -r constraints-colab.txt
	@touch $@

quick: $(STAMP)  ## the fast tests only: a minute
	$(PYTEST) tests -m "not slow and not nightly"

nightly: $(STAMP)  ## what takes too long for every change: all sizes, all moments
	$(PYTEST) tests -m nightly

run: $(STAMP)  ## execute every notebook into a web page in build/
	$(EXECUTE) --to html --output-dir build $(NOTEBOOKS)

notebooks: $(STAMP)  ## execute every notebook in place, to refresh the outputs we commit
	$(EXECUTE) --to notebook --inplace $(NOTEBOOKS)
	@$(PY) tools/notebooks.py $(NOTEBOOKS)

badges: $(STAMP)  ## stamp the repository's address (pyproject.toml) into the notebooks' setup cells
	@$(PY) tools/badges.py

book: $(STAMP)  ## the course as web pages in build/book/, from the notebooks as committed
	@$(PY) -m sphinx -q -c docs -d build/.doctrees . build/book
	@du -sh build/book build/book/docs/live docs/explorables
	@echo "Open build/book/index.html"

lint: $(STAMP)  ## style and formatting
	@$(PY) -m ruff check --quiet
	@$(PY) -m ruff format --check --quiet

format: $(STAMP)  ## let ruff repair what it can
	@$(PY) -m ruff check --fix
	@$(PY) -m ruff format

wheel: $(STAMP)  ## build dist/duge_lite-*.whl, data included
	@rm -rf dist
	@$(PY) -m hatchling build -t wheel

clean:  ## remove what was built (not .venv)
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find . -name .venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -print | xargs rm -rf
