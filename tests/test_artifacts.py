"Stages as programs: bad flags, two processes under torchrun, kill -9."

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from costs import costs_at_most

from recnb.artifacts import load_artifact, write_json
from recnb.poi import checkins, profiles, prompts, trajectories
from recnb.stages import BadInput, parse_arguments

STAGE = """
from __future__ import annotations
import os, sys, time
from dataclasses import dataclass
from pathlib import Path
from recnb.artifacts import stage, write_json
from recnb.stages import BadInput, Source, run_as_command

@dataclass
class Params:
    "Write one file a process."
    text: Source        # input
    out: str            # folder to write
    pause: float = 0    # seconds before the end
    broken: bool = False  # fail as bad input does

@stage("toy.ranks", Params)
def run(p, folder):
    rank = int(os.environ.get("RANK", 0))
    if p.broken: raise BadInput("a whole number", file=p.text, row=3, column="k", value="x")
    (folder/f"begun{rank}").touch()
    time.sleep(p.pause)
    write_json(rank, folder/f"rank{rank}.json")
    return dict(found=len(list(folder.glob("begun*"))))

run_as_command(run, __name__)
"""


@pytest.fixture
def here(tmp_path):
    (tmp_path / "toy.py").write_text(STAGE)
    (tmp_path / "text").write_text("abc")
    return tmp_path


def call(here, *args):
    env = {**os.environ, "PYTHONPATH": f"{here}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "toy", *args]
    return subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, timeout=60)


def test_help_and_errors(here):
    r = call(here, "--help")
    assert r.returncode == 0 and "seconds before the end" in r.stdout
    r = call(here, "--text", "text", "--out", "o", "--paus", "3")
    assert (
        r.returncode == 2
        and r.stderr.strip().count("\n") == 0
        and "did you mean 'pause'" in r.stderr
    )
    r = call(here, "--text", "text", "--out", "o", "--broken")
    assert (
        r.returncode == 2
        and "row 3, column k" in r.stderr
        and "Traceback" not in r.stderr
        and not (here / "o").exists()
    )


def test_reuse_and_change(here):
    assert call(here, "--text", "text", "--out", "o").returncode == 0
    first = (here / "o/manifest.json").read_bytes()
    assert call(here, "--text", "text", "--out", "o").returncode == 0
    assert (here / "o/manifest.json").read_bytes() == first
    (here / "text").write_text("abd")
    assert call(here, "--text", "text", "--out", "o").returncode == 0
    assert (here / "o/manifest.json").read_bytes() != first


def test_kill_then_resume(here):
    env = {**os.environ, "PYTHONPATH": f"{here}:{ROOT}"}
    p = subprocess.Popen(
        [sys.executable, "-m", "toy", "--text", "text", "--out", "o", "--pause", "60"],
        cwd=here,
        env=env,
    )
    for _ in range(200):
        if (here / "o.partial/begun0").exists():
            break
        time.sleep(0.05)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert not (here / "o").exists()
    mark = (here / "o.partial/begun0").stat().st_ino
    # the same run finds its folder again; another run's parameters would have cleared it
    (here / "toy.py").write_text(STAGE.replace("time.sleep(p.pause)", ""))
    assert call(here, "--text", "text", "--out", "o", "--pause", "60").returncode == 0
    assert (here / "o/begun0").stat().st_ino == mark and not (here / "o.partial").exists()


def share(here, copies, **more):
    "Two processes run the stage together; how each ended, and what it said."
    p = dict(text=str(here / "text"), out=str(here / "o"), **more)
    started = copies.start_all("toy", p, 2, dict(PYTHONPATH=f"{here}:{ROOT}"))
    said = [process.communicate(timeout=120)[1] for process in started]
    return [process.returncode for process in started], said


def test_two_processes_write_one_folder(here, copies):
    "How torchrun starts them is in test_launch.py."
    assert share(here, copies)[0] == [0, 0]
    manifest = json.loads((here / "o/manifest.json").read_text())
    assert {"rank0.json", "rank1.json"} <= set(manifest["outputs"]) and manifest["processes"] == 2
    assert share(here, copies)[0] == [0, 0]
    assert json.loads((here / "o/manifest.json").read_text()) == manifest


def test_two_processes_fail_together(here, copies):
    codes, said = share(here, copies, broken=True)
    assert codes == [2, 2] and not (here / "o").exists()
    assert all("row 3, column k" in text for text in said)


