"Recipes that say something else than their author means: one line with file, key and remedy."

import pytest
from conftest import ROOT

from recnb.recipes import list_rows, list_steps, read_recipe
from recnb.stages import BadInput

GOOD = (ROOT / "papermill_runs/recipes/quick.yaml").read_text(encoding="utf-8")
RUN = "  none: {city: made, prompts: {profile: none}}\n"
WRONG = {  # what is written → what is written instead, and what the line says
    "a section twice": (
        "baselines:",
        "runs: {}\nbaselines:",
        "column runs: expected each key once",
    ),
    "a run twice": (RUN, RUN + RUN, "column none: expected each key once"),
    "a rate twice": ("max_length:", "num_epochs: 5, max_length:", "num_epochs: expected each key"),
    "a run that YAML reads as false": ("  none: {", "  no: {", "quote it as 'no'"),
    "a number": ("  none: {", "  1: {", "quote it as '1'"),
    "a date": ("  none: {", "  2026-11-26: {", "quote it as '2026-11-26'"),
    "a space": ("  none: {", '  "a b": {', "'a b', expected a name of letters, digits"),
    "another script": ("  none: {", '  "São Paulo": {', "'São Paulo', expected a name of letters"),
    "a city that YAML reads as false": ("  made:\n", "  no:\n", "quote it as 'no'"),
    "a comma in a number": ("1e-3", "0,001", "quote it as '001'"),
    "a value that YAML reads as false": ("profile: none", "profile: no", "profile: found 'False'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_odd_recipe_is_one_line(tmp_path, what):
    old, new, said = WRONG[what]
    assert old in GOOD
    (tmp_path / "r.yaml").write_text(GOOD.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(BadInput) as e:
        read_recipe(str(tmp_path / "r.yaml"))
    assert said in str(e.value) and "r.yaml" in str(e.value) and "\n" not in str(e.value)


def test_a_recipe_that_is_not_utf8(tmp_path):
    (tmp_path / "r.yaml").write_bytes(GOOD.replace("title: one", "title: é").encode("latin-1"))
    with pytest.raises(BadInput, match="0xe9"):
        read_recipe(str(tmp_path / "r.yaml"))


@pytest.mark.parametrize("recipe", sorted((ROOT / "papermill_runs/recipes").glob("*.yaml")))
def test_each_row_of_a_recipe_has_its_notebooks(recipe):
    "Every notebook comes after those that it goes on from, and each row has one."
    r = read_recipe(str(recipe), "data")
    steps = list_steps(r)
    seen = set()
    for step in steps:
        assert set(step.needs) <= seen
        seen.add(step.path)
    assert {row for row in list_rows(r) if ", arm" not in row} <= {step.row for step in steps}
