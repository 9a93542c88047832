# Two commands do everything on a machine with Python 3.11+ and git: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Waiting OpenMP threads that spin slow a busy small machine down tenfold and more.
export OMP_WAIT_POLICY ?= passive
export GOMP_SPINCOUNT ?= 0
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: demo test lint format slow show-slice show-hillinfer show-replay show-model train clean

demo: $(VENV)/.ready
	$(BIN)/hillinfer demo

test: $(VENV)/.ready
	$(BIN)/pytest

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

slow: $(VENV)/.ready ## the sweeps that `make test` leaves out
	$(BIN)/pytest -m slow

show-slice: $(VENV)/.ready ## every claim about the package's core, measured again
	$(BIN)/python -m benchmarks.show_slice

show-model: $(VENV)/.ready ## every claim about the embedded model; LONGEVAL=FILE for LongEval's cases
	$(BIN)/python -m benchmarks.show_model

train: $(VENV)/.ready ## the embedded model from nothing: hours on two cores
	$(BIN)/python data/train.py --workers 2

show-hillinfer: $(VENV)/.ready ## every claim about the hillinfer system
	$(BIN)/python -m benchmarks.show_hillinfer

show-replay: $(VENV)/.ready ## every claim about profiles, replay and sweeps; ROUNDS=n for more rounds of measuring
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,cluster]'
	$(BIN)/python -m benchmarks.show_replay

clean:
	rm -rf out .pytest_cache .ruff_cache .hypothesis

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hillinfer needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@
