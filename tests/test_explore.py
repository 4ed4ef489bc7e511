"The notebooks in nbs/explore run on any run of the study, and say in one line where there is none."

import re
from pathlib import Path

import nbformat
import pytest

from recnb.explore import find_answers, open_run
from recnb.stages import BadInput

root = Path(__file__).parent.parent
explore = root / "nbs" / "explore"


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


def test_next_place(smoke):
    said = execute("next_place", run=str(smoke("poi")))
    assert "best candidates" in said and "user_kernel" in said and "ranker" in said
    assert "You act as user" in said


def test_ratings(smoke):
    said = execute("ratings", run=str(smoke("rating")))
    for words in ("before alignment", "reasoning first", "Topics this"):
        assert words in said


@pytest.mark.parametrize("task", ["poi", "rating"])
def test_two_runs(smoke, task):
    said = execute("two_runs", run=str(smoke(task)))
    assert "permutation p" in said
    assert ("neither" if task == "poi" else "about equally near") in said


def test_results():
    said = execute("results")
    assert "recorded and published" in said and "manifest" in said and "LightGBM ranker" in said


def test_city(tmp_path):
    small = dict(dataset="made", num_users=12, num_pois=40, num_days=40, seed=1)
    said = execute("city", run=str(tmp_path), checkins_parameters=small)
    assert "usual hour" in said and "image/png" in said


def test_answers_have_names_of_a_reader(smoke):
    found = find_answers(smoke("poi")).keys()
    assert {"runs/alpha-full", "runs/alpha-none", "ranker", "alpha/user_top"} < found
    found = find_answers(smoke("rating")).keys()
    assert {"runs/siren", "runs/siren/cot", "made-reviews/train_mean"} < found


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
