"""A whole study: killed with -9 and started again, it ends with the same numbers.

A second run does nothing, and spoilt folders are made again.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

RECIPE = """
task: poi
title: a test
cities:
  alpha:
    checkins: {dataset: made, num_users: 16, num_pois: 40, num_days: 40, seed: 1}
    profiles: {provider: statistics}
common:
  model: {model_checkpoint: tiny-llama}
  sft:
    {tuning: lora, max_steps: 30, save_steps: 5, batch_size: 2, max_length: 2048, warmup_steps: 1}
runs: {one: {city: alpha, prompts: {profile: text}}}
"""
RATING = """
task: rating
title: a test
datasets:
  beta:
    reviews: {dataset: made, num_users: 24, num_items: 60, seed: 1}
    sketch: {n_clusters: 6, top_k: 10}
    baselines: {num_trees: 20}
arms: {HA: {}}
common:
  model: {model_checkpoint: tiny-qwen}
  prompts: {max_history: 5}
  warm_start: {tuning: full, train_rows: 96, num_epochs: 16, batch_size: 8, learning_rate: 5e-3}
  grpo:
    {max_steps: 4, save_steps: 1, num_generations: 4, prompts_per_step: 2, max_new_tokens: 130,
     train_rows: 8, validation_rows: 4, eval_steps: 4}
  reasoning: {train_rows: 32, max_new_tokens: 130, batch_size: 8}
  alignment:
    {rationales: all, training_ratio: 1, max_steps: 2, warmup_steps: 1, validation_rows: 4,
     eval_steps: 2}
  answer_only: {batch_size: 8}
  cot: {batch_size: 4, test_rows: 4, latency_rows: 1, max_new_tokens: 130}
runs: {one: {dataset: beta, arms: [HA]}}
"""
CASES = {  # recipe, a row of its table, the stage to be killed in, the file to be spoilt
    "poi": (RECIPE, "user_bin3", "sft", "evaluate/predictions.parquet"),
    "rating": (RATING, "constant_5", "grpo", "arms/HA/answer_only/predictions.parquet"),
}


def start(recipe, out, **kw):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "recnb.studies", "--recipe", str(recipe), "--out", str(out)],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kw,
    )


def alive(out):
    return subprocess.run(["pgrep", "-f", str(out)], capture_output=True, text=True).stdout.split()


def but_minutes(file):
    "Lines without the time that the work took, the one thing in which two runs of a study differ."
    lines = file.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if '"metric": "minutes"' not in line]
    return [re.sub(r"[\d.]+ (?=measured)", "", " ".join(line.split())) for line in kept]


@pytest.mark.parametrize("task", CASES)
def test_killed_study_ends_the_same(tmp_path, task):
    recipe, row, stage, file = CASES[task]
    (tmp_path / "r.yaml").write_text(recipe)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    p = start(tmp_path / "r.yaml", whole)
    said = p.communicate(timeout=400)[0]
    assert p.returncode == 0 and row in said, said

    p = start(tmp_path / "r.yaml", killed)
    for _ in range(2400):  # until training has a checkpoint
        if list(killed.glob(f"runs/one/{stage}.partial/checkpoints/*")) or p.poll() is not None:
            break
        time.sleep(0.1)
    assert p.poll() is None
    p.send_signal(signal.SIGKILL)
    p.communicate(timeout=60)
    for _ in range(100):  # nothing outlives it
        if not alive(killed):
            break
        time.sleep(0.1)
    assert not alive(killed) and not (killed / "table.txt").exists()

    p = start(tmp_path / "r.yaml", killed)
    assert row in p.communicate(timeout=400)[0] and p.returncode == 0
    for name in ("results.jsonl", "table.txt"):
        assert but_minutes(killed / name) == but_minutes(whole / name), name
    assert (killed / f"runs/one/{file}").read_bytes() == (whole / f"runs/one/{file}").read_bytes()

    if task == "rating":
        return  # the rest is the same code
    # nothing to do; then a stage's file is cut, noticed and made again
    made = (killed / f"runs/one/{file}").with_name("manifest.json").stat().st_mtime_ns
    start(tmp_path / "r.yaml", killed).communicate(timeout=100)
    assert (killed / f"runs/one/{file}").with_name("manifest.json").stat().st_mtime_ns == made
    os.truncate(killed / f"runs/one/{file}", 100)
    p = start(tmp_path / "r.yaml", killed)
    said = p.communicate(timeout=400)[0]
    assert p.returncode == 0 and "predictions.parquet: changed" in said, said
    assert (killed / f"runs/one/{file}").read_bytes() == (whole / f"runs/one/{file}").read_bytes()


def test_runs_that_differ_in_one_parameter_are_rows_of_their_own(tmp_path):
    "Answer-only fine-tuning with another learning rate, or shorter prompts: each is a row."
    runs = """
runs:
  two: {dataset: beta}
  three: {dataset: beta, alignment: {learning_rate: 3e-4}}
  four: {dataset: beta, prompts: {max_history: 3}}
"""
    lines = [x for x in RATING.splitlines() if not x.startswith(("runs:", "arms:"))]
    (tmp_path / "r.yaml").write_text("\n".join([*lines, runs]))
    p = start(tmp_path / "r.yaml", tmp_path / "out")
    said = p.communicate(timeout=400)[0]
    assert p.returncode == 0, said
    found = map(json.loads, (tmp_path / "out/results.jsonl").read_text().splitlines())
    tuned = [r for r in found if r["method"] == "answer-only SFT" and r["metric"] == "MAE"]
    plain = [r for r in tuned if not r["slice"] and "decoder" not in r["settings"]]
    assert len(plain) == 3 and len({str(r["settings"]) for r in plain}) == 3
