# make demo   create .venv, audit a real base/RL pair, print the table
# make test   create .venv, run the tests
# make test-extras  create .venv-extras, run the tests that need transformers, TRL, Ray or S3
# make check  what CI runs: lint, types, layers, generated docs, tests, notebooks, the extras' tests
# make bench  the ratios of benchmarks/README.md (an otherwise idle machine, about 15 GB of disk)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS_VENV ?= .venv-extras
EXTRAS_STAMP := $(EXTRAS_VENV)/.installed

# One thread in every worker: torch and BLAS threads would fight with pytest's own processes.
export OMP_NUM_THREADS = 1
export MKL_NUM_THREADS = 1
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test test-extras test-slow lint types layers docs check bench clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

# An environment of their own: `make test` must not need what the package does not need.
$(EXTRAS_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(EXTRAS_VENV)
	$(EXTRAS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	    -e '.[lab,ray,s3,train]' 'moto[s3]' flask flask-cors hypothesis pytest pytest-socket pytest-timeout pytest-xdist
	@touch $(EXTRAS_STAMP)

demo: $(STAMP)
	$(BIN)/sparsity-audit diff examples/addition/base examples/addition/grpo-seed0 \
	    --lr 2e-4 --weights-dtype bf16 -o demo-output --overwrite

test: $(STAMP)
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow and not extras" tests

test-extras: $(EXTRAS_STAMP)
	$(EXTRAS_VENV)/bin/python -m pytest -q -n 2 --dist loadfile -m extras tests/cluster tests/hub tests/lab tests/models tests/parity tests/training

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow --timeout 3600 tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/basedpyright --pythonpath $(BIN)/python

layers: $(STAMP)
	$(BIN)/lint-imports

docs: $(STAMP)
	$(BIN)/python docs/generate.py

check: lint types layers
	$(BIN)/python docs/generate.py --check
	$(MAKE) test-extras
	$(MAKE) test

bench: $(STAMP)
	$(BIN)/python benchmarks/kernels.py --json benchmarks/results/kernels.json
	$(BIN)/python benchmarks/diff.py --json benchmarks/results/diff.json
	$(BIN)/python benchmarks/overlap.py --json benchmarks/results/overlap.json

clean:
	rm -rf $(VENV) $(EXTRAS_VENV) demo-output build *.egg-info .pytest_cache .ruff_cache .hypothesis
