# Every target but `clean` first makes .venv with what it needs; the second time that costs nothing.

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1	/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(INSTALLED)  ## learn handwritten digits and draw them: minutes, then look into out/demo
	$(VENV)/bin/unitok-hf demo

test: $(INSTALLED)  ## run the tests, without the slow ones
	$(VENV)/bin/python -m pytest

test-slow: $(INSTALLED)  ## run the slow tests, some of which need the network
	$(VENV)/bin/python -m pytest -m slow

conformance: $(VENV)/.conformance  ## run transformers' own tests of models on ours; fetches them the first time
	RUN_SLOW=1 PYTHONPATH=tests/conformance $(VENV)/bin/python -m pytest -p upstream -m '' tests/conformance/conformance_*.py

fuzz: $(INSTALLED)  ## run the fuzz tests with ten thousand cases each
	HYPOTHESIS_PROFILE=thorough $(VENV)/bin/python -m pytest tests/reliability/test_fuzz_*.py

test-lowest:  ## run the tests with the lowest versions that setup.py admits, in .venv-lowest
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -c constraints-lowest.txt -e '.[test]'
	.venv-lowest/bin/python -m pytest

lint: $(INSTALLED)  ## check style and format
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

clean:  ## remove .venv, builds and caches; out/ stays
	rm -rf $(VENV) .venv-lowest build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[test]'
	touch $@

$(VENV)/.conformance: $(INSTALLED)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[conformance]'
	touch $@

.PHONY: help demo test test-slow fuzz test-lowest conformance lint clean
