# `make demo` and `make test` each work as the very first command: they make .venv and install what they need.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed

.PHONY: demo test test-lowest bench bench-gpu lint clean demo-base
demo: $(STAMP)
	GOMP_SPINCOUNT=$${GOMP_SPINCOUNT:-10000} $(BIN)/python -m pissa_cli.demo

test: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2

# The same tests with the lowest version of every package that pyproject.toml allows.
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable ".[dev]"
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv-lowest/bin/python -m pytest -n 2

# Ratios against PEFT and the reference algorithm, written to docs/results, in under ten minutes on two cores; give matrices,
# rows and models of your own.
BENCH_MATRICES ?= pissa_cli/demo/base/model.safetensors
BENCH_ROWS ?= pissa_cli/demo/train.jsonl
BENCH_MODELS ?= pissa_cli/demo/base:64:2
bench: $(STAMP)
	$(BIN)/python tests/bench_startup.py docs/results/bench-startup.md
	$(BIN)/python tests/bench_init.py docs/results/bench-init.md $(BENCH_MATRICES)
	$(BIN)/python tests/bench_vera.py docs/results/bench-vera.md
	$(BIN)/python tests/bench_train.py docs/results/bench-train.md $(BENCH_ROWS) $(BENCH_MODELS)

# From a checkout on a machine with a GPU, with the packages that are there: nothing is installed.
bench-gpu:
	$(PYTHON) -m tests.bench_gpu docs/results/bench-gpu.md

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo-base: $(STAMP)
	$(BIN)/python recipes/demo/make_base.py
	$(BIN)/pissa train recipes/demo/base.yaml
	$(BIN)/python recipes/demo/make_base.py --finish

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) .venv-lowest build demo-out out
