# make demo   the main job on real weights and photographs: the experiments of the paper, report in out/embedded
# make test   every law, each at the sizes that show it; make test-all also at more sizes and depths (marker `long`)
# make docs   the documentation, its notebooks executed: out/docs/index.html
# All set up everything they need in .venv, from pinned versions.

PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-all lint docs docs-data clean

# MODEL: a converted model, a checkpoint file or folder, or a hub id. IMAGES: a folder. OUT: where the report goes.
demo: .venv/demo
	.venv/bin/python -m experiments run --overwrite --out "$(or $(OUT),out/embedded)" \
		$(if $(MODEL),--models "$(MODEL)",--preset embedded) $(if $(IMAGES),--images "$(IMAGES)")

# ARGS: more arguments of pytest, such as ARGS="-k positions". A file's tests run in one process, so that they share what
# they compile; tests/conftest.py puts the files that take longest first.
# Few malloc arenas: XLA's and PyTorch's threads would each keep memory of their own. And what is freed goes back to the
# system: by itself glibc comes to keep pieces of up to 32 MB.
PYTEST = MALLOC_ARENA_MAX=2 MALLOC_MMAP_THRESHOLD_=262144 MALLOC_TRIM_THRESHOLD_=262144 .venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: .venv/test
	$(PYTEST) -m "not long" $(ARGS)

test-all: .venv/test
	$(PYTEST) $(ARGS)

lint: .venv/test
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright

docs: .venv/docs
	.venv/bin/python -m sphinx --builder html --fail-on-warning --keep-going --quiet docs out/docs
	@echo "wrote out/docs/index.html"

# The figures of docs/experiments, made anew by the demo.
docs-data: .venv/docs
	.venv/bin/python -m experiments run --overwrite --out out/docs-data --preset embedded
	.venv/bin/python docs/figures.py out/docs-data

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed, and not found"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing into .venv .."
	$(PIP) --editable '.[experiments,features]'
	@touch $@

.venv/test: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing PyTorch and the tests' packages into .venv (several GB) .."
	$(PIP) --editable '.[tests,lint]'
	@touch .venv/demo $@  # what the demo needs is among it

.venv/docs: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing Sphinx into .venv .."
	$(PIP) --editable '.[docs]'
	@touch $@

clean:
	rm -rf .venv .venv-newest .data out docs/generated docs/notebooks/.data
