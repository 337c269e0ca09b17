# make demo   a model cut over two workers answers a question through the API
# make test   every test
# make check  what CI runs: format, lint, types, import rules, tests
# make serve  the server, left up
.PHONY: demo test serve check lint fix bench bench-cpu bench-plan bench-predictions soak proto setup clean

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

demo: $(READY)
	$(BIN)/tllm demo

serve: $(READY)
	$(BIN)/tllm serve

# In a process per core. More than four would wait for the one with the longest file.
test: $(READY)
	$(BIN)/python -m pytest -n logical --maxprocesses 4 tests

check: lint test

lint: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(READY)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(READY) .bench/llama-3.2-1b
	$(BIN)/tllm bench latency .bench/llama-3.2-1b --against transformers --http --tokens 32 --turns 7
	$(BIN)/tllm bench latency .bench/llama-3.2-1b --pipeline --tokens 32 --streams 16
	$(BIN)/tllm bench latency .bench/llama-3.2-1b --pipeline --tokens 32 --streams 64
	$(BIN)/python scripts/bench_hop.py
	$(BIN)/python scripts/bench_scheduler.py

# Kernels and formats beside the memory's speed and llama.cpp, which is first compiled here: half an hour when quiet.
# PEER is the Python that has it; ARGS are for the program, such as "--only decode-int8 --turns 9".
PEER ?= $(BIN)/python
bench-cpu: $(VENV)/.bench .bench/llama-3.2-1b .bench/qwen3-0.6b
	$(BIN)/python -m scripts.bench_cpu --peer-python $(PEER) $(ARGS)

$(VENV)/.bench: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[torch,dev,bench]'
	touch $@

# Ten minutes in which a cluster is broken 200 times under load. Linux, as root.
soak: $(READY)
	$(BIN)/python -m scripts.soak --faults 200 --seconds 600

# What the planner predicts beside what is measured: a quarter of an hour as root on a quiet machine.
bench-plan: $(READY) .bench/llama-3.2-1b .bench/qwen3-0.6b
	$(BIN)/python -m scripts.bench_plan

# What the calculator says beside what is measured: a quarter of an hour on a quiet machine.
bench-predictions: $(READY)
	$(BIN)/python -m scripts.bench_predictions $(ARGS)

# Published shapes with random weights: 2.5 GB and 1.2 GB.
.bench/%: | $(READY)
	$(BIN)/python scripts/make_checkpoint.py $* --out $@

proto: $(READY)
	sh scripts/proto.sh

setup: $(READY)

# torch comes first and pinned: a machine with the CPU build at hand takes that one, and nothing later replaces it.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[torch,dev]'
	touch $@

clean:
	rm -rf $(VENV) .bench build src/*.egg-info tests/system/node/node_modules
