# Two commands do everything, their own set-up included: make demo, make test.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo demo-seeds test test-all bench lint clean

# Each command is echoed as it runs, so what make does can be repeated by hand.
demo: $(STAMP)
	$(BIN)/python -m amvl_fast.demo prepare runs/easy_vqa
	$(BIN)/amvl-fast train configs/easy_vqa/base.yaml
	$(BIN)/amvl-fast train configs/easy_vqa/plain.yaml
	$(BIN)/amvl-fast train configs/easy_vqa/amvl.yaml
	$(BIN)/amvl-fast evaluate runs/easy_vqa/plain
	$(BIN)/amvl-fast evaluate runs/easy_vqa/amvl --baseline runs/easy_vqa/plain

# What one seed cannot tell: the demo's comparison over three. Needs the demo's base; takes about an hour.
SEEDS := 0 1 2
demo-seeds: $(STAMP)
	for seed in $(SEEDS); do for name in plain ntp amvl; do \
	  run=runs/easy_vqa/seeds/$$name-$$seed; \
	  $(BIN)/amvl-fast train configs/easy_vqa/$$name.yaml training.seed=$$seed training.output_dir=$$run && \
	  $(BIN)/amvl-fast evaluate $$run || exit 1; \
	done; done
	$(BIN)/python -m amvl_fast.demo table runs/easy_vqa/seeds

test: $(STAMP)
	$(BIN)/python -m pytest

# The slow tests too.
test-all: $(STAMP)
	$(BIN)/python -m pytest -m ""

# Speed, as ratios within one run: a table, files and plots.
bench: $(STAMP)
	$(BIN)/amvl-fast bench

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Runs again when the package's metadata, the tested versions or the C++ kernels change.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)
	@command -v $(PYTHON) >/dev/null || { \
	  echo "amvl-fast: there is no $(PYTHON) here; install Python 3.10 to 3.13 or run make PYTHON=/path/to/python3." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "amvl-fast: $(PYTHON) is $$($(PYTHON) --version 2>&1), but 3.10 to 3.13 is needed: run make PYTHON=python3.12, for example." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "amvl-fast: $(PYTHON) cannot make virtual environments: run sudo apt install python3-venv, then make again." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

# Leaves runs/ and data/ alone: they may have cost hours.
clean:
	rm -rf $(VENV) build dist kernels/cpu/*.so *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find amvl_fast kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
