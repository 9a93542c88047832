# Two commands do everything on a machine with Python 3.11+ and git: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export DRIVE ?= out
# Waiting OpenMP threads that spin slow a busy small machine down tenfold and more.
export OMP_WAIT_POLICY ?= passive
export GOMP_SPINCOUNT ?= 0
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1
# A module is compiled when it is first imported: all of site-packages take six times as long as what is used of it.
export PYTHONDONTWRITEBYTECODE :=

EXTRAS = dev,lab
PIP = $(BIN)/pip install -q --no-compile -c constraints.txt

.PHONY: demo install test smoke size golden lint format slow show-slice show-hillinfer show-model show-fpga train clean show-longbench show-systems lab browser notebooks gallery api show-workbench show-replay audit fuzz sanitize soak show-trust faults show-real show-exact show-store show-selection show-gpu show-speed show-package nvme bench trees families pretrained

demo: $(VENV)/.ready ## offline, in seconds; MODEL=FOLDER_OR_HUB_ID asks a real model, in minutes
	$(BIN)/hillinfer demo $(if $(MODEL),--model $(MODEL))

test: smoke ## JOBS=n for more processes, each with one thread for torch
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(or $(JOBS),2) --dist loadgroup --no-loadscope-reorder \
		-m 'not smoke and not slow and not browser'

install: $(VENV)/.longbench ## all that the tests use

smoke: $(VENV)/.longbench ## every part once, in seconds
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(or $(JOBS),2) -m smoke

size: $(VENV)/.ready ## raw and code lines, by folder and module
	$(BIN)/python -m benchmarks.size

golden: $(VENV)/.ready ## tokens, hits and bytes of every system and tier against the record; WRITE=--write replaces it
	$(BIN)/python -m tests.golden $(WRITE)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

slow: $(VENV)/.longbench ## the sweeps that `make test` leaves out
	$(BIN)/pytest -m slow

show-slice: $(VENV)/.ready ## every claim about the package's core, measured again
	$(BIN)/python -m benchmarks.show_slice

show-model: $(VENV)/.ready ## every claim about the embedded model; LONGEVAL=FILE for LongEval's cases, AGAIN=FOLDER for a model trained again
	$(BIN)/python -m benchmarks.show_model

train: $(VENV)/.ready ## the embedded model from nothing: hours on two cores
	$(BIN)/python data/train.py --workers 2

show-hillinfer: $(VENV)/.ready ## every claim about the hillinfer system
	$(BIN)/python -m benchmarks.show_hillinfer

show-fpga: $(VENV)/.ready ## every claim about the SmartSSD's kernel and its host path; half an hour
	$(MAKE) -C fpga tools
	$(BIN)/python -m benchmarks.show_fpga

show-longbench: $(VENV)/.longbench ## every claim about the accuracy benchmark; ROWS=FOLDER for real rows
	$(BIN)/python -m benchmarks.show_longbench

show-systems: $(VENV)/.ready ## every claim about the other systems; N=50 for more questions
	$(BIN)/python -m benchmarks.show_systems

lab: $(VENV)/.ready ## JupyterLab on the first notebook
	$(BIN)/hillinfer lab

browser: $(VENV)/.browser ## dashboard and accuracy board in JupyterLab and Chromium; screenshots in out/browser
	$(BIN)/pytest -m browser tests/browser

notebooks: $(VENV)/.ready ## the .ipynb files from their sources
	$(BIN)/python notebooks/sync.py

gallery: $(VENV)/.browser ## docs/gallery: the notebooks with their outputs
	$(BIN)/python notebooks/gallery.py

api: $(VENV)/.ready ## docs/api.md from the docstrings
	$(BIN)/python docs/make_api.py

show-workbench: $(VENV)/.browser ## every claim about the workbench, measured again
	$(BIN)/python -m benchmarks.show_workbench

show-replay: $(VENV)/.ready ## every claim about profiles, replay and sweeps; ROUNDS=n for more rounds of measuring
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,cluster]'
	$(BIN)/python -m benchmarks.show_replay

audit: $(VENV)/.ready ## known weaknesses of the installed packages; needs the network
	$(BIN)/pip install -q -c constraints.txt -e '.[audit]'
	$(BIN)/python -m benchmarks.audit

fuzz: $(VENV)/.ready ## random calls at every cache, and a million broken inputs for all that is parsed; SEQUENCES, CASES=n for fewer
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.fuzz_cache --sequences $(or $(SEQUENCES),3000)
	$(BIN)/python -m benchmarks.fuzz --cases $(or $(CASES),1000000)

sanitize: $(VENV)/.ready ## kernels with AddressSanitizer and UBSan under the tests that reach them; TESTS=... for others
	HILLINFER_SANITIZE=1 OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" $(BIN)/python -m pytest \
		-p no:faulthandler --capture=sys -m '' -x $(or $(TESTS),$(addprefix tests/test_,native.py stores.py pool.py checksums.py stress.py))

