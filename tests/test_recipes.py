"Recipes that say something else than their author means: one line with file, key and remedy."

import pytest
from conftest import ROOT

from recnb.recipes import list_rows, read_about, read_recipe, run_parameters
from recnb.stages import BadInput
from recnb.steps import list_steps

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


RECIPES = sorted((ROOT / "papermill_runs/recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_says_what_it_answers_needs_and_gives(recipe):
    "Minutes that nobody knows are said to be unknown, not left out."
    about = read_about(recipe)[2]
    assert about.question.endswith("?") and about.needs and about.expect
    assert (about.minutes and about.machine) or "not run" in about.machine
    assert recipe.read_text(encoding="utf-8").startswith("about:")


SET = {  # what is written behind --set → what the line says
    "sft.learning_rat=1": "learning_rat', expected a parameter of this stage; did you mean 'lea",
    "stf.learning_rate=1": "found 'stf', expected a stage that the recipe runs; did you mean 'sft'",
    "learning_rate=1": "expected stage.parameter=value, as sft.learning_rate=1e-2",
    "sft.learning_rate=fast": "column learning_rate: found 'fast', expected float",
    "launch.sft.nproc=2": "found 'nproc', expected a torchrun option",
}


@pytest.mark.parametrize("text", SET)
def test_an_odd_setting_is_one_line(text):
    with pytest.raises(BadInput) as e:
        read_recipe(str(ROOT / "papermill_runs/recipes/quick.yaml"), settings=[text])
    assert SET[text] in str(e.value) and "\n" not in str(e.value)


def test_a_setting_reaches_every_row_that_has_its_stage():
    quick, rating = (ROOT / f"papermill_runs/recipes/quick{x}.yaml" for x in ("", "-rating"))
    r = read_recipe(str(quick), settings=["sft.learning_rate=1e-2", "checkins.num_users=9"])
    assert r.name == "quick+sft.learning_rate=1e-2+checkins.num_users=9"
    assert {run_parameters(r, run)["sft"]["learning_rate"] for run in r.runs} == {"1e-2"}
    assert r.cities["made"]["checkins"]["num_users"] == 9
    r = read_recipe(str(rating), settings=["model.model_checkpoint=tiny-qwen"])
    v = run_parameters(r, "siren")
    assert {v[s]["model_checkpoint"] for s in ("grpo", "cot", "alignment")} == {"tiny-qwen"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_row_of_a_recipe_has_its_notebooks(recipe):
    "Every notebook comes after those that it goes on from, and each row has one."
    r = read_recipe(str(recipe), "data")
    steps = list_steps(r)
    seen = set()
    for step in steps:
        assert set(step.needs) <= seen
        seen.add(step.path)
    assert {row for row in list_rows(r) if ", arm" not in row} <= {step.row for step in steps}
