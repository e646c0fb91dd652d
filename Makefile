# Each target sets up all that it needs, in .venv, on a machine with Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin
# One thread for each of the two test processes; the kernels' own threads are tested where they matter.
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

.PHONY: demo test lint format clean

demo: .venv/installed
	HF_HUB_OFFLINE=1 $(BIN)/turnout demo

test: lint
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal

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

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
