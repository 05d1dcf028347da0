# Each target sets up .venv itself; on a fresh machine `make demo` and `make test` are all there is to know.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-gpu lint bench cuda-check clean

demo: .venv/.runtime
	$(BIN)/python demo/run.py

test: .venv/.dev
	$(BIN)/python -m pytest -n 2

# With what `make test` does a part of only: all kills of tests/training/checkpoint/test_kills.py.
test-slow: .venv/.dev
	$(BIN)/python -m pytest -n 2 --all-kills

# What needs a CUDA device; skips itself, with a reason, where there is none.
test-gpu: .venv/.dev
	$(BIN)/python -m pytest -m gpu

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/.runtime
	$(BIN)/python tools/bench_ops.py

# Compiles every .cu where nvcc is present and fails on a kernel that spills; says so where there is no nvcc.
# All that we support: make cuda-check ARCHS="sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_120"
ARCHS ?= sm_80 sm_90
cuda-check: .venv/.runtime
	PYTHONPATH=RWKV-PEFT $(BIN)/python -m rwkv_peft.ops.cuda_check $(ARCHS)

clean:
	rm -rf .venv demo/out

.venv/.runtime: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

.venv/.dev: requirements-dev.txt .venv/.runtime
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@
