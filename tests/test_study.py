"""A whole study: killed and started again, it ends with the same numbers.

A second run does nothing, what is missing or spoilt is made again, and a row that fails leaves the
table of the others. The check-ins have users, places and times alone.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from processes import list_copies

from recnb.artifacts import stage, write_json
from recnb.methods import find_baselines
from recnb.notebooks import forget_spoilt_notebooks, record_notebook
from recnb.poi import checkins, trajectories
from recnb.recipes import read_recipe
from recnb.studies import Params as Study
from recnb.studies import _prepare_run, run

CITY = """
cities:
  alpha:
    checkins:
      {dataset: table, data: "{data}/bare.csv", columns: [user=who, poi=where, time=when]}
    profiles: {provider: statistics}
"""
RECIPE = f"""
task: poi
title: a test
{CITY}
common:
  model: {{model_checkpoint: tiny-llama}}
  sft:
    {{tuning: lora, num_epochs: 10, max_steps: 16, save_steps: 4, batch_size: 2, max_length: 2048,
     warmup_steps: 1}}
runs: {{one: {{city: alpha, prompts: {{profile: text}}}}}}
"""
FILE = "evaluate/predictions.parquet"  # of a run, to be spoilt


def write_bare_checkins(folder):
    "Users, places and times, and nothing else."
    rng = np.random.default_rng(1)
    rows = []
    for user in range(12):
        favourites = rng.choice(30, 5, replace=False)
        for day in pd.date_range("2012-04-03", periods=40):
            for hour in sorted(rng.choice(range(8, 22), 3, replace=False)):
                place = favourites[hour // 4 % 5] if rng.random() < 0.7 else rng.integers(30)
                rows.append((f"u{user}", f"p{place}", day + pd.Timedelta(hours=int(hour))))
    folder.mkdir(exist_ok=True)
    pd.DataFrame(rows, columns=["who", "where", "when"]).to_csv(folder / "bare.csv", index=False)


def start(recipe, out, *more, forks=None, **kw):
    "A study, begun; with `forks` its processes are copies of one that is there."
    env = {**os.environ, **(forks or {}), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "recnb.studies", "--recipe", recipe, "--out", out, *more],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kw,
    )


def alive(out):
    return subprocess.run(["pgrep", "-f", str(out)], capture_output=True, text=True).stdout.split()


def list_jobs(out, *command):
    "What Snakemake would run."
    config = ["-n", "-s", "papermill_runs/Snakefile", "--configfile", out / "config.json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    p = subprocess.run([*command, *config], cwd=ROOT, env=env, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    return sorted(set(re.findall(r"^(?:local)?rule (\w+):", p.stdout + p.stderr, re.M)))


def ages(out):
    "When each notebook was executed."
    found = out.rglob("*_*.ipynb")
    return {f.name: f.stat().st_mtime_ns for f in found if "." not in f.stem}


def but_minutes(file):
    "Lines without the time that the work took, the one thing in which two runs of a study differ."
    lines = file.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if '"metric": "minutes"' not in line]
    return [re.sub(r"[\d.]+ (?=measured)", "", " ".join(line.split())) for line in kept]


def assert_same(a, b):
    "Two runs of a study came to the same, but for the time that it took."
    for name in ("results.jsonl", "table.txt"):
        assert but_minutes(a / name) == but_minutes(b / name), name
    assert (a / f"runs/one/{FILE}").read_bytes() == (b / f"runs/one/{FILE}").read_bytes()


def stop_training(study, step, how, forks=None):
    "Start a study and end it by a signal, once its training has kept this step or a later one."
    out = study[1]
    p = start(*study, forks=forks)
    for _ in range(6000):
        kept = out.glob("runs/one/sft.partial/checkpoints/*-*")
        if p.poll() is not None or any(int(k.name.split("-")[1]) >= step for k in kept):
            break
        time.sleep(0.05)
    assert p.poll() is None, p.communicate()[0]
    p.send_signal(how)
    said = p.communicate(timeout=60)[0]
    for _ in range(100):  # nothing outlives it
        if not alive(out):
            break
        time.sleep(0.1)
    assert not alive(out) and not (out / "table.txt").exists()
    assert not forks or not list_copies(wait=10)
    return p.returncode, said


def run_again_here(study, monkeypatch):
    "Run a study in this process; the commands of all processes of Python that it began."
    begun = []

    class Noted(subprocess.Popen):
        def __init__(self, command, *more, **given):
            begun.extend([command] * (command[0] == sys.executable))
            super().__init__(command, *more, **given)

    recipe, out, data = map(str, study)
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.chdir(ROOT)
        patch.setattr(subprocess, "Popen", Noted)
        run(Study(recipe=[recipe], out=out, data=data.removeprefix("--data=")))
    return begun


def test_killed_study_ends_the_same(tmp_path, copies, monkeypatch):
    "Told to stop, then killed: it goes on from what it kept, to the same bytes."
    data = tmp_path / "d #1: {é}"  # to YAML, to a shell or to Snakemake this means something else
    (tmp_path / "r.yaml").write_text(RECIPE)
    write_bare_checkins(data)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    study = [tmp_path / "r.yaml", killed, f"--data={data}"]
    p = start(tmp_path / "r.yaml", whole, *study[2:], forks=copies.forks)
    said = p.communicate(timeout=800)[0]
    assert p.returncode == 0 and "user_bin3" in said, said
    # a table before any training, what comes next, and at the end what to open
    assert said.index("first table") < said.index("user_bin3") < said.index("one/train_"), said
    last = said[said.index("to open:") :]
    assert all(str(notebook) in last for notebook in whole.rglob("*_*.ipynb")), last
    assert "Best is " in said

    code, said = stop_training(study, 4, signal.SIGTERM, copies.forks)
    assert code in (130, 143) and "kept" in said.splitlines()[-1], said
    before = ages(killed)
    stop_training(study, 9, signal.SIGKILL, copies.forks)
    assert before and before.items() <= ages(killed).items()  # what had ended is not run again

    p = start(*study, forks=copies.forks)
    said = p.communicate(timeout=800)[0]
    assert "user_bin3" in said and p.returncode == 0
    assert len(list((killed / "logs").iterdir())) == 3
    assert_same(killed, whole)

    # nothing to do, whoever asks
    before = ages(killed)
    python = Path(sys.executable)
    for command in ([python.with_name("snakemake")], [python, "-m", "snakemake"]):
        assert list_jobs(killed, *command) == []
    begun = run_again_here(study, monkeypatch)
    assert ages(killed) == before
    assert [command[1:3] for command in begun] == [["-m", "snakemake"]]
    log = max((killed / "logs").iterdir(), key=os.path.getmtime).read_text()
    assert "Nothing to be done" in log and "recnb>" not in log
    # files of a stage and of the results are spoilt, noticed and made again, and no others
    os.truncate(killed / f"runs/one/{FILE}", 100)
    os.truncate(killed / "results.jsonl", 1000)
    (killed / "table.txt").unlink()
    p = start(*study, forks=copies.forks)
    said = p.communicate(timeout=800)[0]
    assert p.returncode == 0 and "predictions.parquet: changed" in said, said
    again = {name for name, age in ages(killed).items() if age != before[name]}
    assert again == {"evaluate_poi.ipynb", "results_poi.ipynb"}
    assert_same(killed, whole)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    "Trajectories of check-ins that have users, places and times alone."
    folder = tmp_path_factory.mktemp("bare")
    write_bare_checkins(folder)
    given = dict(dataset="table", data=str(folder / "bare.csv"))
    columns = ["user=who", "poi=where", "time=when"]
    c = checkins.run(given, columns=columns, out=str(folder / "checkins"))
    return trajectories.run(checkins=c, out=str(folder / "trajectories"))


@pytest.mark.parametrize("name", sorted(find_baselines().keys() - {"elsewhere", "reranker"}))
def test_users_places_and_times_are_enough_for_every_baseline(tmp_path, bare, name):
    "Coordinates, categories and zones are not needed; what is missing is said."
    method = find_baselines()[name]
    a = method.run(dict(method.SMOKE), trajectories=bare, out=str(tmp_path / name))
    assert len(pd.read_parquet(a / "predictions.parquet"))


@dataclass
class Params:
    out: str = ""
    loss: float = 0.0


@stage("test.answers", Params)
def answer(p, folder):
    write_json(p.loss, folder / "loss.json")
    return dict(loss=p.loss)


def swap(out):
    "Two stage folders change places."
    here, there, aside = (out / f"arms/{x}/answer_only" for x in ("HA", "CE", "KD"))
    aside.parent.mkdir()
    for old, new in ((here, aside), (there, here), (aside, there)):
        old.rename(new)


def edit(file, old, new):
    "A function that changes a file by hand."
    return lambda out: (out / file).write_text((out / file).read_text().replace(old, new))


SPOILT = {  # how → the records that go
    "nothing": (lambda out: None, set()),
    "swapped": (swap, {"HA", "CE"}),
    "facts": (edit("arms/HA/answer_only/manifest.json", "0.1", "0.01"), {"HA"}),
    "stage file": (edit("arms/CE/answer_only/loss.json", "0.2", "0.1"), {"CE"}),
    "notebook": (edit("arms/CE/align_rating.ipynb", "{}", "{ }"), {"CE"}),
    "record": (edit("arms/HA/align_rating.made.json", '"files"', '"file"'), {"HA"}),
    "results cut": (lambda out: os.truncate(out / "results.jsonl", 2), {"out"}),
    "results emptied": (lambda out: os.truncate(out / "results.jsonl", 0), {"out"}),
    "table deleted": (lambda out: (out / "table.txt").unlink(), {"out"}),
    "folder deleted": (lambda out: shutil.rmtree(out / "arms/CE/answer_only"), {"CE"}),
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_was_spoilt_is_noticed(tmp_path, how):
    "Only the notebook that made it is to run again."
    out = tmp_path / "out"
    for arm, loss in (("HA", 0.1), ("CE", 0.2)):
        answer(out=str(out / f"arms/{arm}/answer_only"), loss=loss)
        (out / f"arms/{arm}/align_rating.ipynb").write_text("{}")
        record_notebook(out / f"arms/{arm}/align_rating.ipynb", {})
    for name in ("results_rating.ipynb", "results.jsonl", "table.txt"):
        (out / name).write_text("{}\n{}")
    record_notebook(out / "results_rating.ipynb", {})
    spoil, gone = SPOILT[how]
    spoil(out)
    before = set(out.rglob("*.made.json"))
    forget_spoilt_notebooks(out)
    assert {x.parent.name for x in before - set(out.rglob("*.made.json"))} == gone


def test_a_changed_run_has_a_folder_of_its_own(tmp_path):
    "It begins as a copy of the run without the change, so what the change leaves alone is reused."
    (tmp_path / "r.yaml").write_text(RECIPE.replace("{data}", str(tmp_path)))
    answer(out=str(tmp_path / "r/cities/alpha/checkins"))
    for name in ("logs/a.log", "runs/one/sft.partial/x"):
        (tmp_path / "r" / name).parent.mkdir(parents=True)
        (tmp_path / "r" / name).touch()
    r = read_recipe(str(tmp_path / "r.yaml"), settings=["sft.max_steps=9"])
    out = tmp_path / r.name
    _prepare_run(r, Study(), out)
    assert out.name == "r+sft.max_steps=9" and (out / "cities/alpha/checkins/loss.json").exists()
    assert not list(out.glob("logs/*")) and not list(out.rglob("*.partial"))


def test_two_makes_set_up_one_environment(tmp_path):
    "The second waits for the first and finds its work done."
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("constraints.txt", "settings.ini", "setup.py", "pyproject.toml"):
        (tmp_path / name).touch()
    python = tmp_path / "python"  # stands for the interpreter that makes an environment
    python.write_text(
        "#!/bin/bash\n"
        f'[ "$1" = -m ] || exec "{sys.executable}" "$@"\n'
        "echo made >> log; mkdir -p .venv/bin; cp /bin/true .venv/bin/pip\n"
    )
    python.chmod(0o755)
    command = ["make", "PYTHON=./python", ".venv/.complete"]
    both = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [p.wait(60) for p in both] == [0, 0]
    assert (tmp_path / "log").read_text() == "made\n"


def test_runs_that_differ_in_one_parameter_are_rows_of_their_own(smoke):
    "Answer-only fine-tuning with another learning rate, or other sketches: each is a row."
    found = map(json.loads, (smoke("rating") / "results.jsonl").read_text().splitlines())
    tuned = [r for r in found if r["method"] == "answer-only SFT" and r["metric"] == "MAE"]
    plain = [r for r in tuned if not r["slice"] and "decoder" not in r["settings"]]
    assert len(plain) >= 3 and len({str(r["settings"]) for r in plain}) == len(plain)
