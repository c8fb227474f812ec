# Each target does its own set-up: a virtual environment, torch, the compiled kernels.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?= a red car
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)

.PHONY: demo test check gpu-check clean

demo: $(VENV)/.installed  ## text to 3D with the embedded prior: make demo PROMPT="a blue duck"
	$(BIN)/dreamfusion-fast doctor
	rm -rf runs/demo
	$(BIN)/dreamfusion-fast generate "$(PROMPT)" --out runs/demo

test: check  ## lint, then every test
	$(BIN)/python -m pytest

check: $(VENV)/.installed  ## lint only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

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
