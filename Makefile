# Two commands: `make demo` trains and shows everything, `make test` checks everything. Both make .venv first.
PYTHON ?= python3
# Extras to install, such as EXTRA=gpu or EXTRA=cpu,s3; without EXTRA, those that are there stay.
INSTALLED := $(patsubst .venv/.ready-%,%,$(firstword $(wildcard .venv/.ready-*)))
EXTRA ?= $(or $(INSTALLED),cpu)
BIN := .venv/bin
READY = .venv/.ready-$(EXTRA)
DEV = .venv/.dev-$(EXTRA)
# uv is several times faster than pip, and does not read pip's own setting for local wheels.
UV = $(BIN)/uv pip install --python $(BIN)/python -q $(foreach place,$(PIP_FIND_LINKS),--find-links $(place))
INSTALL = $(UV) -c constraints.txt
TIMES = workspace/demo/recipes/demo/times.json
# Oracles whose own pins do not go with the project's, or that would slow every process down (open_clip imports a
# transformers that it finds); tests load them from a folder apart, without their dependencies.
ORACLES = diffusers==0.37.1 k-diffusion==0.1.1.post1 transformers==5.23.0 tokenizers==0.23.3 clip-retrieval==2.45.0
# Empty is unset: every worker imports some 3,000 modules, twice as slowly where containers forbid to keep their bytecode.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-all coverage lint docs clean setup dev

demo: $(READY) $(TIMES)
	$(BIN)/unclip run configs/demo.toml

# With the times of its steps a run says from its first second how long it takes; it does not depend on them.
$(TIMES): configs/demo.toml | $(READY)
	-$(BIN)/unclip plan configs/demo.toml --time

test: $(DEV) lint
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-all: $(DEV) lint
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

coverage: $(DEV)
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" --cov

lint: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

docs: $(READY)
	$(BIN)/python -m jobs.reference > docs/config.md
	$(BIN)/python -m benchmarks.page > docs/benchmarks.md
	$(BIN)/python -m pipeline.shapes.describe > docs/pairs.md

setup: $(READY)

dev: $(DEV)

# The two builds of FAISS fill the same folder: one over the other, or one taken from under the other, breaks both.
$(READY): pyproject.toml constraints.txt
	@echo "$(EXTRA)" | grep -qwE 'cpu|gpu' || { echo "EXTRA needs cpu or gpu, as in EXTRA=cpu,$(EXTRA)"; exit 2; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "unclip needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q uv
	test -e $@ || $(BIN)/uv pip uninstall -q --python $(BIN)/python faiss-cpu faiss-gpu
	rm -f .venv/.ready-* .venv/.dev-*
	$(INSTALL) -e '.[$(EXTRA)]'
	touch $@

$(DEV): $(READY)
	$(INSTALL) -e '.[$(EXTRA),dev]'
	$(UV) --no-deps --target .venv/oracles $(ORACLES)
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache .hypothesis
