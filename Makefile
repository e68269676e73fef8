# `make demo` and `make test` need Python 3.11+, make, a C++ compiler and a package index; nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install demo test lint format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c "import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f'dbpkern needs Python 3.11 or newer, {sys.executable} is {v.major}.{v.minor}; set PYTHON=')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# Two arms, plain and decorrelated, on photographs that ship with scikit-image and scikit-learn.
DEMO := runs/demo
PRETRAIN := $(BIN)/torchrun --standalone --nproc_per_node 1 train/pretrain.py --config train/configs/demo.yaml

demo: install
	rm -rf $(DEMO)
	$(PRETRAIN) --out $(DEMO)/plain
	$(PRETRAIN) --out $(DEMO)/dbp --decor.enable true
	$(BIN)/python -m train.compare $(DEMO)/plain $(DEMO)/dbp --out $(DEMO)/comparison.png
	@echo "pictures: $(DEMO)/plain/*.png $(DEMO)/dbp/*.png"

# By files, whose tests share what is slow to set up.
test: install
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache
