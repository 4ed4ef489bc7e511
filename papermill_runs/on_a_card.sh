#!/usr/bin/env bash
# A recipe's training stages on a machine with one GPU, started by one command (nbs/15_card.ipynb says what happens).
#   papermill_runs/on_a_card.sh prepare RECIPE [DATA]   data, sketches, baselines, prompts: on any machine, beforehand
#   papermill_runs/on_a_card.sh RECIPE [DATA]           on the card: train and ask, into papermill_runs/runs/RECIPE
#   make study RECIPE=RECIPE DATA=DATA                  anywhere: takes the folders in and makes the tables
# Between the machines only papermill_runs/runs/RECIPE travels (to the card: runs/*/prompts is enough).
# What the card's machine needs, and WHEELS and GGUF for what it lacks: bare_machine.sh.
#   AT_ONCE=8 PROCESSES=2 LOGS=folder   stages at a time; processes of a stage that only asks; where stages say what they do
set -eu
cd "$(dirname "$0")/.."
flags=()
if [ "$1" = prepare ]; then flags+=(--prepare); shift; fi
source papermill_runs/bare_machine.sh
flags+=(--recipe "$1" --at_once "${AT_ONCE:-8}" --processes "${PROCESSES:-2}")
if [ -n "${2:-}" ]; then flags+=(--data "$2"); fi
if [ -n "${LOGS:-}" ]; then flags+=(--logs "$LOGS"); fi
exec "$PYTHON" -m recnb.card "${flags[@]}"