soak: $(VENV)/.ready ## a thousand generations with random systems and settings; RUNS=n for fewer
	$(BIN)/python -m benchmarks.soak --runs $(or $(RUNS),1000)

show-trust: $(VENV)/.ready ## every claim about faults, memory and trust, measured again
	$(BIN)/python -m benchmarks.show_trust

faults: $(VENV)/.ready ## docs/faults.md: every fault x every system, run now
	$(BIN)/python -m benchmarks.faults --table docs/faults.md

pretrained: $(VENV)/.ready ## real weights against transformers' own cache: make pretrained MODELS="FOLDER_OR_HUB_ID ..."
	$(BIN)/python -m benchmarks.pretrained $(MODELS)

families: $(VENV)/.ready ## docs/families.md: every decoder family of transformers with every system; AGAIN="llama CRASH" for some
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.families --jobs $(or $(JOBS),2) $(AGAIN)

show-real: $(VENV)/.longbench ## every claim about real models: MODELS=FOLDER ROWS=FOLDER; hours the first time, PARTS=gguf,one,... for some
	$(BIN)/python -m benchmarks.show_real $(MODELS) $(ROWS) $(if $(PARTS),--parts $(PARTS))

show-exact: $(VENV)/.longbench ## every claim about exact decoding: MODELS=FOLDER ROWS=FOLDER DRIVE=FOLDER on the drive; two hours, PARTS=equal,... for some
	$(BIN)/python -m benchmarks.show_exact $(MODELS) $(ROWS) $(DRIVE) $(if $(PARTS),--parts $(PARTS))

show-store: $(VENV)/.ready ## every claim about the prefix store: MODELS=FOLDER of real models; PARTS=processes,real,8k,... for some
	$(BIN)/python -m benchmarks.show_store $(MODELS) $(if $(PARTS),--parts $(PARTS))

show-selection: $(VENV)/.longbench ## every claim about selection on real models: MODELS=FOLDER ROWS=FOLDER; hours the first time
	$(BIN)/python -m benchmarks.show_selection $(MODELS) $(ROWS) $(if $(PARTS),--parts $(PARTS))

show-gpu: $(VENV)/.ready ## every claim about the GPU's path, on a stand-in; on a GPU also its script, 8 minutes
	$(BIN)/python -m benchmarks.show_gpu

show-speed: $(VENV)/.ready ## every claim about speed; DRIVE=FOLDER on the drive, 35 GB free; PARTS=micro,overhead,... for some
	$(BIN)/python -m benchmarks.show_speed

bench: $(VENV)/.ready ## kernels, the embedded model to 32K, 8B's and 1B's shape: JSON in out/bench for benchmarks.compare
	@mkdir -p $(DRIVE)
	$(BIN)/python -m benchmarks.micro --drive $(DRIVE) --out out/bench/micro.json
	-$(BIN)/python -m benchmarks.overhead --out out/bench/overhead.json
	$(BIN)/python -m benchmarks.real --drive $(DRIVE) --out out/bench/real.json
	$(BIN)/python -m benchmarks.shape --drive $(DRIVE) --out out/bench/shape-8b.json
	$(BIN)/python -m benchmarks.shape --shape 1B --drive $(DRIVE) --out out/bench/shape-1b.json

trees: $(VENV)/.ready ## this tree's times over another's, in turns: make trees OTHER=FOLDER, ROUNDS=n for more than 5
	@mkdir -p $(DRIVE)
	$(BIN)/python -m benchmarks.trees $(OTHER) --rounds $(or $(ROUNDS),5) --drive $(DRIVE)

clean:
	rm -rf out .pytest_cache .ruff_cache .hypothesis

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hillinfer needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[$(EXTRAS)]'
	@echo $(EXTRAS) > $@

$(VENV)/.browser: $(VENV)/.ready
	@command -v chromium google-chrome chromium-browser >/dev/null || { echo "Chromium is missing: apt-get install chromium"; exit 1; }
	$(BIN)/pip install -q -c constraints.txt -e '.[browser]'
	@touch $@

$(VENV)/.longbench: EXTRAS = dev,lab,longbench,cluster,gguf,pdf
$(VENV)/.longbench: $(VENV)/.ready
	@grep -qx $(EXTRAS) $< || $(PIP) -e '.[$(EXTRAS)]' # .ready notes what it installed
	@touch $@

show-package: $(VENV)/.longbench ## every claim about the wheel, in new environments; needs a package index
	$(BIN)/pip install -q -c constraints.txt -e '.[audit]'
	$(BIN)/python -m benchmarks.show_package

nvme: $(VENV)/.ready ## the device paths on an emulated NVMe controller; needs root and Debian's QEMU, 10 minutes
	$(BIN)/python -m benchmarks.nvme
