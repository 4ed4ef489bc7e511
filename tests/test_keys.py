"Of every stage: what a key calls the same is the same to the byte; other bytes, another key."

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from every_stage import RUNS, STAGES

from recnb.artifacts import compute_key


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Every stage twice: in another process, place, zone, with other threads, speeds and hash seed."
    base = tmp_path_factory.mktemp("keys")
    common = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    script = str(Path(__file__).parent / "every_stage.py")
    first = {**common, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "1", "TZ": "UTC"}
    second = {**common, "OMP_NUM_THREADS": "3", "PYTHONHASHSEED": "2", "TZ": "Asia/Tokyo"}
    calls = [("FIRST", "a", first), ("SECOND", str(base / "deep/er/b"), second)]
    running = [
        subprocess.Popen(
            [sys.executable, script, where, which],
            cwd=base,
            env=env,
            stdout=subprocess.PIPE,
            stderr=open(base / which, "w"),
            text=True,
        )
        for which, where, env in calls
    ]
    said = [process.communicate(timeout=600)[0] for process in running]
    for process, (which, *_) in zip(running, calls):
        assert process.returncode == 0, (base / which).read_text()[-3000:]
    return [json.loads(text) for text in said]


def test_every_stage_is_here():
    assert {name for name, *_ in STAGES} == set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_the_same_key_has_the_same_bytes(made, name):
    first, second = made
    assert first[name][:2] == second[name][:2]


def test_another_result_has_another_key(made):
    keys = {}
    for runs in made:
        for key, digest, *variant in runs.values():
            for k, d in [(key, digest), variant] if variant else [(key, digest)]:
                assert keys.setdefault(k, d) == d
    varied = [name for name, runs in made[0].items() if len(runs) == 4]
    assert len(varied) > 12
    for name in varied:
        key, digest, other_key, other_digest = made[0][name]
        assert key != other_key and digest != other_digest, name


@pytest.mark.parametrize("name", RUNS)
def test_every_parameter_but_place_and_speed_counts(name):
    "Whatever a parameter's value is changed to, the key changes with it."
    fields = dataclasses.fields(RUNS[name].Params)
    p = RUNS[name].Params(**{f.name: f.name for f in fields})
    for f in fields:
        q = dataclasses.replace(p, **{f.name: "another"})
        same = compute_key(name, 1, p, {}) == compute_key(name, 1, q, {})
        assert same == (f.name == "out" or bool(f.metadata.get("runtime"))), f.name
