"A table of one's own: recipes named after its file, and predictions made elsewhere."

import importlib
import json
import os
import re
import shlex
import subprocess
import sys

import pandas as pd
import pytest
from conftest import ROOT

from recnb.recipes import baseline_parameters, estimate_minutes, read_recipe
from recnb.stages import BadInput, parse_arguments
from recnb.steps import list_steps

CHECKINS = "user=who,poi=venue,time=when"
RATINGS = "user=who,item=what,rating=stars,time=when"
OWN = dict(own=CHECKINS) | {"own-rating": RATINGS}


def find_commands():
    "The stage commands that the guide shows."
    cells = json.loads((ROOT / "nbs/guide/own_data.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "".join("".join(c["source"]) + "\n" for c in cells if c["cell_type"] == "markdown")
    blocks = "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    return [line for line in blocks.splitlines() if line.strip()]


COMMANDS = find_commands()


@pytest.mark.parametrize("line", [x for x in COMMANDS if x.startswith("python")])
def test_a_command_of_the_guide_is_understood(line):
    _, _, module, *flags = shlex.split(line)
    assert parse_arguments(importlib.import_module(module).run.Params, flags)


def test_the_guide_starts_the_recipes():
    words = [shlex.split(x) for x in COMMANDS if x.startswith("make study")]
    given = [dict(w.split("=", 1) for w in line[2:]) for line in words]
    assert {x["RECIPE"] for x in given} == set(OWN)
    assert all(x["COLUMNS"] == OWN[x["RECIPE"]] for x in given)
    assert any("PREDICTIONS" in x for x in given)


@pytest.fixture
def table(tmp_path):
    "A file with two endings, and a name that no folder should have."
    file = tmp_path / "my data.csv.gz"
    pd.DataFrame(dict(who=["a"], venue=["b"], when=["2026-01-01"])).to_csv(file, index=False)
    return str(file)


@pytest.mark.parametrize("recipe", OWN)
def test_the_results_are_named_after_the_file(recipe, table):
    r = read_recipe(str(ROOT / f"papermill_runs/recipes/{recipe}.yaml"), table, columns=OWN[recipe])
    assert r.name == f"{recipe}-my_data" and "my_data" in r.title
    place = (r.cities or r.datasets)["my_data"]
    read = place.get("checkins") or place["reviews"]
    assert read["columns"] == OWN[recipe].split(",") and read["data"] == table
    assert estimate_minutes(r) == pytest.approx(r.about.minutes, abs=1)
    assert all("{" not in step.path for step in list_steps(r))


def test_without_columns_the_usual_names_are_looked_for(table):
    r = read_recipe(str(ROOT / "papermill_runs/recipes/own.yaml"), table)
    assert "columns" not in r.cities["my_data"]["checkins"]


def test_predictions_are_a_row_of_a_recipe_with_one_city(table, tmp_path):
    own = str(ROOT / "papermill_runs/recipes/own.yaml")
    r = read_recipe(own, table, columns=CHECKINS, predictions="a/BERT4Rec.parquet")
    mine = baseline_parameters(r, "BERT4Rec")
    assert mine["stage"] == "elsewhere" and mine["city"] == "my_data"
    rating = str(ROOT / "papermill_runs/recipes/own-rating.yaml")
    r = read_recipe(rating, table, columns=RATINGS, predictions="SASRec.csv")
    assert r.datasets["my_data"]["elsewhere"] == dict(predictions="SASRec.csv")
    with pytest.raises(BadInput, match="one city"):
        read_recipe(str(ROOT / "papermill_runs/recipes/smoke.yaml"), predictions="x.csv")


def test_predictions_made_elsewhere_stand_beside_the_counters(tmp_path, monkeypatch, copies):
    from recnb.notebooks import execute_notebook
    from recnb.poi import checkins
    from recnb.results import read_lines

    for name, value in copies.forks.items():  # kernels begin as in a study
        monkeypatch.setenv(name, value)
    run = f"{tmp_path}/cities/my"
    made = checkins.run(
        dataset="made", num_users=12, num_pois=30, num_days=40, out=f"{tmp_path}/made"
    )
    own = pd.read_parquet(made / "checkins.parquet")
    own = pd.DataFrame(
        dict(who=own.user_id, where="v" + own.poi_id.astype(str), when=own.local_time)
    )
    own.to_csv(tmp_path / "my.csv", index=False)
    given = dict(dataset="table", data=f"{tmp_path}/my.csv")
    given["columns"] = ["user=who", "poi=where", "time=when"]
    values = dict(run=run, city="my", checkins_parameters=given)
    execute_notebook(ROOT / "nbs/studies/data_poi.ipynb", tmp_path / "data.ipynb", values)
    card = (tmp_path / "cities/my/data_card.md").read_text()
    assert card.startswith("# Data card: my\n") and "| source | my.csv |" in card

    instances = pd.read_parquet(f"{run}/trajectories/instances.parquet")
    names = pd.read_parquet(f"{run}/checkins/pois.parquet").set_index("poi_id").source_id
    tests = instances[instances.split == "test"]
    known = [[names[t]] for t in tests.target_poi]
    pd.DataFrame(dict(instance_id=tests.instance_id, top=known)).to_parquet(
        tmp_path / "Oracle.parquet"
    )
    values = dict(run=f"{tmp_path}/baselines/Oracle", city=run, stage="elsewhere")
    values["values"] = dict(predictions=f"{tmp_path}/Oracle.parquet")
    execute_notebook(ROOT / "nbs/studies/baseline_poi.ipynb", tmp_path / "row.ipynb", values)
    lines = read_lines(f"{tmp_path}/baselines/Oracle/results.jsonl")
    assert {x.method for x in lines} == {"Oracle"}
    assert {x.settings.get("made") for x in lines} == {"elsewhere"}
    whole = {x.metric: x.value for x in lines if not x.slice and not x.against}
    assert whole == {"Acc@1": 1.0}  # of lists of one, nothing else is known
    assert any(x.against for x in lines)


def test_ratings_made_elsewhere_are_lines_of_their_own(tmp_path):
    from recnb.rating import analyses, elsewhere, reviews

    R = reviews.run(num_users=12, num_items=24, out=f"{tmp_path}/reviews")
    rows = pd.read_parquet(R / "rows.parquet")
    tests = rows[rows.split == "test"]
    pd.DataFrame(dict(row_id=tests.row_id, rating=tests.label)).to_csv(tmp_path / "Oracle.csv")
    given = dict(predictions=f"{tmp_path}/Oracle.csv", out=f"{tmp_path}/elsewhere")
    made = elsewhere.run(given, reviews=R)
    lines = analyses.make_baseline_lines(made.path, rows, "my", "x")
    assert {(x["method"], x["settings"]["made"]) for x in lines} == {("Oracle", "elsewhere")}
    assert {x["value"] for x in lines} == {0.0}


def test_a_column_that_is_not_there_is_one_line(tmp_path, copies):
    "Nothing can be made of such a table: exit code 2 and the line, not a study without rows."
    file = tmp_path / "mine.csv"
    file.write_text("who,venue,when\na,b,2026-01-01 10:00\n")
    command = [sys.executable, "-m", "recnb.studies", "--recipe", "own", f"--data={file}"]
    p = subprocess.run(
        [*command, "--columns=user=who,poi=place,time=when", f"--out={tmp_path / 'out'}"],
        cwd=ROOT,
        env={**os.environ, **copies.forks, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    last = p.stderr.splitlines()[-1]
    assert p.returncode == 2 and not p.stdout, p.stdout
    assert f"{file}, row 1: expected a column named place; there are who" in last, last
