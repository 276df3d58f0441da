# A bare machine with Python and make needs nothing else: each target makes the environment it runs in.
# PYTHON chooses the interpreter (3.10 or newer); PYTEST_ARGS is passed on to pytest, BENCH_ARGS to the benchmark. Tests run in
# WORKERS processes: by itself one for each core, but no more than eight, each of which may take 3 GB; `WORKERS=0` is one, in the open.

PYTHON ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?=
WORKERS ?= auto

VENV := .venv
OLDEST := .venv-oldest
PEER := .venv-peer
PYTHONS ?= 3.10 3.12 3.13 3.14
TORCH := 2.13.0
PYTEST := -m pytest -n $(WORKERS) --maxprocesses 8 --dist worksteal

# A pip that says little, and asks nothing.
PIP := -m pip --disable-pip-version-check --no-input
PIP_QUIET := -qq --progress-bar off

.DEFAULT_GOAL := help
.PHONY: help demo test check bench docs pages support model test-oldest test-pythons peer constraints format wheel clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch goes in first and by itself, pinned: whatever needs a torch afterwards finds one, and nothing brings another build.
define environment
@$(2) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "nnsight needs Python 3.10 or newer: make PYTHON=python3.12 ..."; exit 1; }
@echo "== making $(1) with $$($(2) --version), the first time takes a few minutes"
@test -x $(1)/bin/python || $(2) -m venv $(1)
@$(1)/bin/python $(PIP) install $(PIP_QUIET) -c $(4) torch
@$(1)/bin/python $(PIP) install $(PIP_QUIET) -c $(4) -e '$(3)'
endef

PLAIN_STAMP := $(VENV)/.installed-plain
DEV_STAMP := $(VENV)/.installed-dev

$(PLAIN_STAMP): pyproject.toml constraints.txt
	$(call environment,$(VENV),$(PYTHON),.,constraints.txt)
	@touch $@

$(DEV_STAMP): pyproject.toml constraints.txt
	$(call environment,$(VENV),$(PYTHON),.[dev],constraints.txt)
	@touch $@ $(PLAIN_STAMP)

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(call environment,$(OLDEST),$(PYTHON),.[test],constraints-oldest.txt)
	@touch $@

demo: $(PLAIN_STAMP)  ## Show what the library does, on the model that comes with it
	@$(VENV)/bin/nnsight demo

test: $(DEV_STAMP)  ## Run all tests
	$(VENV)/bin/python $(PYTEST) $(PYTEST_ARGS)

check: $(DEV_STAMP)  ## Format, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: $(DEV_STAMP)  ## Let ruff mend what it can
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

docs: $(DEV_STAMP)  ## Build the documentation into site/, strictly
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	@echo "site/index.html"

pages: $(DEV_STAMP)  ## Write what the examples of README.md and docs/ print now into the pages
	$(VENV)/bin/python tests/documents.py README.md docs/*.md

bench: $(DEV_STAMP) $(PEER)/.installed  ## Measure against plain hooks, and against nnsight 0.8.1 in an environment of its own
	$(VENV)/bin/python benchmarks/bench.py --peer $(PEER) $(BENCH_ARGS)

support: $(DEV_STAMP) $(OLDEST)/.installed  ## Verify all kinds of language models with both versions, and write docs/support.md
	@mkdir -p build
	$(VENV)/bin/python tools/support/table.py --json build/support-newest.json
	$(OLDEST)/bin/python tools/support/table.py --json build/support-oldest.json
	$(VENV)/bin/python tools/support/page.py build/support-newest.json build/support-oldest.json
	$(VENV)/bin/python tools/support/others.py

model: $(DEV_STAMP)  ## Train the bundled model anew into build/model, in two hours or more on two cores
	$(VENV)/bin/python tools/demo/recipe.py build/model

test-oldest: $(OLDEST)/.installed  ## Run all tests with the oldest dependencies, transformers 5.2.0 among them
	$(OLDEST)/bin/python $(PYTEST) $(PYTEST_ARGS)

# torch for these comes with the accelerator's libraries: several gigabytes each.
test-pythons:  ## Run the laws on each of PYTHONS that is installed
	@for version in $(PYTHONS); do \
	  python=$$(ls -d $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$$version.*/bin/python 2>/dev/null | tail -1); \
	  python=$${python:-$$(command -v python$$version)}; \
	  if [ -z "$$python" ]; then echo "== Python $$version: not installed, skipped"; continue; fi; \
	  $(MAKE) --no-print-directory .venv-$$version/.installed PYTHON=$$python VERSION=$$version || exit 1; \
	  echo "== Python $$version: tests/laws"; \
	  .venv-$$version/bin/python $(PYTEST) tests/laws $(PYTEST_ARGS) || exit 1; \
	done

.venv-$(VERSION)/.installed: pyproject.toml constraints.txt
	$(call environment,.venv-$(VERSION),$(PYTHON),.[test],constraints.txt)
	@touch $@

peer: $(PEER)/.installed  ## Make the environment of the package that `make bench` compares with

$(PEER)/.installed: Makefile
	@echo "== making $(PEER) with nnsight 0.8.1"
	@$(PYTHON) -m venv $(PEER)
	@$(PEER)/bin/python $(PIP) install $(PIP_QUIET) torch==$(TORCH)
	@$(PEER)/bin/python $(PIP) install $(PIP_QUIET) nnsight==0.8.1 transformers==5.23.0
	@touch $@

# One file for every Python and system, by uv's universal resolution; packages that only an accelerator's torch needs are left out.
UV := .venv-uv/bin/uv pip compile pyproject.toml --universal --python-version 3.10 --fork-strategy requires-python \
      --no-annotate --no-header --quiet -c -
PINS := torch==$(TORCH)
UNPINNED := ^(nvidia|cuda|triton|setuptools)

constraints: ; @test -x .venv-uv/bin/uv || { $(PYTHON) -m venv .venv-uv && .venv-uv/bin/python $(PIP) install $(PIP_QUIET) uv; }  ## Pin everything anew
	@{ echo "# Made by \`make constraints\`: the newest of everything, for every Python from 3.10 on."; \
	   printf '%s\n' '$(PINS)' 'transformers==5.23.0 ; python_version >= "3.11"' \
	   | UV_PYTHON_DOWNLOADS=never $(UV) --extra dev --extra notebook | grep -Ev '$(UNPINNED)'; } > constraints.tmp
	@mv constraints.tmp constraints.txt
	@{ echo "# Made by \`make constraints\`: the oldest of what pyproject.toml admits, for the second leg of the tests."; \
	   printf '%s\n' '$(PINS)' 'transformers==5.2.0' 'greenlet==3.2.4' 'accelerate==1.3.0' 'rich==13.7.*' 'typer==0.16.0' 'click==8.2.1' 'peft==0.18.1' 'diffusers==0.37.1' \
	   | UV_PYTHON_DOWNLOADS=never $(UV) --extra test | grep -Ev '$(UNPINNED)'; } > constraints.tmp
	@mv constraints.tmp constraints-oldest.txt

wheel: $(DEV_STAMP)  ## Build the wheel and the source archive into dist/
	$(VENV)/bin/python -m build --installer pip

clean:  ## Remove everything that make made
	rm -rf .venv .venv-* build dist site htmlcov .coverage .mypy_cache .ruff_cache .pytest_cache
