# `make bench` and `make test` set up all they need, once.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# What pyproject.toml allows, each in an environment that shares all but Triton with .venv.
TRITONS := 3.6.0 3.7.1 3.8.0 3.9.0

.PHONY: bench test integrations lint types docs-check gluon-versions clean
.PRECIOUS: .venv-triton-%/.ready

bench: $(READY)
	$(BIN)/python bench.py

# One process a core, of one thread each: tests of small tensors gain nothing from a second.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

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
	$(BIN)/python bench.py report --check $$(find docs/results -name '*.jsonl' | sort) --into README.md --into docs/reproducibility.md --into docs/training.md --into docs/kernels-in-python.md --into docs/performance.md

# Every Gluon kernel for sm_90 by every Triton, no GPU needed; TRITONS="3.9.0" for one of them.
gluon-versions: $(TRITONS:%=gluon-triton-%)

gluon-triton-%: .venv-triton-%/.ready
	TRITON_CACHE_DIR=.venv-triton-$*/cache .venv-triton-$*/bin/python -m pytest -q -n auto tests/compile/test_gluon_versions.py --every-kernel

.venv-triton-%/.ready: $(READY)
	$(BIN)/python -m venv --clear --without-pip .venv-triton-$*
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" > $$(echo .venv-triton-$*/lib/python3*/site-packages)/shared.pth
	$(BIN)/python -m pip --python .venv-triton-$*/bin/python install --quiet --no-deps --ignore-installed triton==$*
	@touch $@

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is %d.%d" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[triton,numba,plots,dev]'
	@touch $@

clean:
	rm -rf .venv .venv-triton-* build dist *.egg-info
