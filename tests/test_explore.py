"The notebooks in nbs/explore run on any run of the study, and say in one line where there is none."

import re
from pathlib import Path

import nbformat
import pytest

from recnb.explore import find_answers, make_tiny_study, open_run
from recnb.stages import BadInput

root = Path(__file__).parent.parent
explore = root / "nbs" / "explore"
SHORT = dict(num_epochs=1)  # of the warm start: too few to reason, enough to write


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "The tiny runs that the notebooks make where there is none."
    out = tmp_path_factory.mktemp("runs")
    make_tiny_study("poi", out / "poi")
    make_tiny_study("rating", out / "rating", until="runs/siren/cot", warm_start=SHORT)
    return out


def execute(name, **values):
    "The output of a notebook, run in this process with some parameters."
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell

    book = read_nb(explore / f"{name}.ipynb")
    for cell in book.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += "\n" + "\n".join(f"{k} = {v!r}" for k, v in values.items())
    shell = CaptureShell(explore)
    shell.run_all(book, exc_stop=True)
    return str([cell.get("outputs") for cell in book.cells])


def test_next_place(runs):
    said = execute("next_place", run=str(runs / "poi"))
    assert "best candidates" in said and "user_kernel" in said and "ranker" in said
    assert "You act as user" in said


def test_ratings(runs):
    said = execute("ratings", run=str(runs / "rating"))
    for words in ("before alignment", "reasoning first", "Topics this"):
        assert words in said


@pytest.mark.parametrize("task", ["poi", "rating"])
def test_two_runs(runs, task):
    said = execute("two_runs", run=str(runs / task))
    assert "permutation p" in said
    assert ("neither" if task == "poi" else "about equally near") in said


def test_results():
    said = execute("results")
    assert "recorded and published" in said and "manifest" in said and "LightGBM ranker" in said


def test_city(tmp_path):
    small = dict(dataset="made", num_users=12, num_pois=40, num_days=40, seed=1)
    said = execute("city", run=str(tmp_path), checkins_parameters=small)
    assert "usual hour" in said and "image/png" in said


def test_answers_have_names_of_a_reader(runs):
    assert {"runs/full", "runs/none", "ranker", "made/user_top"} < find_answers(runs / "poi").keys()
    found = find_answers(runs / "rating")
    assert {"runs/siren", "runs/siren/cot", "made/train_mean"} < found.keys()


def test_a_run_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(BadInput) as e:
        open_run(str(tmp_path / "nothing"), "poi", "poi.evaluate")
    assert "make study RECIPE=smoke" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("nb", sorted(explore.glob("*.ipynb")), ids=lambda p: p.stem)
def test_what_is_stored_can_be_shown_anywhere(nb):
    "No widget without its kernel, no path of a machine, no error."
    book = nbformat.read(nb, 4)
    assert "widgets" not in book.metadata
    for cell in (c for c in book.cells if c.cell_type == "code"):
        for output in cell.outputs:
            assert output.output_type != "error"
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
            assert not re.search(r"/(home|root|Users|tmp|work)/", str(output))
