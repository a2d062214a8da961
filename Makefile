# `make bench` and `make test` set up all they need, once.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: bench test integrations lint types docs-check clean

bench: $(READY)
	$(BIN)/python bench.py

test: $(READY)
	$(BIN)/python -m pytest -q

# Backends inside other people's libraries, which are large and not installed for the rest.
integrations: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[transformers]'
	$(BIN)/python -m pytest -q tests/train/test_transformers.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	mkdir -p .venv/import && ln -sfn ../.. .venv/import/flash2  # the import name, where a type checker looks
	$(BIN)/pyright

# Generated pages and tables are what the results files say.
docs-check: $(READY)
	$(BIN)/python bench.py report --check $$(find docs/results -name '*.jsonl' | sort) --into README.md --into docs/reproducibility.md --into docs/training.md

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is %d.%d" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[triton,numba,plots,dev]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info
