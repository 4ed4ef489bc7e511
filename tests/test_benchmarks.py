"What was timed becomes a row of its own page, and of no other."

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from recnb.benchmarks import compare_ways, record_comparison
from recnb.recipes import list_notebook_parameters, read_recipe
from recnb.results import append_lines, read_lines, record_run
from recnb.stages import BadInput
from recnb.tables import check_tables, render_pages, write_tables

PAGES = sorted((ROOT / "nbs/benchmarks").glob("*.ipynb"))


def count_up(n):
    return sum(range(n))


@pytest.fixture(scope="module")
def found():
    ways = {"one by one": lambda: count_up(200_000), "formula": lambda: 200_000 * 199_999 // 2}
    return compare_ways(ways, repeats=3)


@pytest.fixture
def recorded(found, tmp_path):
    "A folder of results that holds one benchmark."
    run = tmp_path / "runs/benchmarks"
    facts = {"formula": {"peak MiB": 3}, "one by one": {"peak MiB": 9}}
    record_comparison(found, run / "runs/sum", "sum", "numbers", sizes=dict(n=200_000), facts=facts)
    append_lines(run / "results.jsonl", read_lines(run / "runs/sum/results.jsonl"))
    record_run(run / "results.jsonl", tmp_path / "results")
    return tmp_path / "results"


def test_a_comparison_becomes_a_row_with_machine_and_commit(found, recorded):
    assert write_tables(recorded, recorded / "nowhere") == ["benchmark-speed.md"]
    assert check_tables(recorded, recorded / "nowhere") == []
    text = (recorded / "tables/benchmark-speed.md").read_text()
    (row,) = [x for x in text.splitlines() if "| formula |" in x]
    cells = [x.strip() for x in row.strip("|").split("|")]
    assert cells[:3] == ["sum", "formula", "one by one"]
    assert float(cells[3].split()[0].replace(",", "")) > 1
    assert "peak MiB 3 (9)" in cells and "numbers, n=200000" in cells
    (manifest,) = recorded.glob("manifests/**/*.json")
    made = json.loads(manifest.read_text())
    assert made["facts"]["machine"] in row and made["commit"][:8] in row
    assert f"1. {manifest.relative_to(recorded)}" in text


def test_no_other_page_changes(recorded):
    "Tables of results hold the same bytes beside rows of speed."
    committed = read_lines(ROOT / "papermill_runs/results/results.jsonl")
    some = [x for x in committed if x.dataset in ("ca", "ml-100k")]
    append_lines(recorded / "alone/results.jsonl", some)
    append_lines(recorded / "both/results.jsonl", some)
    append_lines(recorded / "both/results.jsonl", read_lines(recorded / "results.jsonl"))
    alone, both = (render_pages(recorded / name, "nowhere") for name in ("alone", "both"))
    assert both.pop("benchmark-speed.md") and both == alone and len(alone) == 2


def test_the_time_of_processes_that_a_way_starts_is_its_own():
    code = "sum(range(3_000_000))"
    ways = {
        "a process": lambda: bool(subprocess.run([sys.executable, "-c", code], check=True)),
        "nothing": lambda: True,
    }
    found = compare_ways(ways, repeats=2)
    assert min(found.ratios("nothing")) > 10 and found.bounds is None


def test_different_results_are_no_comparison():
    with pytest.raises(BadInput, match="a difference of 1.*the result of plain"):
        compare_ways({"plain": lambda: [1, 2], "other": lambda: [1, 3]}, repeats=1)
    ways = {"plain": lambda: 0.5, "other": lambda: 0.75}
    told = compare_ways(ways, repeats=1, tolerance=None)
    assert told.differences == {"plain": 0, "other": 0.25}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_writes_where_it_is_told(page):
    "Its folder is the first parameter, and it ends with a row."
    assert list_notebook_parameters(page)[0] == "run"
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    assert any("record_comparison(" in "".join(c["source"]) for c in cells)


def test_the_recipe_names_every_page():
    r = read_recipe(str(ROOT / "papermill_runs/recipes/benchmarks.yaml"))
    named = {x.get("page", name) for name, x in {**r.runs, **r.waits}.items()}
    assert named == {p.stem for p in PAGES}


def test_the_study_notebook_shows_the_rows_and_hands_them_over(recorded, capsys, monkeypatch):
    out = recorded.parent / "runs/benchmarks"
    values = dict(out=str(out), title="how fast", runs=["sum"], missing=[["runs.x", "x", "why"]])
    book = json.loads((ROOT / "nbs/studies/results_benchmark.ipynb").read_text(encoding="utf-8"))
    monkeypatch.chdir(ROOT)
    space: dict = {"display": print}
    for cell in (c for c in book["cells"] if c["cell_type"] == "code"):
        exec("".join(cell["source"]), space)
        if "parameters" in cell["metadata"].get("tags", []):
            space |= values
    assert len(read_lines(out / "results.jsonl")) == len(space["lines"]) == 6
    table = (out / "table.txt").read_text(encoding="utf-8")
    assert "formula" in table and "how fast" in table and "runs.x, x: why" in table
    assert "formula" in capsys.readouterr().out
