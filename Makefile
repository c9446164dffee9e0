# make install | demo | test | lint | bench      (install only builds .venv; the others call it)
# JOBS is how many tests run at a time; TORCH_INDEX_URL picks where torch comes from, e.g. https://download.pytorch.org/whl/cpu

VENV ?= .venv
PYTHON ?= python3
JOBS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TORCH := $(PIP) -c constraints.txt $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) torch
export HF_HUB_OFFLINE ?= $(if $(filter demo test bench,$(MAKECMDGOALS)),1,0)
export OMP_NUM_THREADS ?= 2

.PHONY: install install-dev demo test lint bench clean

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# torch first: later packages then find the wanted build instead of fetching another one.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(TORCH)
	DS_BUILD_OPS=0 $(PIP) -c constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -c constraints.txt --editable '.[dev,quant]'
	touch $@

demo: install
	PATH="$(abspath $(BIN)):$$PATH" deepspeed launch/train.py --ds_config ds_configs/zero2.json

test: export OMP_NUM_THREADS := 1
test: install-dev
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -n $(JOBS) --cov=lw_fast --cov-report=term:skip-covered --cov-fail-under=85

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: install-dev
	$(BIN)/python benchmarks/kernels.py --quick

clean:
	rm -rf $(VENV) build dist *.egg-info
