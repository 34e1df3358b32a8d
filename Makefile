# `make all` runs the embedded benchmark, `make test` the fast tests; both set up .venv first.
PYTHON ?= python3
VENV := .venv
MINIMUM := .venv-minimum
BIN := $(VENV)/bin
CORES ?= 8
# Processes of pytest-xdist; files are not split, because they share fixtures.
WORKERS ?= logical
CHECK_PYTHON = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "error: Python 3.11 or newer is needed; name one with make PYTHON=/path/to/python3"; exit 1; }
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: all claims t2i install test test-slow test-minimum lint format status reference paper-tables clean

all: install
	$(BIN)/snakemake --cores $(CORES) all

claims: install
	$(BIN)/snakemake --cores $(CORES) all --configfile configs/digits-claims.yaml

t2i: install
	$(BIN)/snakemake --cores $(CORES) all --configfile configs/digits-t2i.yaml

test: install
	$(PYTEST) -m "not slow and not workflow and not gpu and not cluster"

# Everything that `make test` leaves out, except what needs a GPU or Slurm.
test-slow: install
	$(PYTEST) -m "(slow or workflow) and not gpu and not cluster"

# Tests of the dependencies, with the lowest versions that pyproject.toml allows. None is skipped.
test-minimum: $(MINIMUM)/.installed
	$(MINIMUM)/bin/python -m pytest -p tests.minimum -m contract

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile harness/workflow/rules
	$(BIN)/lint-imports
	$(BIN)/python tools/check_language.py

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile harness/workflow/rules

status: install
	@$(BIN)/harness status

paper-tables: install
	@$(BIN)/harness paper-tables

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(MINIMUM)/.installed: pyproject.toml constraints-minimum.txt
	@$(CHECK_PYTHON)
	@test -x $(MINIMUM)/bin/python || $(PYTHON) -m venv $(MINIMUM)
	$(MINIMUM)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints-minimum.txt -e '.[text-to-image,pretrained,loggers,parquet]' pytest
	@touch $@

# Copy the tables, figures, page and manifest of a finished experiment into the repository, and its
# numbers into README.md.
EXPERIMENT ?= digits
reference:
	test -f results/$(EXPERIMENT)/manifest.json
	mkdir -p results/reference/$(EXPERIMENT)/figures
	cd results/$(EXPERIMENT) && cp -r tables manifest.json report.html ../reference/$(EXPERIMENT)/
	cp results/$(EXPERIMENT)/figures/*.png results/reference/$(EXPERIMENT)/figures/
	$(BIN)/python -m tools.readme_tables

clean:
	rm -rf results/digits .snakemake
