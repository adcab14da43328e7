# `make quickstart` and `make test` work in a fresh clone; nothing else is needed first.
# The first that starts: a version manager may have a name for a Python that it does not run.
PYTHON ?= $(shell for name in python3.11 python3.12; do $$name -c '' 2>/dev/null && command -v $$name && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
SAMPLES ?= .cache/samples
QUICKSTART_FLAGS := $(if $(FULL),--size=full) $(if $(FRESH),--fresh)

.PHONY: help install quickstart smoke test test-all lint format types clean

help:
	@echo "make quickstart   everything on this machine: install, experts, all stages, evaluation, a report"
	@echo "                  FULL=1 the long run (90 minutes on 2 cores), FRESH=1 start over"
	@echo "make test         install and the fast tests"
	@echo "make test-all     adds the slow, multi-process and ahead-of-time tests"
	@echo "make smoke        the quickstart on generated phantoms, two minutes, no downloads"
	@echo "make lint types   ruff and pyright; make format rewrites"

install: $(VENV)/.installed

# Both distributions with the versions of the design; torch is pinned, or pip would choose a CUDA build.
$(VENV)/.installed: setup.cfg pyproject.toml experts/setup.cfg experts/pyproject.toml constraints/py311.txt constraints/py312.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or 3.12 is needed; set PYTHON=/path/to/python3.11"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints/py$$($(BIN)/python -c 'import sys; print("%d%d" % sys.version_info[:2])').txt \
		-e '.[dev]' -e './experts[dev]'
	@touch $@

quickstart: install
	$(BIN)/python -m vilam3_jax.quickstart --out $(RUN) --samples $(SAMPLES) $(QUICKSTART_FLAGS)

smoke: install
	$(BIN)/python -m vilam3_jax.quickstart --out runs/smoke --samples .cache/phantoms --size=smoke --fresh

test: install
	$(BIN)/python -m pytest -m "not slow" -n 2

test-all: install
	$(BIN)/python -m pytest -n 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf runs .cache build experts/build *.egg-info experts/*.egg-info
