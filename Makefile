# Each target sets up .venv itself; on a fresh machine `make demo` and `make test` are all there is to know.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench cuda-check clean

demo: .venv/.runtime
	$(BIN)/python demo/run.py

test: .venv/.dev
	$(BIN)/python -m pytest -n 2

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/.runtime
	$(BIN)/python tools/bench_ops.py

# Compiles every .cu where nvcc is present; says so where it is not.
cuda-check: .venv/.runtime
	PYTHONPATH=RWKV-PEFT $(BIN)/python -m rwkv_peft.ops.build --cuda-check sm_80 sm_90

clean:
	rm -rf .venv demo/out

.venv/.runtime: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

.venv/.dev: requirements-dev.txt .venv/.runtime
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@
