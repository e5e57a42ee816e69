# make demo: install, train the embedded shapes from 8 to 32 px, draw samples. make test: install, lint, types, tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2

.PHONY: install demo test lint types unit clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch first and pinned: a looser requirement would pull a CUDA build of several gigabytes.
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	# Apart from the others: its package wants torchvision, and torchmetrics would take it for complete. Its Inception is tested.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/alone "$$(grep '^torch-fidelity==' constraints.txt)"
	touch $@

demo: install
	$(BIN)/python -m recipes.demo --out runs/demo

lint: install
	$(BIN)/ruff check src tests benchmarks recipes
	$(BIN)/ruff format --check src tests benchmarks recipes

types: install
	$(BIN)/mypy

unit: install
	$(BIN)/python -m pytest -n 2

test: lint types unit

clean:
	rm -rf build dist runs/demo
