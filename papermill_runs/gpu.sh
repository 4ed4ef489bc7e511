#!/usr/bin/env bash
# `make gpu` on a machine that has a card and little else (nbs/27_gpu.ipynb says what is asked).
#   papermill_runs/gpu.sh --prepare   data and prompts: on any machine, beforehand, where the card's lacks the libraries for them
#   papermill_runs/gpu.sh             on the card, at most eight minutes, without the Hub: writes papermill_runs/runs/gpu/gpu.json
#   make record RECIPE=gpu            anywhere, with that file in that place: takes its numbers in
# Between the machines papermill_runs/runs/gpu travels: made and recipes to the card, gpu.json back.
# What the card's machine needs, and WHEELS and GGUF for what it lacks: bare_machine.sh. QLoRA wants the wheel of bitsandbytes too,
# Liger's kernels that of liger-kernel (fine-tuning uses them on a card by default), quick-rating that of recbole; a part whose library
# is missing says so, and the others go on. Run so far on a CPU alone, with tiny models.
set -eu
cd "$(dirname "$0")/.."
source papermill_runs/bare_machine.sh
exec "$PYTHON" -m recnb.gpu "$@"
