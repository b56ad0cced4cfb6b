# Two commands on a fresh machine: `make demo` and `make test`. Needs Python 3.11+ (with venv), make and a C++ compiler.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The CPU build of torch: 0.2 GB instead of several GB of CUDA libraries. Asked only where there is no GPU.
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
SOURCES := setup.py pyproject.toml constraints.txt MANIFEST.in $(shell find csrc -name '*.cpp' -o -name '*.h')
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test test-slow test-candidates lint bench install clean

demo: $(STAMP)
	$(BIN)/muka-fast demo

# One thread per process: the tests' tensors are tiny, and two pytest workers share the cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) $(PYTEST_ARGS)

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) -m 'slow and not gpu' $(PYTEST_ARGS)

# Tiles that no architecture takes yet: minutes of compilation, needed after a change of kernels, tiles or Triton.
test-candidates: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) -m candidate $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .

bench: $(STAMP)
	$(BIN)/python bench/throughput.py

install: $(STAMP)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "muka-fast needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Rebuilt when the C++ or a requirement changes. Our build tools come from the environment (no isolation), so a rebuild is offline;
# deepspeed is built isolated, before: where its setup.py sees a CUDA torch but no toolkit, it fails.
$(STAMP): $(SOURCES) | $(BIN)/python
	@echo "Installing into $(VENV): a few minutes the first time"
	@if command -v nvidia-smi >/dev/null 2>&1; then \
	  grep -v -i '^triton==' constraints.txt > $(VENV)/constraints.txt; \
	else \
	  cp constraints.txt $(VENV)/constraints.txt; \
	  $(BIN)/python -c 'import torch' >/dev/null 2>&1 || { \
	    index=$$($(BIN)/python -c "import urllib.request as u; u.urlopen('$(TORCH_CPU_INDEX)/', timeout=5)" >/dev/null 2>&1 \
	      && echo "--index-url $(TORCH_CPU_INDEX)" \
	      || echo "$(TORCH_CPU_INDEX) does not answer: $(TORCH) comes from the default index" >&2); \
	    $(PIP) install $$index $(TORCH); }; \
	fi
	$(PIP) install -c $(VENV)/constraints.txt setuptools pybind11 deepspeed
	$(PIP) install -c $(VENV)/constraints.txt --no-build-isolation -e '.[test,tensorboard]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .ruff_cache muka_fast/_C*.so
