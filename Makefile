# Each target does its own set-up: a virtual environment, torch, the compiled kernels.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?= a red car
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)
EMULATED_TESTS := tests/test_emulation.py $(patsubst csrc/%.cu,tests/test_%.py,$(wildcard csrc/*.cu))

.PHONY: demo test check kernels emulated mutation resources gpu-check clean

demo: $(VENV)/.installed  ## text to 3D with the embedded prior: make demo PROMPT="a blue duck"
	$(BIN)/dreamfusion-fast doctor
	rm -rf runs/demo
	$(BIN)/dreamfusion-fast generate "$(PROMPT)" --out runs/demo

test: check  ## lint, then every test
	$(BIN)/python -m pytest

kernels: emulated mutation resources  ## all checks of the CUDA kernels that need no GPU: half an hour

check: $(VENV)/.installed  ## lint only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

emulated: $(VENV)/.installed  ## the CUDA kernels run by the CPU under sanitizers: tests, races
	$(BIN)/python -m pip install --quiet cmake ninja pybind11
	$(BIN)/cmake -B build/emulated -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python -DDF_EMULATED=ON -DDF_CUDA=OFF
	$(BIN)/cmake --build build/emulated --target emulated
	$(BIN)/python tests/emulated.py build/emulated $(EMULATED_TESTS)

mutation: emulated  ## plant bugs into the CUDA kernels, one at a time: each must be caught
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/python tests/mutation.py

resources: $(VENV)/.installed  ## nvcc for every architecture: registers, spills, machine code
	$(BIN)/python tests/kernel_resources.py

gpu-check:  ## where there is a GPU: build, test, measure; no .venv: make gpu-check ARGS="--out DIR"
	$(PYTHON) bench/gpu_check.py $(ARGS)

# torch first and pinned: a looser range may fetch another build of several gigabytes.
$(VENV)/.installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info dreamfusion_fast/*.so
