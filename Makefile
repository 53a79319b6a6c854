# Everything a person or CI runs. `make` alone lists it. Each target sets up what it needs.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Go and Node from .tools come first, where scripts/toolchain.sh had to put them there.
export PATH := $(CURDIR)/.tools/bin:$(PATH)

# Stamp files: what they depend on is what makes an environment stale.
READY := .venv/.ready
GENERATE_READY := .venv-generate/.ready
NODE_READY := clients/typescript/node_modules/.ready

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-16s %s\n", $$1, $$2 }'

.PHONY: setup
setup: $(READY) ## make .venv with everything: the server, the clients, the tools (Linux: about 7 GB, most of it CUDA)
	@echo "everything is in .venv; try: make demo"

$(READY): requirements/dev.txt requirements/no-deps.txt requirements/uv.txt pyproject.toml scripts/venv.sh
	@echo "setting up .venv"
	@scripts/venv.sh .venv -r requirements/dev.txt -r requirements/no-deps.txt -e .
	@touch $@

$(GENERATE_READY): requirements/generate.txt requirements/uv.txt scripts/venv.sh
	@echo "setting up .venv-generate"
	@scripts/venv.sh .venv-generate -r requirements/generate.txt
	@touch $@

.PHONY: toolchain
toolchain: $(GENERATE_READY)
	@scripts/toolchain.sh .venv-generate

$(NODE_READY): clients/typescript/package-lock.json | toolchain
	@echo "setting up clients/typescript"
	@cd clients/typescript && npm ci --silent --no-audit --no-fund
	@touch $@

.PHONY: test
test: $(READY) $(GENERATE_READY) $(NODE_READY) toolchain ## every check and every test that needs no GPU
	@.venv/bin/python scripts/stages.py test

.PHONY: lint
lint: $(READY) $(GENERATE_READY) $(NODE_READY) toolchain ## the checks that run no tests: style, types, imports, protos (and the last release), stubs
	@.venv/bin/python scripts/stages.py lint

.PHONY: format
format: $(READY) $(GENERATE_READY) toolchain ## lay out Python, Go and protos the usual way
	@.venv/bin/ruff check --quiet --fix-only && .venv/bin/ruff format --quiet
	@.venv-generate/bin/buf format --write --path protos/unslothd
	@cd clients/go && go fmt ./...

# Python of a GPU host that has the packages already: make test-gpu GPU_PYTHON=python3
GPU_PYTHON := .venv/bin/python
GPU_TESTS_AT_ONCE := 4
.PHONY: test-gpu
test-gpu: $(if $(filter .venv/%,$(GPU_PYTHON)),$(READY)) ## every test that needs a GPU, on one with 80 GB: most side by side, those of the whole GPU alone
	@failed=0; \
	$(GPU_PYTHON) -m pytest -m "gpu and not whole_gpu" -n $(GPU_TESTS_AT_ONCE) tests/gpu || failed=1; \
	$(GPU_PYTHON) -m pytest -m "gpu and whole_gpu" tests/gpu || failed=1; \
	exit $$failed

.PHONY: demo
demo: $(READY) ## fine-tune a real model on this machine, watched live
	@.venv/bin/python examples/demo.py

.PHONY: bench
bench: $(READY) ## measure what the service costs
	@.venv/bin/python benchmarks/run.py

# Its options: make chaos CHAOS_ARGS="--seed 2 --trainings 3"
.PHONY: chaos
chaos: $(READY) ## kill servers and workers under real trainings, and check that nothing is lost
	@PYTHONPATH=tests:server:clients/python .venv/bin/python -m chaos $(CHAOS_ARGS)

# Its options: make fuzz FUZZ_ARGS="--seed 7 --requests 100000"
.PHONY: fuzz
fuzz: $(READY) ## make a million valid and broken requests of every RPC, and check what comes back
	@PYTHONPATH=tests:server:clients/python .venv/bin/python -m fuzz $(FUZZ_ARGS)

.PHONY: generate
generate: $(GENERATE_READY) $(NODE_READY) toolchain ## write the stubs of every language
	@.venv-generate/bin/python scripts/generate.py

.PHONY: check-generated
check-generated: $(GENERATE_READY) $(NODE_READY) toolchain ## fail when the stubs do not fit the protos
	@.venv-generate/bin/python scripts/generate.py --check

.PHONY: lock
lock: $(GENERATE_READY) ## compile requirements/*.txt anew, with the newest versions that fit together
	@scripts/lock.sh .venv-generate
