"Launching real processes: they share work, end with their parent, and say which of them failed."

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recnb.launch import LaunchError, can_fork, fork_processes, torchrun
from recnb.stages import BadInput

stage = """
import os, sys, time
from dataclasses import dataclass
from pathlib import Path
from recnb.artifacts import stage
from recnb.stages import BadInput, log_line, run_as_command

@dataclass
class Params:
    out: str
    pids: str = ''       # write process ids there, and sleep
    latitude: float = 0. # at most 90
    crash: int = -1      # rank that fails
    die: int = -1        # rank that is killed

@stage('toy.launched', Params)
def run(p, folder):
    rank = int(os.environ.get('RANK', 0))
    if p.latitude > 90:
        where = dict(file='checkins.csv', row=17, column='latitude')
        raise BadInput('a latitude from -90 to 90', **where, value=p.latitude)
    world, threads = os.environ.get('WORLD_SIZE', 1), os.environ['OMP_NUM_THREADS']
    log_line('rank', rank, 'of', world, 'threads', threads, os.environ.get('GREETING', ''))
    if p.pids:
        (Path(p.pids)/str(rank)).write_text(str(os.getpid()))
        (Path(p.pids)/f'agent{rank}').write_text(str(os.getppid()))
        time.sleep(300)
    if p.crash == rank: raise RuntimeError(f'the dog ate rank {rank}')
    if p.die == rank: os.kill(os.getpid(), 9)
    (folder/f'{rank}.txt').write_text('done')
    return dict(rank=rank)

run_as_command(run, __name__)
"""


@pytest.fixture
def env(tmp_path):
    (tmp_path / "launched_toy.py").write_text(stage)
    return dict(PYTHONPATH=os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent)]))


def test_two_processes_share_a_stage_and_its_folder_comes_back(env, tmp_path):
    lines = []
    a = torchrun(
        "launched_toy",
        dict(out=str(tmp_path / "x")),
        nproc_per_node=2,
        env={**env, "GREETING": "hello", "OMP_NUM_THREADS": 7},
        show=lines.append,
    )
    assert (a / "0.txt").exists() and (a / "1.txt").exists() and a.facts == dict(rank=0)
    assert "rank 0 of 2 threads 7 hello" in lines
    assert not any(line.startswith("rank 1") for line in lines)


def test_cores_are_shared_unless_told_otherwise(env, tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    lines = []
    torchrun("launched_toy", dict(out=str(tmp_path / "x")), env=env, show=lines.append)
    assert any(f"threads {len(os.sched_getaffinity(0))}" in line for line in lines)


@pytest.mark.parametrize("how, says", [("crash", "exit code 1"), ("die", "killed by SIGKILL")])
def test_a_failure_names_the_rank_and_ends_with_its_log(env, tmp_path, how, says):
    with pytest.raises(LaunchError) as e:
        torchrun(
            "launched_toy",
            {"out": str(tmp_path / "x"), how: 1},
            nproc_per_node=2,
            env=env,
            show=lambda line: None,
        )
    assert "rank 1" in str(e.value) and says in str(e.value) and "rank 1 of 2" in str(e.value)
    if how == "crash":
        assert str(e.value).endswith("RuntimeError: the dog ate rank 1")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("n", [1, 2])
def test_bad_input_of_the_stage_is_one_line(env, tmp_path, n):
    with pytest.raises(BadInput) as e:
        torchrun(
            "launched_toy",
            dict(out=str(tmp_path / "x"), latitude=1000),
            nproc_per_node=n,
            env=env,
            show=lambda line: None,
        )
    where, expected = "checkins.csv, row 17, column latitude", "a latitude from -90 to 90"
    assert str(e.value) == f"{where}: found '1000.0', expected {expected}"


def test_a_module_that_is_not_there(env, tmp_path):
    with pytest.raises(LaunchError, match="no_such_module"):
        torchrun("no_such_module", dict(out=str(tmp_path / "x")), env=env, show=lambda line: None)


def alive(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_cell(env, tmp_path, sig):
    pids = tmp_path / "pids"
    pids.mkdir()
    given = dict(out=str(tmp_path / "x"), pids=str(pids))
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        f"from recnb.launch import torchrun; torchrun('launched_toy', {given!r}, nproc_per_node=2)"
    )
    cell = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait(
        lambda: all(
            (pids / n).exists() and (pids / n).read_text() for n in ("0", "1", "agent0", "agent1")
        )
    )
    family = {int(f.read_text()) for f in pids.iterdir()}
    assert len(family) == 3 and all(map(alive, family))
    cell.send_signal(sig)
    wait(lambda: not any(map(alive, family)))
    error = cell.communicate(timeout=60)[1]
    assert cell.returncode != 0 and (sig == signal.SIGKILL or "KeyboardInterrupt" in error)


@pytest.mark.skipif(not can_fork(), reason="copies of a process are made on Linux without a GPU")
@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGKILL, None])
def test_a_copy_ends_with_whoever_asked_for_it(env, tmp_path, sig):
    "It gets the signals, and outlives neither who asked nor the process that it is a copy of."
    pids = tmp_path / "pids"
    pids.mkdir()
    command = [sys.executable, "-m", "recnb.launch", "launched_toy", f"--out={tmp_path / 'x'}"]
    with fork_processes([]):
        p = subprocess.Popen(
            [*command, f"--pids={pids}"],
            env={**os.environ, **env, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        wait(lambda: (pids / "agent0").exists() and (pids / "agent0").read_text())
        copy, parent = (int((pids / name).read_text()) for name in ("0", "agent0"))
        assert copy != p.pid and parent != os.getpid() and alive(copy)
        if sig:
            p.send_signal(sig)
            p.wait(90)  # before the block ends, since whoever forked tells how the copy ended
            wait(lambda: not alive(copy))
    assert p.wait(30) == {signal.SIGTERM: 143, signal.SIGKILL: -9, None: 1}[sig]
    wait(lambda: not alive(copy) and not alive(parent))
    said = p.communicate()[1]
    assert sig != signal.SIGTERM or "launched_toy: stopped" in said
