# Everything runs in .venv, which is created when it is first needed.

PYTHON ?= python3
ARCH ?= sdxl
CONCEPT ?= star
DATA ?=
EXP ?=
PY ?=
ONLY ?=
PEER ?=
PEER_PYTHON ?=
A ?=
B ?=
N ?= 100
MINUTES ?= 30
POINTS ?= 10
DEMO := runs/demo_$(ARCH)_$(CONCEPT)
BIN := .venv/bin
# Two threads on a busy two-core machine make a tiny step twenty times slower.
ONE_THREAD := OMP_NUM_THREADS=1
# All options are given, so that accelerate asks no question and ignores the user's default config.
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
# `make demo` installs the package and the optimizers by name, `make test` also its dev extra.
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

# The tests run in the order of tests/conftest.py, longest first; xdist's own order puts the largest groups first.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadgroup --no-loadscope-reorder --durations=10

.PHONY: help setup demo pages bases scores measure-study acceptance acceptance-files inspect experiment chaos faults-io test test-fast test-gpu mutants fuzz lint \
	format proxy bench bench-data bench-peer bench-start bench-gpu clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

setup: .venv/.dev  ## create the virtual environment, with what the tests need

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11: install a newer one and run make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	@echo "installing (a minute or two) ..."
	@$(INSTALL) --editable '.[optimizers]'
	@touch $@

.venv/.dev: .venv/.installed
	@$(INSTALL) --editable '.[dev]'
	@touch $@

demo: .venv/.installed  ## train a LoRA of a new concept on a tiny trained base, in three to five minutes (ARCH=sd15; CONCEPT=unagi, night)
	@test -f configs/demo_$(ARCH).yaml || { echo "error: ARCH must be sdxl or sd15, not $(ARCH)" >&2; exit 2; }
	@test -f configs/demo/$(CONCEPT).yaml || { echo "error: CONCEPT must be star, unagi or night, not $(CONCEPT)" >&2; exit 2; }
	@rm -rf $(DEMO)
	$(ONE_THREAD) $(LAUNCH) scripts/train_$(ARCH)_lora.py --config configs/demo_$(ARCH).yaml --config configs/demo/$(CONCEPT).yaml --run.name $(notdir $(DEMO))
	@$(ONE_THREAD) $(BIN)/python -m demo.show $(DEMO)

pages: .venv/.installed  ## pictures of the demo's pages and of a terminal in docs/images, where Chromium is installed (after make demo ARCH=sd15)
	@$(ONE_THREAD) $(BIN)/python scripts/inspect_data.py $(ARCH) --config $(DEMO)/config.yaml
	@$(BIN)/python -m demo.page_pictures $(DEMO)
	@$(ONE_THREAD) $(BIN)/python -m demo.terminal_picture

bases: .venv/.installed  ## train the demo's three bases again from scratch (about 105 minutes; resumes if interrupted)
	$(BIN)/python -m demo.make_base

scores: .venv/.installed  ## score the images of the three bases and record the scores in demo/base/scores.json (about six minutes on one core)
	$(ONE_THREAD) $(BIN)/python -m demo.make_base.scores

measure-study: .venv/.installed  ## how far losses and pictures follow a checker: 106 adapters (docs/examples/measure; about two hours on two cores)
	$(ONE_THREAD) $(BIN)/python -m demo.study

acceptance: acceptance-files  ## record which programs load which adapter files, and the scores of the whole SD1.5 demo (ten minutes)
	$(MAKE) demo ARCH=sd15 CONCEPT=star
	$(ONE_THREAD) $(BIN)/python -m demo.acceptance runs/demo_sd15_star

acceptance-files: .venv/.dev  ## load every kind of adapter file as other programs do; the table in docs/formats.md (about three minutes)
	PYTHONPATH=tests $(ONE_THREAD) $(BIN)/python -m testing.adapter_acceptance --write docs/formats.md

inspect: .venv/.installed  ## write one page about a data set, as a training would use it (DATA=photos ARCH=sd15)
	@test -n "$(DATA)" || { echo "error: DATA is missing: make inspect DATA=photos" >&2; exit 2; }
	$(ONE_THREAD) $(BIN)/python scripts/inspect_data.py $(ARCH) --config configs/$(ARCH)_lora.yaml --data.path "$(DATA)"

