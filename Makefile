# make setup   a virtual environment with everything in it
# make demo    from nothing to validated artifacts and a report
# make test    lint, types, layers and all tests; those with adb daemons need root on Debian, and
#              make test ANDROID=no leaves them out
# make test-benchmarks   the bundle benchmark at tiny scale, some minutes
# make test-arm64   the ONNX runner on an emulated ARM64 machine; needs root on Debian
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# pip prefers a CPU build of this torch where it knows of one (PIP_FIND_LINKS or
# PIP_EXTRA_INDEX_URL); elsewhere it takes the default build, which on Linux brings CUDA.
TORCH ?= torch==2.13.0
BIN := .venv/bin
ANDROID ?= yes
PACKAGES := caliport caliport_core calibrate export validation android_harness

.PHONY: setup demo test android test-arm64 test-benchmarks lint clean

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

# Debian's adbd, which the tests run as devices, and the runner for this machine; fetched once.
android: setup
ifeq ($(ANDROID),yes)
	$(BIN)/python tests/android/daemon.py
	$(BIN)/caliport runner build --target host
endif

test: lint android
	$(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
		--durations 15 -m "not benchmark$(if $(filter yes,$(ANDROID)),, and not android)"

test-benchmarks: setup
	$(BIN)/pytest -m benchmark

# On an ARM64 machine that QEMU emulates. Debian's packages are installed where they are missing.
ARM64 := qemu-system-arm g++-aarch64-linux-gnu cpio
test-arm64: setup
	dpkg --status $(ARM64) > /dev/null 2>&1 || \
		{ apt-get update && apt-get install --yes --no-install-recommends $(ARM64); }
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/android/arm64/on_arm64.py

clean:
	rm -rf .venv build runs
