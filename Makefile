# Every target sets up what it needs, once: the environment of launch/install.py in .venv.

PYTHON ?= python3
INSTALL_FLAGS ?=
NPROC ?= 2
COMPARE ?=
TRAIN_FLAGS ?=
REPORT_FLAGS ?=
BASE ?= origin/main
COVERED ?= 80
PORT ?= 8080
TESTS ?=

VENV := .venv
INSTALL = $(PYTHON) launch/install.py --venv $(VENV) $(INSTALL_FLAGS)
DATA := data/movielens_sample
RUN := runs/movielens_sample
CONFIG := recsys/recipes/movielens_sample.yaml
PACKAGE := packages/movielens_sample

# Hundreds of processes import the same modules: compiled files must be kept for the next.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install install-dev train serve test test-long test-gpu gpu-report lint docs links coverage wheel test-lowest

help:
	@echo 'make install   virtual environment in $(VENV) with the matching torch, torchrec and fbgemm'
	@echo 'make train     train on the bundled MovieLens sample over $(NPROC) ranks; leaves $(RUN)'
	@echo 'make serve     export that run and answer requests from it on PORT, $(PORT)'
	@echo 'make test      run the tests'
	@echo 'make test-long run what takes minutes: README commands, resharding, lost nodes, killed ranks'
	@echo 'make test-lowest  run the tests with the lowest versions that pyproject.toml admits'
	@echo 'make test-gpu  run what needs GPUs: ten minutes on one, more of it on two and four'
	@echo 'make gpu-report  measure on a GPU, in pieces of ten minutes; without one, print the plan'
	@echo 'make lint      check style, format, types and imports between rooms'
	@echo 'make docs      build the site of all pages in build/site; a warning or a dead link is an error'
	@echo 'make links     ask for every page of others that ours link to'
	@echo 'make coverage  run the tests; COVERED %, $(COVERED), of the lines changed since BASE, $(BASE), must run'
	@echo 'make wheel     build dist/*.whl, and use it in an empty environment outside of the sources'
	@echo ''
	@echo 'PYTHON=python3.12                    another interpreter, 3.11 or newer'
	@echo 'INSTALL_FLAGS="--flavor cuda"        see $(PYTHON) launch/install.py --help'
	@echo 'TESTS=tests/recsys/ranking           make test, test-lowest, coverage: these alone'
	@echo 'NPROC=8                              ranks of make train'
	@echo 'COMPARE=id_only                      make train: the model without content, too, and both compared'
	@echo 'TRAIN_FLAGS="--epochs 1"             make train: further options of recsys train'

install:
	@$(INSTALL)

install-dev:
	@$(INSTALL) --dev

# The schema is the last file that prepare writes: with it the dataset is whole.
$(DATA)/schema.yaml: | install
	$(VENV)/bin/recsys prepare movielens --history-length 200 --out $(DATA)

train: install $(DATA)/schema.yaml
	$(VENV)/bin/torchx run -s local_cwd launch/components.py:train --nproc $(NPROC) -- \
		--config $(CONFIG) --data $(DATA) --out $(RUN) --overwrite \
		$(if $(COMPARE),--compare $(COMPARE)) $(TRAIN_FLAGS)

# --dev has the packages of the server.
$(PACKAGE)/manifest.json: $(RUN)/metrics.json | install-dev
	rm -rf $(PACKAGE)
	$(VENV)/bin/recsys export --run $(RUN) --out $(PACKAGE)

serve: install-dev $(PACKAGE)/manifest.json
	$(VENV)/bin/recsys serve $(PACKAGE) --port $(PORT)

test: install-dev
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile $(TESTS)

# The lowest versions that pyproject.toml admits; `make test` has the newest.
test-lowest: VENV := build/lowest
test-lowest: export PIP_CONSTRAINT := $(CURDIR)/build/lowest.txt
test-lowest: build/lowest.txt test

build/lowest.txt: pyproject.toml
	mkdir -p build
	sed -nE '/^dependencies/,/^\[project.urls/s/.*"([A-Za-z0-9-]+).*>=([0-9.]+).*/\1==\2/p' $< > $@

# The commands of the pages take longest: begun last, they would keep one process waiting. Ranks
# that are killed wait for each other, so that the tests run beside them.
test-long: install-dev
	@$(VENV)/bin/python -m tests.recsys.checkpoint.kill_ranks --kills 8 & kill_ranks=$$!; \
	$(VENV)/bin/python -m pytest -m "long and not gpu" -n 2 --dist loadfile tests/test_readme.py tests; \
	failed=$$?; wait $$kill_ranks && exit $$failed

# One process: its ranks take the GPUs. -rs lists what was skipped, and why.
test-gpu: INSTALL_FLAGS += --flavor cuda
test-gpu: install-dev
	$(VENV)/bin/python -m pytest -m gpu -n 0 -rs

# Calls again go on; benchmarks/results/gpu.md has what has run.
gpu-report: install-dev
	$(VENV)/bin/python -m benchmarks.gpu_report --out runs/gpu_report $(REPORT_FLAGS)

lint: install-dev
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy --num-workers 2
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/python -m pytest -q -n 0 tests/test_plain_names.py
	$(VENV)/bin/python -m recsys.config.settings_page --check

# --fresh-env: pages without a change would keep their warnings to themselves.
docs: install-dev
	$(VENV)/bin/python -m sphinx --quiet --fresh-env --fail-on-warning --conf-dir launch/docs \
		--doctree-dir build/doctrees . build/site

# Needs the network, so a nightly workflow runs it. The page lists what is broken.
links: install-dev
	$(VENV)/bin/python -m sphinx --quiet --builder linkcheck --conf-dir launch/docs \
		--doctree-dir build/doctrees . build/links

# Lines that only ranks in processes of their own run, or only long tests, count as not run.
coverage: install-dev
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --cov recsys --cov embeddings --cov launch \
		--cov-report xml:build/coverage.xml $(TESTS)
	$(VENV)/bin/diff-cover build/coverage.xml --compare-branch $(BASE) --fail-under $(COVERED)

# A file that was renamed stays in build/ and would enter the wheel.
wheel: install-dev
	rm -rf build dist
	$(VENV)/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(VENV)/bin/python -m pytest -m long -n 0 tests/launch/test_wheel.py
