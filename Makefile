# Every target does its own set-up: `make demo` or `make test` from a fresh clone is all there is to do.
# What it makes lies in .venv and runs/; nothing outside this folder is touched. A stamp keeps set-up from being repeated.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
PY := $(VENV)/bin/python
FETTLE := $(VENV)/bin/fettle
RUN_READY := $(VENV)/.ready-run
TEST_READY := $(VENV)/.ready-test
BENCH_READY := $(VENV)/.ready-bench

# The first Python from 3.11 to 3.13 on the PATH; PYTHON=/path/to/python overrides it.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && { command -v $$p; break; }; done)

# Two test processes of one thread each: torch's threads spin when they outnumber the cores. JOBS=4 for more.
JOBS ?= 2
BENCH ?= sft peft dpo grpo generate quantize
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal

.PHONY: help demo demo-short test test-slow bench lint format base clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

demo: $(RUN_READY)  ## tune the embedded model, compare before and after, talk to it (under 5 minutes on 2 cores)
	$(FETTLE) lab demo $(if $(data),data=$(data))

demo-short: $(RUN_READY)  ## the same in about a minute, as CI runs it
	$(FETTLE) lab demo --short $(if $(data),data=$(data))

test: $(TEST_READY)  ## every test but the slow ones; ARGS='-k lora' picks
	$(PYTEST) -m 'not slow' $(ARGS)

test-slow: $(TEST_READY)  ## the slow ones: kills, trajectories, claims
	$(PYTEST) -m slow $(ARGS)

bench: $(BENCH_READY)  ## side by side with peers, about 10 minutes each on a quiet machine; BENCH=peft picks, ARGS='--quick' tries
	for name in $(BENCH); do $(PY) benchmarks/$$name.py $(ARGS); done

lint: $(TEST_READY)  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(TEST_READY)  ## let ruff rewrite what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

base: $(RUN_READY)  ## pretrain the embedded base model again, from nothing
	$(FETTLE) lab base

clean:  ## remove the virtual environment and every cache; runs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

$(PY):
	@test -n "$(PYTHON)" || { echo "fettle needs Python 3.11, 3.12 or 3.13 on the PATH (or make PYTHON=/path/to/python)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUN_READY): pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install --quiet --disable-pip-version-check -e . -c constraints.txt
	@touch $@

$(TEST_READY): pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[test]' -c constraints.txt
	@touch $@ $(RUN_READY)

$(BENCH_READY): pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[bench]' -c constraints.txt
	@touch $@ $(RUN_READY)
