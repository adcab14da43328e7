# `make quickstart` and `make test` work in a fresh clone; nothing else is needed first.
# The first that starts: a version manager may have a name for a Python that it does not run.
PYTHON ?= $(shell for name in python3.11 python3.12; do $$name -c '' 2>/dev/null && command -v $$name && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart$(if $(SEED),-seed$(SEED))
SAMPLES ?= .cache/samples
QUICKSTART_FLAGS := $(if $(FULL),--size=full) $(if $(FRESH),--fresh) $(if $(SEED),--seed=$(SEED))
MANIFESTS := setup.cfg pyproject.toml experts/setup.cfg experts/pyproject.toml constraints/py311.txt constraints/py312.txt

.PHONY: help install install-dev page quickstart smoke resume-demo test test-all lint format types docs clean

help:
	@echo "make quickstart   everything on this machine: install, experts, all stages, evaluation, a report"
	@echo "                  FULL=1 the long run (90 minutes on 2 cores), FRESH=1 start over, SEED=1 other training seeds"
	@echo "make test         install and the fast tests"
	@echo "make test-all     adds the slow, multi-process and ahead-of-time tests"
	@echo "make smoke        the quickstart on generated phantoms, two minutes, no downloads"
	@echo "make resume-demo  kills a run of two processes and resumes it on another mesh: the same samples, the same losses"
	@echo "make install      the user's packages; make install-dev adds those of the tests and of vilam3 plan"
	@echo "make lint types   ruff and pyright; make format rewrites"
	@echo "make page         fetches NiiVue for the 3-D view of vilam3 serve's page"
	@echo "make docs         the documentation site, in build/docs; a broken link or a page without an entry fails"

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or 3.12 is needed; set PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

# Both distributions with the versions of the design; torch is pinned, or pip would choose a CUDA build.
PIP_INSTALL = $(BIN)/python -m pip install -q -c constraints/py$$($(BIN)/python -c 'import sys; print("%d%d" % sys.version_info[:2])').txt

# For users. libtpu is not among the packages: without a TPU, JAX would report errors.
$(VENV)/.installed: $(MANIFESTS) | $(BIN)/python
	$(PIP_INSTALL) -e . -e ./experts
	@touch $@

# For the tests and `vilam3 plan`.
$(VENV)/.installed-dev: $(MANIFESTS) | $(BIN)/python
	$(PIP_INSTALL) -e '.[dev]' -e './experts[dev]'
	@touch $@ $(VENV)/.installed

# Pinned by its hash; `page/vendor` is not in git, and in the wheel if it is there.
page: install
	$(BIN)/python -m vilam3_jax.serving.fetch_page

quickstart: install
	$(BIN)/python -m vilam3_jax.quickstart --out $(RUN) --samples $(SAMPLES) $(QUICKSTART_FLAGS)

smoke: install
	$(BIN)/python -m vilam3_jax.quickstart --out runs/smoke --samples .cache/phantoms --size=smoke --fresh

resume-demo: install
	$(BIN)/python examples/resume_demo.py

test: install-dev
	$(BIN)/python -m pytest -m "not slow" -n 2

test-all: install-dev
	$(BIN)/python -m pytest -n 2

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

# -E: every page is read, so that a warning does not disappear in the second build.
docs: install-dev
	$(BIN)/sphinx-build -q -E -W --keep-going docs build/docs
	@echo "build/docs/index.html"

clean:
	rm -rf runs .cache build experts/build *.egg-info experts/*.egg-info
