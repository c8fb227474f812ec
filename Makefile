# Each target does its own set-up: a virtual environment, torch, the compiled kernels.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?= a red car
NVCC := $(firstword $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)
# What compiles has jobs of its own: it is told of none of make's.
CMAKE := MAKEFLAGS= $(BIN)/cmake
CMAKE_OPTIONS := -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
  -DPython_EXECUTABLE=$(abspath $(BIN))/python
CPP_OPTIONS := -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DDF_PYTHON=OFF \
  -DCMAKE_INSTALL_PREFIX=$(abspath build/cpp/install)
STEMS := $(patsubst csrc/%.cu,%,$(wildcard csrc/*.cu))
EMULATED_TESTS := tests/test_emulation.py tests/test_field.py tests/test_field_paper.py \
  tests/test_render_op.py tests/test_autocast.py $(wildcard tests/test_compat_[nt]*.py) \
  $(foreach stem,$(STEMS),$(wildcard tests/test_$(stem).py tests/test_$(stem)_*.py))

.PHONY: demo test check pytest kernels emulated mutation triton resources cpp cpp-library \
  instructions gpu-check bench bench-compare clean

demo: $(VENV)/.installed  ## text to 3D with the embedded prior: make demo PROMPT="a blue duck"
	$(BIN)/dreamfusion-fast doctor
	rm -rf runs/demo
	$(BIN)/dreamfusion-fast generate "$(PROMPT)" --out runs/demo

# Two stages at a time, as most have a part that leaves a CPU idle; each one's output in one piece.
test: check $(VENV)/.tools  ## lint, every test, every check of the CUDA kernels that needs no GPU
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target pytest kernels

pytest: $(VENV)/.installed  ## every test of the Python package
	$(BIN)/python -m pytest

kernels: emulated mutation triton resources cpp instructions

check: $(VENV)/.installed  ## lint only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

emulated: $(VENV)/.tools  ## the CUDA kernels run by the CPU under sanitizers: tests, races
	$(CMAKE) -B build/emulated $(CMAKE_OPTIONS) -DDF_EMULATED=ON -DDF_CUDA=OFF
	$(CMAKE) --build build/emulated --target emulated
	$(BIN)/python tests/emulated.py build/emulated $(EMULATED_TESTS)

mutation: emulated  ## plant bugs into the CUDA kernels, one at a time: each must be caught
	MAKEFLAGS= PATH=$(abspath $(BIN)):$$PATH $(BIN)/python tests/mutation.py

triton: $(VENV)/.installed  ## the Triton kernels, compiled ahead of time: registers, traffic
	$(BIN)/python tests/triton_resources.py

ifneq ($(NVCC),)
resources: $(VENV)/.tools  ## the CUDA module for every architecture: imports, machine code
	$(CMAKE) -B build/cuda $(CMAKE_OPTIONS) -DDF_CUDA=ON
	$(CMAKE) --build build/cuda --target _cuda
	$(BIN)/python tests/kernel_resources.py build/cuda
	PYTHONPATH=build/cuda $(BIN)/python -m pytest -q tests/test_cuda_module.py
else
resources:
	@echo "The CUDA module was neither built nor inspected: no nvcc (PATH, /usr/local/cuda)."
endif

cpp-library: $(VENV)/.tools
	$(CMAKE) -B build/cpp $(CPP_OPTIONS)
	$(CMAKE) --build build/cpp --target install

cpp: cpp-library  ## the C++ library: built without Python, installed, used by programs
	MAKEFLAGS= PATH=$(abspath $(BIN)):$$PATH CMAKE_PREFIX_PATH=$(abspath build/cpp/install) \
	  $(BIN)/python -m pytest -q tests/test_cpp.py

ifneq ($(shell command -v valgrind),)
instructions: cpp-library  ## instructions of three CPU kernel calls, held to committed counts
	$(CMAKE) --build build/cpp --target instructions
	$(BIN)/python tests/instructions.py build/cpp/instructions
else
instructions:
	@echo "Instructions were not counted: no valgrind (apt-get install valgrind)."
endif

bench: $(VENV)/.bench  ## ours against its peers: 40 minutes; ARGS='-k "paper and mlp"'
	$(BIN)/python -m pytest bench/bench_ops.py -q -p no:cacheprovider \
	  --benchmark-columns=median,iqr,min,rounds $(ARGS)

bench-compare: $(VENV)/.installed  ## is NEW slower? make bench-compare BASE=old.json [NEW=new.json]
	$(BIN)/python bench/compare.py $(BASE) $(NEW)

gpu-check:  ## where there is a GPU: build, test, measure; no .venv: make gpu-check ARGS="--out DIR"
	$(PYTHON) bench/gpu_check.py $(ARGS)

# torch first and pinned: a looser range may fetch another build of several gigabytes.
$(VENV)/.installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/.tools: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet cmake ninja pybind11
	touch $@

# The peers are optional: one that has no build here is listed as absent.
$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet 'dreamfusion-fast[bench]' || \
	  for peer in drjit jax taichi warp-lang; do $(BIN)/python -m pip install --quiet $$peer || true; done
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info dreamfusion_fast/*.so
