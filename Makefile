# Every target runs in .venv: `setup` makes it from constraints.txt and brings it up to date when constraints.txt,
# pyproject.toml or setup.cfg have changed. Nothing is installed outside it.

PYTHON ?= python3
PYTEST_ARGS ?=
TESSERA_SHARED ?= ../shared

override VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.ready
PYTEST := $(PY) -m pytest -q $(PYTEST_ARGS) --ignore=tests/contract
# The models of the tests are tiny: two processes of one thread each are faster than one of two. Where there is a
# GPU they leave it alone, and compare in fp32 on the CPU as everywhere.
ON_CPU := CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
PARALLEL := $(ON_CPU) $(PYTEST) -n 2

NO_VENV := echo "make setup: $(PYTHON) cannot make a virtual environment with pip in it; install its venv module" \
    "(on Debian or Ubuntu: apt install python3-venv) and run this again" >&2; exit 1

.DEFAULT_GOAL := help
.PHONY: help setup demo chain examples test test-contract test-shared test-slow test-gpu test-distributed test-browser test-llama-cpp lint wheel clean

help: ## list the targets
	@awk -F ': .*## ' '/^[a-z-]+:.* ## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with the tested versions and this checkout installed in it (editable)

# Debian's python3 has no ensurepip without python3-venv: there, a pip from elsewhere fills the environment in its place.
$(STAMP): constraints.txt pyproject.toml setup.cfg
	@if ! $(PY) -c '' 2>/dev/null; then \
	    echo "[setup] making $(VENV) with $$($(PYTHON) --version)"; \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	        echo "make setup: the versions in constraints.txt need Python 3.11 or newer;" \
	             "name one with 'make setup PYTHON=/path/to/python3'" >&2; exit 1; }; \
	    rm -rf $(VENV); \
	    $(PYTHON) -m venv --without-pip $(VENV) || { $(NO_VENV); }; \
	fi
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then \
	    $(PY) -m ensurepip --default-pip >/dev/null 2>&1 || $(PYTHON) -m pip --python $(PY) install -q pip || { $(NO_VENV); }; \
	fi
	@echo "[setup] installing the versions in constraints.txt (the first time takes minutes, most of it torch)"
	@$(PY) -m pip install -q -c constraints.txt setuptools
	@$(PY) -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@
	@echo "[setup] done: $(VENV)/bin/tessera, or $(PY) -m tessera"

demo: setup ## from raw text to a model that answers, in minutes on a CPU (TESSERA_DATA: a text of your own)
	$(PY) -m tessera demo

chain: setup ## every stage, from text to a chat model loaded from a Hub (CHAIN_ARGS: further options)
	$(PY) examples/full_chain.py $(CHAIN_ARGS)

EXAMPLES := train_tokenizer prepare_data pretrain_small finetune_chat prefer_answers reinforce_arithmetic score_model \
    convert_formats publish stream_dataset

examples: setup ## the stages one by one, as short programs; what an earlier call left in runs/examples is replaced
	rm -rf runs/examples
	set -e; for name in $(EXAMPLES); do echo "== examples/$$name.py"; $(PY) examples/$$name.py; done

test: setup ## the tests that need nothing but a CPU (PYTEST_ARGS: further options)
	$(PARALLEL) -m "not slow and not gpu and not distributed and not shared and not browser"

test-contract: setup ## transformers' own common tests over the dialects (TRANSFORMERS_TESTS: a checkout that has more of them)
	PYTHONPATH=tests $(PY) tests/contract/upstream.py
	$(ON_CPU) $(PY) -m pytest -q -n 2 $(PYTEST_ARGS) -m "not distributed" tests/contract

test-shared: setup ## compare with the golden vectors and data in TESSERA_SHARED (../shared)
	@[ -d "$(TESSERA_SHARED)" ] || { \
	    echo "make test-shared: no folder '$(TESSERA_SHARED)'; name the one with the golden vectors with" \
	         "'make test-shared TESSERA_SHARED=/path/to/shared'" >&2; exit 1; }
	TESSERA_SHARED="$(TESSERA_SHARED)" $(PARALLEL) -m "shared and not slow and not gpu and not distributed and not browser"

test-slow: setup ## the tests of a minute and more (they read TESSERA_SHARED too)
	TESSERA_SHARED="$(TESSERA_SHARED)" $(PYTEST) -m "slow and not gpu and not distributed and not browser"

test-gpu: setup ## the tests that need a CUDA GPU
	$(PYTEST) -m gpu

test-distributed: setup ## the tests that start several processes
	$(PYTEST) -m "distributed and not gpu"
	PYTHONPATH=tests $(PY) tests/contract/upstream.py
	$(ON_CPU) $(PY) -m pytest -q $(PYTEST_ARGS) -m distributed tests/contract

test-browser: setup ## the chat page in a headless Chromium (Debian: apt install chromium chromium-driver)
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
	    echo "make test-browser: chromium and chromedriver are not installed" \
	         "(Debian: apt install chromium chromium-driver)" >&2; exit 1; }
	$(PYTEST) -m browser

LLAMA_CPP_PYTHON := llama-cpp-python==0.3.36

test-llama-cpp: setup ## run GGUF files with llama.cpp itself, which is built for it (a quarter of an hour on two cores)
	@command -v c++ >/dev/null && command -v cmake >/dev/null || { \
	    echo "make test-llama-cpp: $(LLAMA_CPP_PYTHON) is built from source and needs a C++ compiler and CMake" \
	         "(Debian: apt install g++ cmake)" >&2; exit 1; }
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_CURL=OFF" \
	    $(PY) -m pip install -q -c constraints.txt $(LLAMA_CPP_PYTHON)
	TESSERA_SHARED="$(TESSERA_SHARED)" $(ON_CPU) $(PYTEST) tests/conversion/test_llama_cpp.py

lint: setup ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

wheel: setup ## build the source distribution and the wheel into dist/
	$(PY) -m uv build --python $(PY) --no-build-isolation --out-dir dist .
	@ls -l dist

clean: ## remove builds and caches (.venv and runs/ stay)
	rm -rf build dist *.egg-info .cache .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