experiment: .venv/.installed  ## train variants with several seeds and compare them (EXP=configs/experiments/rank.yaml)
	@test -f "$(EXP)" || { echo "error: EXP is missing or no such file exists: make experiment EXP=configs/experiments/rank.yaml" >&2; exit 2; }
	$(ONE_THREAD) $(BIN)/python scripts/run_experiment.py --config "$(EXP)"

chaos: .venv/.dev  ## kill or damage runs N times and compare them with uninterrupted ones; then ckpt-chaos at POINTS (N=100 POINTS=10)
	$(ONE_THREAD) $(BIN)/python -m testing.fault_injection --tests $(N)
	$(ONE_THREAD) $(BIN)/python -m testing.file_boundaries --points $(POINTS) --write docs/fault_injection.md

faults-io: .venv/.dev  ## let N single system calls of runs fail (strace): full disk, broken disk; skipped without strace (N=100)
	$(ONE_THREAD) $(BIN)/python -m testing.io_faults --tests $(N) --write docs/fault_injection.md

test: .venv/.dev  ## every test that needs no GPU (sixteen to nineteen minutes on two cores)
	$(ONE_THREAD) $(PYTEST) -m "not gpu"

test-fast: .venv/.dev  ## the tests to run before every commit (five to six minutes on two cores)
	$(ONE_THREAD) $(PYTEST) -m "not gpu and not slow"

mutants: .venv/.dev  ## insert the faults of testing/mutants.yaml, one at a time, and check that the tests catch each (docs/testing.md)
	$(ONE_THREAD) $(BIN)/python -m testing.mutants --write docs/testing.md

fuzz: .venv/.dev  ## give damaged and hostile files to the readers of users' files (MINUTES=30; docs/testing.md)
	$(ONE_THREAD) $(BIN)/python -m testing.fuzz --minutes $(MINUTES) --write docs/testing.md

lint: .venv/.dev  ## check the style and which package may import which
	$(BIN)/lint-imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.dev  ## fix the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proxy: .venv/.dev  ## count what a step costs, without GPU or weights, and compare it with benchmarks/ledger.json (8 minutes of CPU time)
	$(ONE_THREAD) $(BIN)/python -m benchmarking.proxy

bench: .venv/.installed  ## time pairs of variants, or the step of two commits (A=main B=HEAD), on this machine; results in benchmarks/results
	$(ONE_THREAD) $(BIN)/python -m benchmarking --model $(ARCH) $(if $(A)$(B),--commits "$(A)" "$(B)")

bench-peer: .venv/.installed  ## whole jobs against another program's script (PEER=.../train_text_to_image_lora.py; PEER_PYTHON=...)
	@test -n "$(PEER)" || { echo "error: PEER is missing: make bench-peer PEER=diffusers/examples/text_to_image/train_text_to_image_lora.py" >&2; exit 2; }
	$(ONE_THREAD) $(BIN)/python -m benchmarking.peer --peer "$(PEER)" $(if $(PEER_PYTHON),--peer-python "$(PEER_PYTHON)")

bench-data: .venv/.installed  ## measure the start of a run and its loader with up to a million rows (about half an hour on two cores)
	$(BIN)/python -m benchmarking.data

bench-start: .venv/.installed  ## measure the start of a run against imports and weights alone, in CPU seconds (ARCH=sd15; two minutes)
	$(ONE_THREAD) $(BIN)/python -m benchmarking.first_step

# PY: a Python of the machine that has torch for CUDA, in place of .venv; ONLY: rows; PEER as above.
bench-gpu: $(if $(PY),,.venv/.installed)  ## measure the training step on a GPU in eight minutes (PY=python3 where pip reaches no registry)
	@$(if $(PY),PYTHONPATH=.gpu/site-packages:. $(PY) -m benchmarking.gpu_pack .gpu --install)
	$(ONE_THREAD) $(if $(PY),PYTHONPATH=.gpu/site-packages:. $(PY),$(BIN)/python) -m benchmarking.gpu $(if $(ONLY),--only $(ONLY)) $(if $(PEER),--peer "$(PEER)")

test-gpu: .venv/.dev  ## the tests that need a GPU (at most 90 seconds there)
	$(BIN)/python -m pytest -q -m gpu

clean:  ## delete the demo's runs; your own runs and caches stay
	rm -rf runs/demo_*
