"Numbers in prose lead to their source, and kept predictions give the recorded numbers."

import importlib.util
import re
from pathlib import Path

import pandas as pd
import pytest

from recnb import studies
from recnb.expected import describe_agreement, expect_rows, group_rows
from recnb.predictions import RANKED, RATED, find_predictions
from recnb.protocols import read_protocols
from recnb.provenance import trace_row
from recnb.readme import QUESTIONS, read_recorded, select_answers
from recnb.recipes import read_recipe
from recnb.results import Line, append_lines

root = Path(__file__).parent.parent
results = root / "papermill_runs/results"
spec = importlib.util.spec_from_file_location("check_numbers", root / ".ci/check_numbers.py")
check_numbers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_numbers)


@pytest.fixture(scope="module")
def recorded():
    "Every line, and what is known of the methods."
    return read_recorded(root)


def test_every_number_in_prose_has_a_source():
    assert check_numbers.check_all() == []


@pytest.mark.parametrize(
    "text, entries, fault",
    [
        ("It needs 8 GB.", [], "8 in"),
        ("It is .39 there.", [], ".39 in"),
        ("It ends within twenty minutes.", [], "twenty minutes"),
        ("It needs 8 GB.", [["8 GB", "settings.ini", "min_python = 3.11"]], "is another number"),
        ("It needs 8 GB.", [["8 GB", "settings.ini", "eight"]], "does not say"),
        ("It needs 8 GB.", [["8 GB", "nowhere.yaml", "8"]], "is not there"),
        ("It needs much.", [["8 GB", "a reason"]], "not on the page"),
        ("SmolLM2-135M, Acc@1, Qwen3-4B and MovieLens-100K are names.", [], None),
        ("Python 3.11 is needed.", [["Python 3.11", "settings.ini", "min_python = 3.11"]], None),
        ("It is right within 20%.", [["20%", "tests/test_budget.py", "rel=0.2"]], None),
    ],
)
def test_a_number_without_a_source_is_found(text, entries, fault):
    found = list(check_numbers.check_page("a.md", text, entries))
    assert len(found) == bool(fault) and all(fault in x for x in found), found


def test_the_log_names_commits():
    log = "## 2026-01-01: a day\n\n.5\n\n## 2026-01-02: another (at 1234567)\n"
    known = list(check_numbers.check_log(log, {"1234567"}.__contains__))
    assert len(known) == 1 and "a day" in known[0]
    assert len(list(check_numbers.check_log(log, set().__contains__))) == 2


def list_kept(lines):
    "The lines whose predictions were kept, each with its table."
    for x in lines:
        whole = x.source == "measured" and not (x.slice or x.against)
        if whole and (place := find_predictions(x.where, x.method, results)):
            yield x, pd.read_parquet(results / place)


def test_kept_predictions_give_the_recorded_numbers(recorded):
    shares = [(x, kept) for x, kept in list_kept(recorded[0]) if x.metric == "Acc@1"]
    for x, kept in shares:
        assert len(kept) == x.n and kept["rank"].eq(1).sum() == round(x.value * x.n), x
    assert len(shares) >= 14


def test_kept_predictions_say_nothing_of_the_data():
    files = sorted((results / "predictions").rglob("*.parquet"))
    for file in files:
        columns = set(pd.read_parquet(file).columns)
        assert columns <= set(RANKED) or columns <= set(RATED), file
    assert sum(f.stat().st_size for f in files) < 3_000_000


def test_no_prediction_outlives_its_number(recorded):
    found = {find_predictions(x.where, x.method, results) for x in recorded[0]}
    there = {
        p.relative_to(results).as_posix() for p in (results / "predictions").rglob("*.parquet")
    }
    assert there == found - {""}


def test_every_row_of_the_front_page_keeps_its_predictions(recorded):
    lines, facts = recorded
    for question in QUESTIONS:
        for row in select_answers(lines, question, facts):
            assert find_predictions(row["where"][0], row["method"], results), row["method"]


def test_every_recorded_row_answers_an_audit(recorded):
    for key, found in group_rows(recorded[0]).items():
        answers = vars(trace_row(found, results))
        assert all(v for k, v in answers.items() if k != "predictions"), (key, answers)


def test_a_run_is_told_how_it_agrees(recorded):
    lines = [x for x in recorded[0] if x.source == "measured" and x.dataset == "nyc"]
    assert re.search(r"(\d+) of \1 rows are within", describe_agreement(lines, recorded[0]))
    worse = [Line(**vars(x) | dict(value=x.value / 2, low=None)) for x in lines]
    said = describe_agreement(worse, recorded[0])
    assert "outside: " in said and said.count("recorded ") == 3 and said.endswith("more.")
    other = [Line(**vars(x) | dict(n=7)) for x in lines if x.n]
    assert describe_agreement(other, recorded[0]) == ""


def test_a_study_ends_with_that_sentence(recorded, tmp_path, monkeypatch):
    made = (tmp_path / "run/results.jsonl", tmp_path / "papermill_runs/results/results.jsonl")
    for file in made:
        append_lines(file, [x for x in recorded[0] if x.dataset == "made"])
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe(str(root / "papermill_runs/recipes/quick.yaml"))
    monkeypatch.setattr(studies, "_list_failed", lambda a: set())
    monkeypatch.setattr(studies, "_run_steps", lambda a, steps: 0)
    told = studies._finish_attempt(studies.Attempt(recipe, None, tmp_path / "run", None, None))
    assert re.search(r"\n *Beside what was recorded, (\d+) of \1 rows are within", told)


def test_what_draws_nothing_has_no_tolerance(recorded):
    rows = {x["method"]: x for x in expect_rows(recorded[0])}
    assert rows["user_kernel"]["why"] == rows["constant_5"]["why"] == "nothing is drawn"
    assert rows["LightGBM ranker"]["why"] != "nothing is drawn"


def test_protocols_of_others_are_whole():
    said = read_protocols(root / "papermill_runs/published")
    assert len(said["nyc"]["others"]) >= 9 and set(said["nyc"]["printed"]) >= {"GETNext", "STHGCN"}
