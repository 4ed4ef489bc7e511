"Stages as programs: bad flags, two processes under torchrun, kill -9."

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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


def call(here, *args, torchrun=0, **kw):
    start = [sys.executable, "-m"] + (
        ["torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}", "-m"]
        if torchrun
        else []
    )
    env = {
        **os.environ,
        "PYTHONPATH": f"{here}:{Path(__file__).parent.parent}",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [*start, "toy", *args], cwd=here, env=env, capture_output=True, text=True, timeout=60, **kw
    )


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
    env = {**os.environ, "PYTHONPATH": f"{here}:{Path(__file__).parent.parent}"}
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


def test_two_processes_write_one_folder(here):
    r = call(here, "--text", "text", "--out", "o", torchrun=2)
    assert r.returncode == 0, r.stderr
    manifest = json.loads((here / "o/manifest.json").read_text())
    assert {"rank0.json", "rank1.json"} <= set(manifest["outputs"]) and manifest["processes"] == 2
    r = call(here, "--text", "text", "--out", "o", torchrun=2)
    assert r.returncode == 0 and json.loads((here / "o/manifest.json").read_text()) == manifest


def test_two_processes_fail_together(here):
    r = call(here, "--text", "text", "--out", "o", "--broken", torchrun=2)
    assert r.returncode != 0 and "row 3, column k" in r.stderr and not (here / "o").exists()


def test_import_is_light():
    code = (
        "import time; t=time.time(); import recnb; d=time.time()-t; "
        "import sys; print(d, 'torch' in sys.modules)"
    )
    best = min(
        (
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True
            ).stdout.split()
            for _ in range(3)
        ),
        key=lambda r: float(r[0]),
    )
    assert float(best[0]) < 0.3 and best[1] == "False"
