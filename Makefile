# `make all` runs the embedded benchmark, `make test` the tests; both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORES ?= 8
# Processes that share the tests (pytest-xdist).
WORKERS ?= logical

.PHONY: all claims t2i install test lint format status reference paper-tables clean

all: install
	$(BIN)/snakemake --cores $(CORES) all

claims: install
	$(BIN)/snakemake --cores $(CORES) all --configfile configs/digits-claims.yaml

t2i: install
	$(BIN)/snakemake --cores $(CORES) all --configfile configs/digits-t2i.yaml

test: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check Snakefile harness/workflow/rules

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile harness/workflow/rules

status: install
	@$(BIN)/python -m harness status

paper-tables: install
	@$(BIN)/python -m harness paper-tables

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; name one with make PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Keep the tables, figures and manifest of a finished experiment in the repository.
EXPERIMENT ?= digits
reference:
	test -f results/$(EXPERIMENT)/manifest.json
	mkdir -p results/reference/$(EXPERIMENT)/figures
	cd results/$(EXPERIMENT) && cp -r tables manifest.json report.html ../reference/$(EXPERIMENT)/
	cp results/$(EXPERIMENT)/figures/*.png results/reference/$(EXPERIMENT)/figures/

clean:
	rm -rf results/digits .snakemake
