"Of every stage: what a key calls the same is the same to the byte; other bytes, another key."

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import every_stage
import pytest
from conftest import ROOT
from every_stage import RUNS, STAGES, make_all

from recnb.artifacts import compute_key


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every stage twice: here, and in another process, place, zone, with other threads, speeds and
    hash seed."""
    base = tmp_path_factory.mktemp("keys")
    there = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TZ": "Asia/Tokyo"}
    there |= {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONHASHSEED": "2"}
    command = [sys.executable, every_stage.__file__, str(base / "deep/er/b"), "SECOND"]
    with open(base / "said", "w+") as said:
        second = subprocess.Popen(
            command, env=there, stdout=subprocess.PIPE, stderr=said, text=True
        )
        with contextlib.chdir(base):
            first = make_all(Path("a"), second=False)
        told = second.communicate(timeout=600)[0]
        said.seek(0)
        assert second.returncode == 0, said.read()[-3000:]
    return first, json.loads(told)


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
