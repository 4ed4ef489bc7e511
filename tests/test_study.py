"A whole study: killed with -9 and started again, it ends with the same numbers; a second run does nothing; spoilt folders are made again."
import os, signal, subprocess, sys, time

from conftest import ROOT

RECIPE = """
task: poi
title: a test
cities: {alpha: {checkins: {dataset: made, users: 16, pois: 40, days: 40, seed: 1}, profiles: {provider: statistics}}}
common: {model: {model_checkpoint: tiny-llama}, sft: {method: lora, max_steps: 30, save_steps: 5, batch_size: 2, max_length: 2048, warmup_steps: 1}}
runs: {one: {city: alpha, prompts: {profile: text}}}
"""


def start(recipe, out, **kw):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "recnb.studies", "--recipe", str(recipe), "--out", str(out)], cwd=ROOT, env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kw)


def alive(out): return subprocess.run(["pgrep", "-f", str(out)], capture_output=True, text=True).stdout.split()


def test_killed_study_ends_the_same(tmp_path):
    (tmp_path/"r.yaml").write_text(RECIPE)
    whole, killed = tmp_path/"whole", tmp_path/"killed"
    p = start(tmp_path/"r.yaml", whole)
    said = p.communicate(timeout=400)[0]
    assert p.returncode == 0 and "user_bin3" in said, said

    p = start(tmp_path/"r.yaml", killed)
    for _ in range(2400):   # until training has a checkpoint
        if list(killed.glob("runs/one/sft.partial/checkpoints/*")) or p.poll() is not None: break
        time.sleep(.1)
    assert p.poll() is None
    p.send_signal(signal.SIGKILL)
    p.communicate(timeout=60)
    for _ in range(100):    # nothing outlives it
        if not alive(killed): break
        time.sleep(.1)
    assert not alive(killed) and not (killed/"table.txt").exists()

    p = start(tmp_path/"r.yaml", killed)
    assert "user_bin3" in p.communicate(timeout=400)[0] and p.returncode == 0
    for name in ("results.jsonl", "table.txt", "runs/one/evaluate/predictions.parquet"):
        assert (killed/name).read_bytes() == (whole/name).read_bytes(), name

    # nothing to do; then a stage's file is cut, noticed and made again
    made = (killed/"runs/one/evaluate/manifest.json").stat().st_mtime_ns
    start(tmp_path/"r.yaml", killed).communicate(timeout=100)
    assert (killed/"runs/one/evaluate/manifest.json").stat().st_mtime_ns == made
    os.truncate(killed/"runs/one/evaluate/predictions.parquet", 100)
    p = start(tmp_path/"r.yaml", killed)
    said = p.communicate(timeout=400)[0]
    assert p.returncode == 0 and "predictions.parquet: changed" in said, said
    assert (killed/"runs/one/evaluate/predictions.parquet").read_bytes() == (whole/"runs/one/evaluate/predictions.parquet").read_bytes()
