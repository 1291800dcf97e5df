# `make demo` and `make test` need Python 3.11 to 3.13, make and the package registries, nothing else.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
	2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
BUILD := build/minilm

.PHONY: demo test check bench bench-again bench-inspect matrix quality clean

demo: $(VENV)/.demo
	$(BIN)/python -m models minilm -o $(BUILD)
	$(BIN)/optimize $(BUILD)/minilm.onnx --target llvm --data $(BUILD)/data.npz --max-drop 1% -o $(BUILD)/optimized

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Exactly what CI runs besides the tests: format, lint, types, the import contract.
check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The exact graph at many sizes and in every number format against the runtimes people use, one and two threads, and what
# `optimize` made of MiniLM. Records are kept in build/bench: a run that was stopped goes on, `make bench-again` does not.
bench: $(VENV)/.bench $(BUILD)/minilm.onnx build/decoder/decoder.onnx build/vit/vit.onnx
	$(BIN)/python -m rewriter.benchmark works
	$(BIN)/python -m rewriter.benchmark $(BUILD)

bench-again:
	rm -rf build/bench
	$(MAKE) bench

# Time and memory of `optimize inspect` against the number of layers; 48 layers need 6 GB of disk for a while.
bench-inspect: $(VENV)/.demo
	$(BIN)/python -m rewriter.benchmark.inspect_scale --layers 3,6,12,24,48

# Every family by every exporter: what is recognised, here and by others. Exports and verdicts are kept in build/matrix,
# so that a run goes on where it was stopped.
matrix: $(VENV)/.test
	$(BIN)/python -m models.matrix --summary build/matrix/summary.md

# Metric against operations kept on three real models, ours and baselines; points are kept in build/quality.
quality: $(VENV)/.test
	$(BIN)/python -m models.quality

$(BUILD)/minilm.onnx:
	$(BIN)/python -m models minilm -o $(BUILD)

build/decoder/decoder.onnx build/vit/vit.onnx:
	$(BIN)/python -m models $(basename $(@F)) -o $(@D)

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.13 found: install one, or call make PYTHON=/path/to/python3."; exit 2; }
	$(PYTHON) -m venv $(VENV)

# torch is named first and exactly, so that a CPU build lying ready is taken where there is one.
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	$(PIP) torch==2.13.0
	@touch $@

$(VENV)/.demo: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP) -e ".[models]"
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt $(VENV)/.demo
	$(PIP) -e ".[test]"
	@touch $@

$(VENV)/.bench: pyproject.toml constraints.txt $(VENV)/.demo
	$(PIP) -e ".[models,openvino]"
	@touch $@

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache
