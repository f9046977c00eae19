# make setup   a virtual environment with everything in it
# make demo    from nothing to validated artifacts and a report
# make test    lint, types, layers and all tests
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# pip prefers a CPU build of this torch where it knows of one (PIP_FIND_LINKS or
# PIP_EXTRA_INDEX_URL); elsewhere it takes the default build, which on Linux brings CUDA.
TORCH ?= torch==2.13.0
BIN := .venv/bin
PACKAGES := caliport caliport_core calibrate export validation android_harness

.PHONY: setup demo test lint clean

setup: .venv/ready

.venv/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/caliport run recipes/demo.yaml

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile

clean:
	rm -rf .venv runs
