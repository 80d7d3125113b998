# The verbs of this project. Each does its own set-up; CI calls these and nothing else.
#   make demo    a model trained, compiled, served and asked, in about two minutes
#   make test    the test suite
#   make check   format, lint, types, tests
#   make help    all of them

SHELL := /bin/bash
export PYTHON
VENV ?= .venv
# `dev`, or `test`: what tests need, without linters and type checker.
EXTRA ?= dev
# pip compiles what it installs: where PYTHONDONTWRITEBYTECODE is set, as in many containers, each of hundreds of
# processes would else compile JAX's sources anew, for four seconds.
PIP_FLAGS ?= --quiet --disable-pip-version-check
ARTIFACTS ?= artifacts
MOVIELENS_DIR ?= data/ml-100k
# Two processes, a file whole in one of them: modules share what is slow to make.
PYTEST_FLAGS ?= -n 2 --dist loadfile -m 'not sweep'

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := $(VENV)/.peers
NATIVE := CMakeLists.txt $(wildcard xlarank/host/native/*)

# Another PYTHON than the one that .venv was made with makes it anew.
ifneq ($(PYTHON),)
ifneq ($(wildcard $(STAMP)),)
$(shell test "$$(PYTHON='$(PYTHON)' tools/find_python.sh 2>/dev/null)" = "$$(cat $(STAMP))" || rm -f $(STAMP))
endif
endif

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-sweeps test-native test-aarch64 test-sanitizers check format movielens protos clean
.PHONY: fuzz soak bench bench-main bench-compiler bench-embedding bench-serving

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

setup: $(STAMP)  ## .venv with xlarank, its kernel and the development tools

# tools/find_python.sh checks what the machine must have and names what is missing.
$(STAMP): pyproject.toml $(NATIVE) tools/find_python.sh
	@python=$$(tools/find_python.sh) && echo "setting up $(VENV) with $$python" && \
	  "$$python" -m venv --clear $(VENV) && \
	  $(BIN)/python -m pip install $(PIP_FLAGS) --editable '.[$(EXTRA)]' && \
	  echo "$$python" >$@

demo: $(STAMP)  ## train, compile, serve and ask a model of a made-up video feed
	@$(BIN)/python tools/demo.py --artifacts $(ARTIFACTS)/demo

test: $(STAMP)  ## the test suite
	@$(BIN)/python -m pytest $(PYTEST_FLAGS)

test-sweeps: $(STAMP)  ## what `make test` runs a sample of: every pass on every model, ten minutes
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m sweep

test-native:  ## C++ tests of the kernel
	@tools/test_native.sh plain

test-aarch64:  ## C++ tests of the kernel, cross-compiled and run under qemu
	@tools/test_native.sh aarch64

test-sanitizers: $(STAMP)  ## C++ tests and tests/host with AddressSanitizer and UBSan
	@PYTHON_OF_VENV=$(BIN)/python tools/test_native.sh sanitizers

check: $(STAMP)  ## formatting, lint, types, layering, tests
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@$(MAKE) --no-print-directory test

format: $(STAMP)  ## format and mend what the linter can
	@$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

movielens: $(STAMP)  ## bring MovieLens 100K to data/ml-100k (never committed)
	@PYTHON=$(BIN)/python tools/movielens.sh $(MOVIELENS_DIR)

protos: $(STAMP)  ## generate the gRPC code anew
	@$(BIN)/python tools/generate_protos.py

bench: $(STAMP)  ## short form of every benchmark → bench/short/
	@$(BIN)/python tools/bench_main.py --short --out bench/short/main.json
	@$(BIN)/python tools/bench_compiler.py --short --out bench/short/compiler.json
	@$(BIN)/python tools/bench_embedding.py --short --out bench/short/embedding.json
	@$(BIN)/python tools/bench_serving.py --short --out bench/short/serving.json

bench-main: $(STAMP)  ## figures of the main path → bench/main.json
	@$(BIN)/python tools/bench_main.py --out bench/main.json

bench-compiler: $(STAMP)  ## figures of the compiler's passes and tuning → bench/compiler.json
	@$(BIN)/python tools/bench_compiler.py --out bench/compiler.json --movielens $(MOVIELENS_DIR)

# pip takes torch's build for CPU alone where it finds one; any build will do.
$(PEERS): $(STAMP)
	@$(BIN)/python -m pip install $(PIP_FLAGS) --editable '.[bench]' && touch $@

bench-embedding: $(PEERS)  ## figures of the embedding engine against torch and fbgemm → bench/embedding.json
	@$(BIN)/python tools/bench_embedding.py --out bench/embedding.json

# A hundred thousand broken requests to a real server process; FUZZ_FLAGS="--seed 2 --case 17" shows one again.
FUZZ_FLAGS ?= --cases 100000
fuzz: $(STAMP)  ## broken ranking requests to a real server: statuses, scores, memory
	@$(BIN)/python tools/fuzz_model_infer.py $(FUZZ_FLAGS)

bench-serving: $(STAMP)  ## figures of serving: batching, latency, overload → bench/serving.json
	@$(BIN)/python tools/bench_serving.py --out bench/serving.json

# SOAK_FLAGS="--seconds 20" is the short form.
SOAK_FLAGS ?= --minutes 10
soak: $(STAMP)  ## a server under mixed load for ten minutes: nothing fails but what must, nothing grows
	@$(BIN)/python tools/soak.py $(SOAK_FLAGS)

clean:  ## remove what make made, but data/
	rm -rf $(VENV) $(ARTIFACTS) bench build
