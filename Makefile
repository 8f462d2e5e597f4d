# Everything runs in .venv, which any target makes from a bare Python when it is not there yet.
#
#   make demo [CLIPS=folder] [OUT=demo_out]   sample the shipped model, train one, evaluate both
#   make test                                 lint, then the quick tests
#   make test-slow                            lint, then all tests
#   make test-aot                             compile for TPU pods: installs libtpu (210 MB)
#   make lint                                 ruff: rules and formatting
#   make venv                                 only the environment
#   make clean                                remove .venv, caches and build output

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

# The first of these that runs is used; `make PYTHON=/path/to/python` names another.
PYTHON ?= python3.13 python3.12 python3.11 python3
WORKERS ?= 2
OUT ?= demo_out
CLIPS ?=

VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow test-aot lint venv clean

demo: $(STAMP)
	$(RUN) -m nuwa_jax.demo --out='$(OUT)' $(if $(CLIPS),--clips='$(CLIPS)')

test: lint
	$(RUN) -m pytest -n $(WORKERS) -m "not slow" --durations=15

test-slow: lint
	$(RUN) -m pytest -n $(WORKERS) --durations=15

# The TPU's compiler needs no TPU. It lies beside the packages, not among them: with it installed, JAX
# would look for a TPU in every other target.
LIBTPU := $(VENV)/libtpu

test-aot: $(STAMP)
	$(RUN) -m pip install --disable-pip-version-check -q --no-deps --upgrade --target $(LIBTPU) \
	  'libtpu==0.0.42.*'
	PYTHONPATH=$(LIBTPU) JAX_PLATFORMS=cpu $(RUN) -m pytest -n 0 tests/parallel/test_aot.py \
	  tests/parallel/test_census.py tests/parallel/test_fsdp.py tests/models/test_attention_kernels.py

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

venv: $(STAMP)

# One environment with the test tools for every target: they are small, and one stamp is enough.
# It is renewed when setup.py changes and rebuilt when its interpreter no longer runs.
$(STAMP): setup.py
	@if ! $(RUN) -m pip --version >/dev/null 2>&1; then \
	  for python in $(PYTHON) ''; do \
	    if [ -z "$$python" ]; then \
	      echo "error: no Python >= 3.11 with venv among: $(PYTHON). Install one (on Debian and" \
	        "Ubuntu: apt install python3-venv) or name one: make PYTHON=/path/to/python" >&2; \
	      exit 2; \
	    fi; \
	    if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
	        >/dev/null 2>&1; then break; fi; \
	  done; \
	  echo "== creating $(VENV) with $$("$$python" --version) ($$(command -v "$$python"))"; \
	  "$$python" -m venv --clear $(VENV); \
	fi
	@echo "== installing into $(VENV): 1.4 GB, a minute or more the first time"
	$(RUN) -m pip install --disable-pip-version-check -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
