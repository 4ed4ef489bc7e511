"Every stage as a command: light help, and one clear line for what is not there."

import os
import resource
import subprocess
import sys

import pytest
from conftest import ROOT

STAGES = [
    ".".join(path.relative_to(ROOT / "recnb").with_suffix("").parts)
    for path in sorted((ROOT / "recnb").rglob("*.py"))
    if "\nrun_as_command(run, __name__)" in path.read_text(encoding="utf-8")
]


def call(*args, cwd=ROOT):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("stage", STAGES)
def test_help_is_light(stage):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    r = call("-X", "importtime", "-m", f"recnb.{stage}", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert r.returncode == 0 and ("--out" in r.stdout or stage == "tables")
    # processor time: the wall clock of a busy machine says nothing
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5
    imported = {line.split("|")[-1].strip() for line in r.stderr.splitlines()}
    assert not {"torch", "transformers", "datasets"} & imported


@pytest.mark.parametrize(
    "stage", ["trajectories", "profiles", "prompts", "sft", "evaluate", "counters"]
)
def test_a_folder_that_is_not_there(stage, tmp_path):
    named = {
        "profiles": "--checkins",
        "sft": "--prompts",
        "evaluate": "--prompts",
        "trajectories": "--checkins",
    }.get(stage, "--trajectories")
    more = ["--model_checkpoint", "tiny-llama"] if stage in ("sft", "evaluate") else []
    r = call(
        "-m",
        f"recnb.poi.{stage}",
        named,
        str(tmp_path / "gone"),
        "--out",
        str(tmp_path / "o"),
        *more,
    )
    assert (
        r.returncode == 2
        and r.stderr.strip().count("\n") == 0
        and "gone" in r.stderr
        and not (tmp_path / "o").exists()
    )


def test_recipes_that_do_not_fit(tmp_path):
    good = (ROOT / "papermill_runs/recipes/smoke.yaml").read_text()
    for old, new, said in [
        ("max_steps", "max_stepps", "did you mean 'max_steps'"),
        ("city: alpha", "city: alfa", "did you mean 'alpha'"),
        ("task: poi", "tusk: poi", "did you mean 'task'"),
        ("warmup_steps: 1", "warmup_steps: many", "'many', expected int"),
        ("cross: [alpha-full/beta]", "cross: [alpha-full]", "run/city"),
    ]:
        (tmp_path / "r.yaml").write_text(good.replace(old, new))
        r = call(
            "-m",
            "recnb.studies",
            "--recipe",
            str(tmp_path / "r.yaml"),
            "--out",
            str(tmp_path / "o"),
        )
        assert r.returncode == 2 and said in r.stderr and r.stderr.strip().count("\n") == 0, (
            r.stderr
        )
    assert call("-m", "recnb.studies", "--recipe", "nyc").returncode == 2


def test_an_unfinished_study_says_why(tmp_path):
    "A model that is not there, through recipe, Snakemake, papermill and torchrun: one line."
    text = (ROOT / "papermill_runs/recipes/smoke.yaml").read_text()
    text = text.replace("tiny-llama", "models/not-there").replace("cross: [alpha-full/beta]", "")
    kept = [line for line in text.splitlines(True) if not line.startswith("  alpha-full:")]
    text = "".join(kept)
    (tmp_path / "r.yaml").write_text(text)
    r = call(
        "-m", "recnb.studies", "--recipe", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "o")
    )
    assert (
        r.returncode == 2
        and "models/not-there" in r.stderr.strip().splitlines()[-1]
        and "Traceback" not in r.stderr
    ), r.stderr
