"Numbers in prose lead to their source, and kept predictions give the recorded numbers."

import importlib.util
import json
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml

from recnb import studies
from recnb.expected import describe_agreement, expect_rows, group_rows
from recnb.predictions import RANKED, RATED, find_predictions
from recnb.protocols import read_protocols
from recnb.provenance import trace_row
from recnb.readme import QUESTIONS, select_answers
from recnb.recipes import read_recipe
from recnb.recorded import read_recorded
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
        ("In 2024, see section 4.1.3 at 8:59: exit code 2, 1 of the 95% intervals.", [], "1 in"),
        ("It is .7995.", [[".7995", {"dataset": "movies", "method": "constant_5"}]], None),
        ("It is .7985.", [[".7985", {"dataset": "movies", "method": "constant_5"}]], "rounds to"),
        ("It is 79.95 %.", [["79.95 %", {"dataset": "movies", "method": "constant_5"}]], None),
        ("It is .7995.", [[".7995", {"dataset": "movies", "method": "constant_6"}]], "no recorded"),
    ],
)
def test_a_number_without_a_source_is_found(text, entries, fault):
    found = list(check_numbers.check_page("a.md", text, entries))
    assert len(found) == bool(fault) and all(fault in x for x in found), found


def change_number(text):
    "The text with another last digit of its last number."
    at = max(i for i, letter in enumerate(text) if letter.isdigit())
    return f"{text[:at]}{(int(text[at]) + 3) % 10}{text[at + 1 :]}"


def test_no_number_of_a_row_may_be_another():
    known = yaml.safe_load((root / ".ci/numbers.yaml").read_text(encoding="utf-8"))
    said = [e for entries in known.values() for e in entries if isinstance(e[1], dict)]
    assert len(said) >= 25
    for text, row in said:
        assert not check_numbers.check_rows(text, row), text
        assert "rounds to" in check_numbers.check_rows(change_number(text), row), text


def test_a_notebook_says_what_its_code_holds_or_prints(tmp_path):
    cells = [
        dict(cell_type="markdown", source="It is .417 of 2,629 rows, not .418 of 2,630; $x = 99$."),
        dict(cell_type="code", source="0.417", outputs=[dict(data={"text/plain": "0.2629"})]),
    ]
    file = tmp_path / "a.ipynb"
    file.write_text(json.dumps(dict(cells=cells)), encoding="utf-8")
    known = check_numbers.list_beside(file) | {2629}
    found = check_numbers.check_page("a.ipynb", check_numbers.read_prose(file), [], known)
    assert [x.split()[1] for x in found] == [".418", "2,630"]


@pytest.mark.parametrize(
    "said, other",
    [
        ("233 of GRPO", "243 of GRPO"),  # seconds of a manifest
        ("14 GiB an arm", "13 GiB an arm"),  # its memory
        ("20 steps of 48", "20 steps of 59"),  # settings
        ("of the 1,745 right ones", "of the 1,754 right ones"),  # a fact
    ],
)
def test_a_recipe_says_what_it_set_and_what_was_measured(said, other, tmp_path):
    text = (root / "papermill_runs/recipes/movies-gpu.yaml").read_text(encoding="utf-8")
    file = tmp_path / "movies-gpu.yaml"
    file.write_text(text.replace(said, other), encoding="utf-8")
    found = list(check_numbers.check_head(file, check_numbers.list_results(), []))
    assert said in text and len(found) == 1, found


@pytest.mark.parametrize(
    "line, fault",
    [
        ('"It is 43 % faster."', "43 %"),
        ("x = 1  # .398 on validation", ".398"),
        ("x = 1  # three times as fast", "three times as"),
        ("x = 1  # `0.2484 to 0.2582`, a 95% interval, version 3.12, .5 of them", None),
    ],
)
def test_comments_hold_no_results(line, fault, tmp_path):
    file = tmp_path / "a.py"
    file.write_text(line + "\n", encoding="utf-8")
    found = list(check_numbers.check_comments("a.py", check_numbers.read_comments(file)))
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


def test_a_random_teacher_taught_nothing():
    # nbs/guide/questions.md says so
    place = "manifests/movies-gpu/runs/siren/arms/random/alignment/rating.alignment.json"
    assert json.loads((results / place).read_text(encoding="utf-8"))["facts"]["best_step"] == 0
