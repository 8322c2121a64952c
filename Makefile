# Everything runs in .venv, which is made when it is first needed.

PYTHON ?= python3
ARCH ?= sdxl
CONCEPT ?= star
EXP ?=
N ?= 100
DEMO := runs/demo_$(ARCH)_$(CONCEPT)
BIN := .venv/bin
# Two threads on a busy two-core machine make a tiny step twenty times slower.
ONE_THREAD := OMP_NUM_THREADS=1
# Said in full, so that neither a question nor the user's own default config comes between.
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
# What `make demo` sets up and what `make test` adds.
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

# The tests run in the order of tests/conftest.py, the longest first: xdist's own order would put the largest groups first.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadgroup --no-loadscope-reorder --durations=10

.PHONY: help setup demo bases scores acceptance experiment chaos test test-fast mutants lint format bench bench-gpu clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

setup: .venv/.dev  ## make the virtual environment, with what the tests need

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11: install a newer one and say make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	@echo "installing (a minute or two) ..."
	@$(INSTALL) --editable .
	@touch $@

.venv/.dev: .venv/.installed
	@$(INSTALL) --editable '.[dev]'
	@touch $@

demo: .venv/.installed  ## a LoRA learns a new word on a tiny base that draws, in three to five minutes (ARCH=sd15; CONCEPT=unagi, night)
	@test -f configs/demo_$(ARCH).yaml || { echo "error: ARCH is sdxl or sd15, not $(ARCH)" >&2; exit 2; }
	@test -f configs/demo/$(CONCEPT).yaml || { echo "error: CONCEPT is star, unagi or night, not $(CONCEPT)" >&2; exit 2; }
	@rm -rf $(DEMO)
	$(ONE_THREAD) $(LAUNCH) scripts/train_$(ARCH)_lora.py --config configs/demo_$(ARCH).yaml --config configs/demo/$(CONCEPT).yaml --run.name $(notdir $(DEMO))
	@$(ONE_THREAD) $(BIN)/python -m demo.show $(DEMO)

bases: .venv/.installed  ## make the demo's two bases again from nothing (about 90 minutes; continues where it was cut)
	$(BIN)/python -m demo.make_base

scores: .venv/.installed  ## measure what the two bases draw and record it in demo/base/scores.json (about five minutes)
	$(ONE_THREAD) $(BIN)/python -m demo.make_base.scores

acceptance:  ## train SD1.5's demo in full and record what it learned in demo/learned.json (about five minutes)
	$(MAKE) demo ARCH=sd15 CONCEPT=star
	$(ONE_THREAD) $(BIN)/python -m demo.acceptance runs/demo_sd15_star

experiment: .venv/.installed  ## train variants with several seeds and compare them (EXP=configs/experiments/rank.yaml)
	@test -f "$(EXP)" || { echo "error: say which: make experiment EXP=configs/experiments/rank.yaml" >&2; exit 2; }
	$(ONE_THREAD) $(BIN)/python scripts/run_experiment.py --config $(EXP)

chaos: .venv/.installed  ## fault injection: kill and harm runs N times, and compare with the uninterrupted ones (N=100)
	$(ONE_THREAD) $(BIN)/python -m testing.fault_injection --tests $(N)

test: .venv/.dev  ## every test that needs no GPU (at most twelve minutes on two cores)
	$(ONE_THREAD) $(PYTEST) -m "not gpu"

test-fast: .venv/.dev  ## the tests of every commit (at most two minutes on two cores)
	$(ONE_THREAD) $(PYTEST) -m "not gpu and not slow"

mutants: .venv/.dev  ## plant faults, one at a time: does a test catch each? (docs/testing.md)
	$(ONE_THREAD) $(BIN)/python -m testing.mutants --write docs/testing.md

lint: .venv/.dev  ## style, and which package may import which
	$(BIN)/lint-imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.dev  ## rewrite to the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed  ## compare pairs of variants in turn, on this machine; results in benchmarks/results
	$(ONE_THREAD) $(BIN)/python -m benchmarking --model $(ARCH)

bench-gpu: .venv/.dev  ## the GPU tests, then the same comparison on the GPU
	$(BIN)/python -m pytest -q -m gpu
	$(ONE_THREAD) $(BIN)/python -m benchmarking --model $(ARCH) --device cuda

clean:  ## remove what the demo made; runs and caches of your own stay
	rm -rf runs/demo_*
