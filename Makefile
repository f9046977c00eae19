# make setup   create a virtual environment with everything installed
# make demo    compose two adapters on a real chat model, up to validated artifacts and a report
# make demo-adapters   train the demo's two adapters anew
# make test    lint, type checks, layer checks and the tests; those that use adb daemons need root
#              on Debian, and make test ANDROID=no skips them
# make test-thorough   the rest of the tests that make test takes a sample of: every family, fault
#              and seed on both runtimes
# make test-benchmarks   run the bundle benchmark at tiny scale; takes some minutes
# make fuzz    thousands of bad inputs to every command; CASES and SEED say how many and which
# make test-arm64   test the ONNX runner on an emulated ARM64 machine; needs root on Debian
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# pip prefers a CPU build of this torch if PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL offers one;
# otherwise it installs the default build, which on Linux includes CUDA.
TORCH ?= torch==2.13.0
BIN := .venv/bin
ANDROID ?= yes

CASES ?= 3000
SEED ?= 0

.PHONY: setup demo demo-adapters test fuzz android real test-arm64 test-thorough test-benchmarks lint clean

setup: .venv/ready

.venv/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/python -m benchmarks.real fetch
	$(BIN)/caliport run recipes/demo.yaml

demo-adapters: setup
	$(BIN)/python -m benchmarks.real fetch
	$(BIN)/caliport calibrate recipes/demo-adapters.yaml
	$(BIN)/python -m benchmarks.demo_adapters

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Debian's adbd, which the tests run as devices (fetched once), and the runner for this machine.
android: setup
ifeq ($(ANDROID),yes)
	$(BIN)/python tests/android/daemon.py
	$(BIN)/caliport runner build --target host
endif

# A real chat model, for tests that are skipped where it cannot be had (fetched once).
real: setup
	-$(BIN)/python -m benchmarks.real fetch

PYTEST := $(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile \
	--no-loadscope-reorder --durations 15

test: lint android real
	$(PYTEST) -m "not benchmark and not thorough$(if $(filter yes,$(ANDROID)),, and not android)"

test-thorough: setup
	$(PYTEST) -m thorough

test-benchmarks: setup
	$(BIN)/pytest -m benchmark

# Says of each bad case how to try it alone; build/fuzz/bad.json lists them.
fuzz: setup
	$(BIN)/python -m tests.fuzz --cases $(CASES) --seed $(SEED)

# Runs on an ARM64 machine emulated by QEMU. Missing Debian packages are installed first.
ARM64 := qemu-system-arm g++-aarch64-linux-gnu cpio
test-arm64: setup
	dpkg --status $(ARM64) > /dev/null 2>&1 || \
		{ apt-get update && apt-get install --yes --no-install-recommends $(ARM64); }
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/android/arm64/on_arm64.py

clean:
	rm -rf .venv build runs
