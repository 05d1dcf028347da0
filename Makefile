# Each target sets up .venv itself; on a fresh machine `make demo` and `make test` are all there is to know.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-gpu lint bench cuda-check clean

demo: .venv/.demo
	$(BIN)/python demo/run.py

# What a newcomer waits for.
test: .venv/.dev
	$(BIN)/python -m pytest -n 2 -m "not slow"

# The rest: several processes, kills and resumes, whole programs.
test-slow: .venv/.dev
	$(BIN)/python -m pytest -n 2 -m slow

# Tests that need a CUDA device. They are skipped, with a reason, on a machine without one.
test-gpu: .venv/.dev
	$(BIN)/python -m pytest -m gpu

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/.runtime
	$(BIN)/python tools/bench_ops.py

# Compiles every .cu file, and fails if a kernel spills registers. Without nvcc it prints a message and compiles nothing.
# All that we support: make cuda-check ARCHS="sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_120"
ARCHS ?= sm_80 sm_90
cuda-check: .venv/.runtime
	PYTHONPATH=RWKV-PEFT $(BIN)/python -m rwkv_peft.ops.cuda_check $(ARCHS)

clean:
	rm -rf .venv demo/out starter

.venv/.runtime: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

.venv/.demo: requirements-demo.txt .venv/.runtime
	$(BIN)/python -m pip install -r requirements-demo.txt
	touch $@

.venv/.dev: requirements-dev.txt .venv/.demo
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@
