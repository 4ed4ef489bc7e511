"Every stage as a command: light help, and one clear line for a model or a folder that is not there."

import os
import resource
import subprocess
import sys

import pytest
from conftest import ROOT

STAGES = (
    "poi.checkins poi.trajectories poi.profiles poi.prompts poi.sft poi.evaluate poi.analyses poi.counters poi.ranker poi.llm4poi poi.getnext poi.sthgcn poi.in_context poi.agentmove poi.audit studies results "
    "rating.reviews rating.sketch rating.prompts rating.warm_start rating.grpo rating.reasoning rating.alignment rating.answer_only rating.audit rating.baselines".split()
)


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
    assert r.returncode == 0 and "--out" in r.stdout or stage == "results"
    # processor time, since the wall clock of a busy machine says nothing; alone it is about the same
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5
    assert not {"torch", "transformers", "datasets"} & {
        l.split("|")[-1].strip() for l in r.stderr.splitlines()
    }


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
    "A model path that is not there, through recipe, Snakemake, papermill and torchrun: one line, exit code 2."
    text = (
        (ROOT / "papermill_runs/recipes/smoke.yaml")
        .read_text()
        .replace("tiny-llama", "models/not-there")
        .replace("cross: [alpha-full/beta]", "")
    )
    text = text.replace(
        "  alpha-full: {city: alpha, prompts: {profile: full}, launch: {sft: {nproc_per_node: 2}, evaluate: {nproc_per_node: 2}}}\n",
        "",
    )
    (tmp_path / "r.yaml").write_text(text)
    r = call(
        "-m", "recnb.studies", "--recipe", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "o")
    )
    assert (
        r.returncode == 2
        and "models/not-there" in r.stderr.strip().splitlines()[-1]
        and "Traceback" not in r.stderr
    ), r.stderr
