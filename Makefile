# `make demo` and `make test` need Python 3.11+, make, a C++ compiler and a package index; nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# The exact versions that the tests last passed with on a fresh machine; CONSTRAINTS= takes what is newest.
CONSTRAINTS ?= constraints.txt

.PHONY: install demo test coverage test-versions lint docs format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c "import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f'dbpkern needs Python 3.11 or newer, {sys.executable} is {v.major}.{v.minor}; set PYTHON=')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[dev]'
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

# The part of the lines that the tests run in their own processes; kernels in Triton's interpreter do not count.
coverage: install
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --cov=dbpkern --cov=models --cov=train

# The tests of ops, kernels, engine and optimizers with the oldest and the newest supported torch, each with its
# Triton, and two between; every one has a virtual environment of its own, of several GB.
# The interpreters of older Tritons do what later numpys warn of or refuse.
VERSIONS ?= 2.9 2.11 2.14 newest
CORE := tests/dbpkern/ops tests/dbpkern/optim tests/dbpkern/layers $(addprefix tests/dbpkern/test_,capture.py \
	config.py engine.py stability.py statistics.py)

test-versions: $(addprefix test-torch-,$(VERSIONS))

test-torch-%:
	$(PYTHON) -m venv .versions/$*
	.versions/$*/bin/python -m pip install --quiet --upgrade pip
	.versions/$*/bin/python -m pip install --quiet --editable . 'torch$(if $(filter newest,$*),,==$*.*)' \
		torchvision 'timm>=1.0.26' 'numpy$(if $(filter 2.9 2.11,$*),<1.25,>=1.26)' 'pytest>=8' 'pytest-xdist>=3.6'
	.versions/$*/bin/python -c "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__)"
	.versions/$*/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(CORE)

# A static site in build/site. Pages lie there as in the repository, so that links work in both; a broken one fails.
PAGES := build/pages

docs: install
	rm -rf $(PAGES)
	mkdir -p $(PAGES)/bench
	cp -R CONTRIBUTING.md CHANGELOG.md docs $(PAGES)
	cp README.md $(PAGES)/index.md
	cp -R bench/RESULTS.md bench/reports bench/results $(PAGES)/bench
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "site: build/site/index.html"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .versions dist build .pytest_cache .ruff_cache
