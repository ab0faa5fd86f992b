# make demo   the main job on real weights and photographs: the experiments of the paper, report in out/embedded
# make test   the whole test suite
# Both set up everything they need in .venv, from pinned versions.

PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint clean

# MODEL: a converted model, a checkpoint file or folder, or a hub id. IMAGES: a folder. OUT: where the report goes.
demo: .venv/demo
	.venv/bin/python -m experiments run --overwrite --out "$(or $(OUT),out/embedded)" \
		$(if $(MODEL),--models "$(MODEL)",--preset embedded) $(if $(IMAGES),--images "$(IMAGES)")

# ARGS: more arguments of pytest, such as ARGS="-k positions".
test: .venv/test
	.venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(ARGS)

lint: .venv/test
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed, and not found"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing into .venv .."
	$(PIP) --editable '.[experiments]'
	@touch $@

.venv/test: .venv/demo
	@echo "installing PyTorch and the tests' packages into .venv (several GB) .."
	$(PIP) --editable '.[tests,lint]'
	@touch $@

clean:
	rm -rf .venv .venv-newest .data out