def test_import_is_light():
    code = "import sys, recnb; print(not {'torch', 'pandas', 'numpy'} & sys.modules.keys())"
    said = []
    assert costs_at_most(
        0.5, lambda: said.append(subprocess.check_output([sys.executable, "-c", code], text=True))
    )
    assert said[-1] == "True\n"


CITY = dict(dataset="made", num_users=10, num_pois=24, num_days=24)


def make_city(base, **filters):
    "Check-ins, trajectories and profiles, below a folder."
    c = checkins.run(CITY | filters, out=f"{base}/checkins")
    t = trajectories.run(checkins=c, out=f"{base}/trajectories")
    return t, dict(checkins=c, trajectories=t, provider="statistics", out=f"{base}/profiles")


def run_again(refusal):
    "Do what the message says."
    for command in refusal.partition("run again: ")[2].split(" && "):
        python, m, module, *flags = shlex.split(command)
        run = sys.modules[module].run
        run(parse_arguments(run.Params, flags))


def test_old_profiles_do_not_meet_new_trajectories(tmp_path):
    "Check-ins and trajectories are made anew with other filters, profiles are not."
    t, given = make_city(tmp_path)
    p = profiles.run(given)
    whole = dict(trajectories=t, profiles=p, out=f"{tmp_path}/prompts")
    q = prompts.run(whole)
    t, given = make_city(tmp_path, min_poi_freq=4)
    for stale in (p.path, q.path):
        with pytest.raises(BadInput, match="has changed; run again: python -m recnb.poi.profiles"):
            load_artifact(stale)
    with pytest.raises(BadInput) as refusal:
        prompts.run(whole)
    run_again(str(refusal.value))
    assert prompts.run(whole).lineage["poi.checkins"] == t.lineage["poi.checkins"]


def test_profiles_of_another_city_folder(tmp_path):
    "The same, where the new folders lie beside the old ones."
    p = profiles.run(make_city(tmp_path / "old")[1])
    t, _ = make_city(tmp_path / "new", min_poi_freq=4)
    whole = dict(trajectories=t, profiles=p, out=f"{tmp_path}/prompts")
    with pytest.raises(BadInput, match="different versions of poi.checkins; run again") as refusal:
        prompts.run(whole)
    assert f"--checkins={tmp_path}/new/checkins" in str(refusal.value)
    run_again(str(refusal.value))
    assert prompts.run(whole).facts


def test_a_study_that_was_moved_and_one_that_was_copied(tmp_path):
    t, given = make_city(tmp_path / "a")
    profiles.run(given)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    os.rename(tmp_path / "a", tmp_path / "moved")
    make_city(tmp_path / "copy", min_poi_freq=4)  # what becomes of the copy is its own affair
    moved = load_artifact(tmp_path / "moved/profiles", place="profiles")
    with pytest.raises(BadInput, match="has changed"):
        load_artifact(tmp_path / "copy/profiles")
    shutil.rmtree(tmp_path / "moved/checkins")
    shutil.rmtree(tmp_path / "moved/trajectories")
    assert load_artifact(moved.path).digest == moved.digest
    os.rename(tmp_path / "moved/profiles", tmp_path / "copy/old profiles")
    with pytest.raises(BadInput, match="has changed"):  # it lies beside the copy's check-ins now
        load_artifact(tmp_path / "copy/old profiles")


def test_a_result_that_does_not_change_starts_nothing(tmp_path):
    "Check-ins made anew that are the same to the byte: all that descends from them still stands."
    t, given = make_city(tmp_path)
    p = profiles.run(given)
    shutil.rmtree(tmp_path / "checkins")
    again, given = make_city(tmp_path)
    assert (again.digest, load_artifact(p.path).digest) == (t.digest, p.digest)
    before = (p / "manifest.json").read_bytes()
    assert (profiles.run(given) / "manifest.json").read_bytes() == before


def test_a_manifest_that_was_edited(tmp_path):
    t, _ = make_city(tmp_path)
    manifest = json.loads((t / "manifest.json").read_text())
    for changed in (dict(facts=dict(rows=9)), dict(key="0"), dict(finished="now"), dict(sha256="")):
        write_json(manifest | changed, t / "manifest.json")
        with pytest.raises(BadInput, match="manifest.json as it was written"):
            load_artifact(t.path)
    old = {k: v for k, v in manifest.items() if k not in ("sha256", "command")}
    write_json(old, t / "manifest.json")  # as the first releases wrote it
    assert load_artifact(t.path).digest == t.digest
