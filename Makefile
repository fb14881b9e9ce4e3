# Everything runs in .venv, which each target makes when it is missing. Nothing but Python 3.11 with pip is needed.
PYTHON ?= python3
BIN := .venv/bin
TEST_WHEELS := $(shell sed -n '/^test = \[/,/^\]/s/^ *"\(.*\)".*/\1/p' pyproject.toml)
LINT_WHEELS := $(shell sed -n 's/^lint = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
WORKERS ?= 2

.PHONY: demo fuzz soak exhaustive test test-slow test-oldest-hub lint format bench bench-convert bench-loader bench-memory bench-losses bench-hub bench-look \
	distil pictures build clean

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/tested: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(foreach wheel,$(TEST_WHEELS),'$(wheel)')
	touch $@

.venv/linted: .venv/tested
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(foreach wheel,$(LINT_WHEELS),'$(wheel)')
	touch $@

demo: .venv/installed  ## convert a small real capture, check it, and show what the teacher expects
	$(BIN)/logitstore demo

test: .venv/tested  ## all tests but the exhaustive ones
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-slow: .venv/tested  ## every bit and every length of a shard and its manifest
	$(BIN)/python -m pytest -n $(WORKERS) -m slow

# The oldest release of the Hub's client that we allow (it is made of httpx, later ones of httpx2): no torch there.
OLDEST_HUB := $(shell sed -n 's/^  "huggingface_hub>=\([0-9.]*\),.*/\1/p' pyproject.toml)

.venv-oldest-hub/installed: pyproject.toml
	$(PYTHON) -m venv .venv-oldest-hub
	.venv-oldest-hub/bin/python -m pip install --quiet --disable-pip-version-check --editable . \
		'huggingface_hub==$(OLDEST_HUB).*' $(filter pytest% hypothesis%,$(TEST_WHEELS)) 'datasets==5.2.0' 'aiohttp==3.14.5'
	touch $@

test-oldest-hub: .venv-oldest-hub/installed  ## what has to do with the Hub, with the oldest client
	.venv-oldest-hub/bin/python -m pytest -n $(WORKERS) -m "not slow" \
		$(addprefix tests/test_,hub_server.py hub_roundtrip.py hub_push.py hub_errors.py remote.py)

fuzz: .venv/tested  ## forged input for every reader, ten minutes each
	$(BIN)/python tests/fuzz/run.py all --seconds 600 --seed $${SEED:-$$(date +%s)}

lint: .venv/linted
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/linted
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/installed  ## figures of the README, on real rows; one core
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/format.py

exhaustive: .venv/tested  ## every byte of every vector forged, 200 kills, 1,500 power cuts: a quarter of an hour
	LOGITSTORE_EVERY_BYTE=1 LOGITSTORE_KILLS=200 LOGITSTORE_POWER_CUTS=500 \
		$(BIN)/python -m pytest -n $(WORKERS) tests/test_forged.py tests/test_resume.py tests/test_power_cut.py

soak: .venv/installed  ## a million sequences by writers that are killed again and again
	$(BIN)/python benchmarks/soak.py

bench-convert: .venv/tested  ## speed and memory of importers
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/convert.py

# The peers need different releases of huggingface_hub: an environment each, of some 2 GB, that nothing else uses.
.venv-%/installed:
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy '$(PEER_$*)'
	touch $@

PEER_datasets := datasets==5.2.0
PEER_streaming := mosaicml-streaming==0.13.0

bench-loader: .venv/tested .venv-datasets/installed .venv-streaming/installed  ## batches a second, beside datasets and MDS
	$(BIN)/python benchmarks/loader.py --datasets .venv-datasets/bin/python --streaming .venv-streaming/bin/python

bench-memory: .venv/tested  ## memory of iterating over a million sequences
	$(BIN)/python benchmarks/memory.py

bench-losses: .venv/tested  ## time and memory of the losses beside plain cross-entropy
	$(BIN)/python benchmarks/losses.py

bench-hub: .venv/installed  ## reading on the Hub beside reading from a disk
	$(BIN)/python benchmarks/hub.py

bench-look: .venv/installed  ## speed and memory of stats and compare
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/look.py

pictures: .venv/tested  ## the pictures of the README; needs Debian's chromium
	$(BIN)/python examples/pictures.py

distil: .venv/tested  ## the distillation of the README
	$(BIN)/python examples/distil.py

build: .venv/installed  ## wheel and sdist into dist/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build
	rm -rf dist
	$(BIN)/python -m build --outdir dist

clean:
	rm -rf .venv .venv-* dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
