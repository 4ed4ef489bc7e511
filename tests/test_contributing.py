"""CONTRIBUTING's way to add a baseline, walked in a copy of the repository: one notebook, one row.

A row of it that fails leaves the table of the others.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
from unittest import mock

import nbformat
import pytest
from conftest import ROOT

from recnb.launch import fork_processes

IMPORTED = "papermill ipykernel.kernelapp pandas matplotlib.pyplot recnb.tables".split()
CELLS = [
    "#| default_exp poi.last_visited",
    """#| export
from dataclasses import dataclass

import numpy as np

from recnb.artifacts import stage
from recnb.methods import Method
from recnb.poi.city import build_predictions, load_city, write_rankings
from recnb.stages import BadInput, Folder, run_as_command""",
    """#| export
METHODS = [Method("last visited", target_time="no", history="no", others="no")]
SMOKE = dict(latest=5)""",
    """#| export
@dataclass
class Params:
    "Rank the POIs of the prefix, the latest first."

    trajectories: Folder  # folder of poi.trajectories
    out: str  # folder to write
    latest: int = 10  # check-ins of the prefix that count""",
    """#| export
def score_by_recency(city, asked, latest):
    "Later check-ins of the prefix score higher; other POIs score nothing."
    scores, pois = np.zeros((len(asked), len(city.catalogue))), city.rows.poi.to_numpy()
    for row, prefix in zip(scores, asked.prefix):
        known = [p for p in pois[list(prefix)] if p >= 0][-latest:]
        row[known] = np.arange(1, len(known) + 1)
    return scores""",
    """#| export
@stage("poi.last_visited", Params)
def run(p, folder):
    "Rank every test instance."
    if p.latest < 1:
        raise BadInput("check-ins that count", column="latest", value=p.latest)
    city = load_city(p.trajectories)
    asked = city.instances[city.instances.split == "test"]
    scores = score_by_recency(city, asked, p.latest)
    return write_rankings(folder, {"test": build_predictions(asked, city.catalogue, scores)})""",
    "#| export\nrun_as_command(run, __name__)",
]
RECIPE = """
task: poi
title: one more baseline
cities:
  alpha:
    checkins: {dataset: made, num_users: 16, num_pois: 40, num_days: 40, seed: 1}
    profiles: {provider: statistics}
runs: {}
baselines:
  mine: {city: alpha, last_visited: {latest: 5}}
  odd: {city: alpha, last_visited: {latest: 0}}
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "The files of the repository, with one notebook more."
    to = tmp_path_factory.mktemp("repo")
    listed = ["git", "ls-files", "-co", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in files.splitlines():
        if (ROOT / name).is_file() and "results/manifests" not in name:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_bytes((ROOT / name).read_bytes())
    first = nbformat.v4.new_markdown_cell("# Last visited\n\n> The latest POI of the prefix first")
    code = [nbformat.v4.new_code_cell(source) for source in CELLS]
    book = nbformat.v4.new_notebook(cells=[first, *code])
    nbformat.write(book, to / "nbs/poi/21_last_visited.ipynb")
    (to / "recipe.yaml").write_text(RECIPE)
    with mock.patch.dict(os.environ, PYTHONPATH=str(to)), contextlib.chdir(to):
        with fork_processes(IMPORTED):  # shared by the studies, which begin them otherwise
            yield to


def call(copy, *command, code=0):
    env = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    both = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    found = subprocess.run(command, cwd=copy, env=env, timeout=600, **both)
    assert found.returncode == code, found.stdout[-3000:]
    return found.stdout


STUDY = [sys.executable, "-m", "recnb.studies", "--recipe", "recipe.yaml"]
OUT = "papermill_runs/runs/recipe"


def test_a_new_baseline_stands_in_the_table(copy):
    "Beside a row that failed, which the table names with the reason."
    call(copy, os.path.join(os.path.dirname(sys.executable), "nbdev_export"))
    said = call(copy, *STUDY, code=1)
    assert re.search(r"baselines.odd, baseline_poi: .*check-ins that count", said)
    assert "last visited" in said
    table = (copy / OUT / "table.txt").read_text()  # every column
    assert "missing rows: 1" in table
    row = next(line for line in table.splitlines() if "last visited" in line)
    assert "latest=5" in row
    lines = (copy / OUT / "results.jsonl").read_text().splitlines()
    found = [r for r in map(json.loads, lines) if r["method"] == "last visited"]
    accuracy = next(r for r in found if r["metric"] == "Acc@1" and not r["slice"])
    assert accuracy["settings"] == {"latest": 5} and accuracy["value"] > 0
    tested = {r["against"] for r in found if r["metric"] == "McNemar p"}
    assert tested  # against the counter to beat


def test_a_row_that_was_mended_is_run_alone(copy):
    "It and the table, and nothing else."
    command = [sys.executable, "-m", "snakemake", "-n", "-s", "papermill_runs/Snakefile"]
    left = call(copy, *command, "--configfile", f"{OUT}/config.json")
    rules = re.findall(r"^(?:local)?rule (\w+):", left, re.M)
    assert sorted(set(rules)) == ["all", "baseline_poi", "results_poi"]
    made = copy / OUT / "baselines/mine/baseline_poi.ipynb"
    before = made.stat().st_mtime_ns
    (copy / "recipe.yaml").write_text(RECIPE.replace("latest: 0", "latest: 2"))
    said = call(copy, *STUDY)
    assert said.count("last visited") > 1 and "missing rows" not in said
    assert "latest=2" in (copy / OUT / "table.txt").read_text()
    assert made.stat().st_mtime_ns == before
