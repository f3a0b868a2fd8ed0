# Two commands, each does all its set-up in .venv from nothing and re-uses it when current.
#   make train   train a Flax model on real digits through jaxsgd
#   make test    lint, types, docs in step with the code, tests
#   make quick   lint and the tests that find most mistakes, in a minute
#   make site    the documents as a site, in site/
#   make slow    the tests that test leaves out
#   make bench   speed beside optax, torch (if installed) and SciPy; writes docs/performance.md
#   make plans   the tests that need the compilers for TPU and CUDA, in an environment of their own (2.6 GB)
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt
ARGS ?=
FIRST := core/test_layers core/test_rooms core/test_numerics rules/test_momentum training/test_record \
	rules/test_adding_a_rule rules/test_transforms training/test_train
# Most of the tests' time is compiling. These flags take two thirds off: LLVM without its costly passes, the emitter of
# fusions that does not go through MLIR, one module a program, no work on loops, which copies them whole, and no checks
# of XLA's own between its passes. `make plans` and `make train` compile as users do.
QUICK := --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true \
	--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 \
	--xla_disable_hlo_passes=while-loop-invariant-code-motion,simplify-while-loops,hlo-verifier

# A worker that dies is not replaced: pytest-xdist 3.8 then waits without end if tests are in groups.
TWO := -n 2 --dist loadgroup --max-worker-restart 0

.PHONY: help train quick test slow packagers package sitemakers site compilers plans bench lint types documents format tables \
	clean

help:
	@echo "make train | quick | test | slow | package | site | plans | bench | lint | format | tables | clean"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jaxsgd needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1); say make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.examples: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[examples]'
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[test]'
	@touch $@ $(VENV)/.examples

train: $(VENV)/.examples
	$(RUN) examples/digits.py $(ARGS)

lint: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(MAKE) --no-print-directory -j 2 types documents

types: $(VENV)/.test
	$(RUN) -m pyright

documents: $(VENV)/.test
	$(RUN) tools/catalog.py --check
	$(RUN) tools/ledger.py --check
	$(RUN) tools/stubs.py --check
	$(RUN) tools/prose.py

test: lint
	XLA_FLAGS="$(QUICK) $$XLA_FLAGS" $(RUN) -m pytest $(TWO) -m "not slow" $(ARGS)

quick: $(VENV)/.test
	$(RUN) -m ruff check .
	XLA_FLAGS="$(QUICK) $$XLA_FLAGS" $(RUN) -m pytest $(TWO) -m "not slow" $(FIRST:%=tests/%.py) $(ARGS)

packagers: $(VENV)/.test
	$(PIP) 'build>=1.2' 'twine>=6'

package: packagers
	rm -rf dist
	$(RUN) -m build --outdir dist
	$(RUN) -m twine check --strict dist/*

$(VENV)/.docs: $(VENV)/.test
	$(PIP) -e '.[docs]'
	@touch $@

sitemakers: $(VENV)/.docs

site: sitemakers
	PYTHONPATH=tools NO_MKDOCS_2_WARNING=1 JAX_PLATFORMS=cpu $(RUN) -m mkdocs build --quiet --strict

bench: $(VENV)/.test
	$(RUN) benchmarks/all.py $(ARGS)

slow: $(VENV)/.test
	XLA_FLAGS="$(QUICK) $$XLA_FLAGS" $(RUN) -m pytest $(TWO) -m slow $(ARGS)

$(VENV)-compilers/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-compilers
	$(VENV)-compilers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,compilers]'
	@touch $@

compilers: $(VENV)-compilers/.done

plans: compilers
	JAX_PLATFORMS=cpu $(VENV)-compilers/bin/python -m pytest $(TWO) -m compiler $(ARGS)

format: $(VENV)/.test
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

tables: $(VENV)/.test
	PYTHONPATH=tests:tests/rules $(RUN) tests/helpers/agreement.py
	$(RUN) tools/catalog.py --write
	$(RUN) tools/stubs.py

clean:
	rm -rf $(VENV) $(VENV)-compilers dist site .cache .pytest_cache .ruff_cache .hypothesis runs
