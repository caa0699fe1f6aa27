# Two commands for a fresh machine: `make run` shows the bench at work, `make test` checks everything.
# Both make a virtual environment in .venv first; another Python: make run PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# Pinned and installed first, because the newest torch may bring CUDA packages of several GB.
TORCH := torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help run test quick suite lint docs install clean

help:
	@echo "make run      install, then: pqk run B1 --backend openvino"
	@echo "make test     install, then: lint and the whole test suite"
	@echo "make quick    install, then: lint and the tests without whole runs, engines and trainings"
	@echo "make lint     install, then: ruff, mypy and import-linter"
	@echo "make docs     install, then: the documentation site, in site/"
	@echo "make install  make $(VENV) and install pqk with both toolchains and the development tools"
	@echo "make clean    delete $(VENV) and caches; results in logs/, outputs/ and reports/ stay"

# Exit code 1 means that a threshold failed, 4 that the measurement does not tell: results, shown in the table.
run: $(STAMP)
	@$(BIN)/pqk run B1 --backend openvino || { code=$$?; \
	  case $$code in 1) echo "a threshold failed, see the verdict above";; \
	  4) echo "undecided, see the verdict above";; *) exit $$code;; esac; }
	@[ ! -f reports/B1.html ] || echo "the report: reports/B1.html (open it in a browser)"

# The checks of `lint` take one core, so the tests begin beside them.
test: $(STAMP)
	@$(MAKE) --no-print-directory -j 2 lint suite

quick: $(STAMP)
	@$(MAKE) --no-print-directory -j 2 lint suite CHOSEN='-m "not whole and not slow" --ignore tests/backends --ignore tests/compress'

suite: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(CHOSEN)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)
	$(BIN)/python scripts/build_site.py

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"pqk needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}; give another with PYTHON=")'
	@echo "installing into $(VENV): a few minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[openvino,inc,trt,study,eth3d,detr,frame,mlflow,docs,ray,slurm,dev]"
	@touch $@

clean:
	rm -rf $(VENV) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find pqk backends tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
