"One card: what there is to do, in which order, side by side; and folders that the notebooks take."

from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from recnb import card
from recnb.artifacts import load_artifact
from recnb.recipes import read_recipe
from recnb.stages import BadInput
from recnb.steps import notebook_parameters

RECIPE = """
task: rating
title: a test
datasets:
  beta:
    reviews: {dataset: made, num_users: 12, num_items: 40}
    sketch: {n_clusters: 4}
    baselines: {num_trees: 5}
arms: {HA: {}, CE: {alignment: {kd_ratio: 0}}}
common:
  model: {model_checkpoint: tiny-qwen}
  warm_start: {num_epochs: 2}
  alignment:
    {max_steps: 2, training_ratio: 1, warmup_steps: 1, validation_rows: 4, keep_untrained: true}
  cot: {max_new_tokens: 8}
runs:
  reasons: {dataset: beta, arms: [HA, CE], before: [untrained, warm_start]}
  tuned: {dataset: beta, prompts: {max_history: 3}, sketches: [none]}
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE)
    return str(tmp_path / "r.yaml")


def test_jobs_have_the_parameters_of_the_notebooks(recipe):
    r = read_recipe(recipe)
    jobs = {j.out.removeprefix("o/runs/"): j for j in card.list_jobs(r, "o", processes=3)}
    asked = notebook_parameters(r, "o", "train_rating", run="reasons")
    for stage in ("warm_start", "grpo"):
        wanted = asked[f"{stage}_parameters"]
        wanted |= {"model_checkpoint": "o/runs/reasons/warm_start/model"} if stage == "grpo" else {}
        assert jobs[f"reasons/{stage}"].parameters.items() >= wanted.items()
    asked = notebook_parameters(r, "o", "align_rating", run="reasons", arm="CE")
    made = jobs["reasons/arms/CE/alignment"]
    assert made.parameters["kd_ratio"] == 0
    assert made.parameters["reasoning"] == "o/runs/reasons/reasoning" in made.needs
    assert made.parameters["max_steps"] == asked["alignment_parameters"]["max_steps"]
    assert jobs["reasons/before/warm_start_cot"].parameters["mode"] == "cot"
    assert "grpo" not in jobs["reasons/before/untrained"].parameters
    assert jobs["reasons/cot"].processes == 3 and jobs["reasons/grpo"].processes == 1
    other = jobs["tuned/sketches/none/answer_only"]
    assert other.parameters["alignment"] == "o/runs/tuned/alignment" in other.needs
    made = {j.out: j for j in card.list_preparations(r, "o")}
    told = made[other.parameters["prompts"]].parameters
    given = notebook_parameters(r, "o", "sft_rating", run="tuned")["sketches"]["none"]
    assert told.items() >= given.items() and given["use_long_history"] is False
    first = list(made)
    assert first.index("o/datasets/beta/sketch") < first.index("o/runs/tuned/prompts")


def test_baselines_and_other_cities_are_those_of_the_notebooks(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    r = read_recipe("smoke")
    prepared = {j.out: j for j in card.list_preparations(r, "o")}
    jobs = {j.out: j for j in card.list_jobs(r, "o")}
    assert set(r.baselines) == set("ranker reranker getnext sthgcn llm-mob agentmove".split())
    for name in r.baselines:
        asked = notebook_parameters(r, "o", "baseline_poi", baseline=name)
        made = (prepared if name == "ranker" else jobs)[f"{asked['run']}/{asked['stage']}"]
        told = {"trajectories": f"{asked['city']}/trajectories", "out": made.out}
        assert made.parameters == {**asked["values"], **told}
        assert set(made.needs) >= {v for k, v in made.parameters.items() if k == "ranker"}
    asked = notebook_parameters(r, "o", "cross_poi", pair="alpha-full/beta")
    made = jobs[f"{asked['out']}/evaluate"]
    assert made.parameters["sft"] == f"{asked['run']}/sft" in made.needs
    assert made.parameters.items() >= asked["evaluate_parameters"].items()
    told = prepared[f"{asked['out']}/prompts"].parameters
    assert told["trajectories"] == f"{asked['city']}/trajectories" and told["tokenizer"]


def make_small(name, tmp_path):
    "A recipe as it stands, on a made city and with a tiny model."
    recipe = yaml.safe_load((ROOT / f"papermill_runs/recipes/{name}.yaml").read_text())
    made = dict(dataset="made", num_users=10, num_pois=30, num_days=30)
    (city,) = recipe["cities"].values()
    city["checkins"] = made
    recipe["common"]["model"] = dict(model_checkpoint="tiny-llama")
    recipe["common"]["sft"] |= dict(max_steps=2, batch_size=2)
    recipe["runs"]["history"]["prompts"]["max_length"] = 400
    recipe["baselines"] = {}
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return str(tmp_path / f"{name}.yaml")


def test_a_history_is_told_and_asked_about_as_by_the_notebooks(tmp_path):
    recipe, out = make_small("nyc-gpu-history", tmp_path), str(tmp_path / "out")
    card.run(card.Params(recipe=recipe, out=out, prepare=True))
    assert card.run(card.Params(recipe=recipe, out=out, processes=1)).startswith("2 stages")
    here = f"{out}/runs/history"
    seen = {f: f.stat().st_mtime_ns for f in Path(out).rglob("manifest.json")}
    assert len(seen) == 7
    from recnb.poi import analyses, evaluate, llm4poi, prompts, sft

    v = notebook_parameters(read_recipe(recipe), out, "train_poi", run="history")
    told = {k: f"{v['city']}/{k}" for k in ("trajectories", "profiles")}
    H = llm4poi.run(
        v["llm4poi_parameters"], trajectories=told["trajectories"], out=f"{here}/llm4poi"
    )
    given = {"tokenizer": "tiny-llama", **v["prompts_parameters"], **told}
    P = prompts.run(given, llm4poi=H, out=f"{here}/prompts")
    S = sft.run(v["sft_parameters"], prompts=P, out=f"{here}/sft")
    v = notebook_parameters(read_recipe(recipe), out, "evaluate_poi", run="history")
    E = evaluate.run(v["evaluate_parameters"], prompts=P, sft=S, out=f"{here}/evaluate")
    assert seen == {f: f.stat().st_mtime_ns for f in Path(out).rglob("manifest.json")}
    assert analyses.label_language_model(E, S, P)["method"] == "own history"
    assert P.facts["train histories cut"] > 0


STAGE = """
import os, time
from pathlib import Path
from recnb.artifacts import _join_group
from recnb.stages import BadInput

def run(p):
    out = Path(p["out"])
    rank = int(os.environ.get("RANK", 0))
    if p.get("memory") and not out.with_suffix(".tried").exists():
        out.with_suffix(".tried").touch()
        raise RuntimeError("CUDA out of memory")
    if p.get("wrong"):
        raise BadInput("something else")
    if p.get("group"):  # as a stage whose folder is there already
        group = _join_group(p["out"])
        if rank:
            time.sleep(0.5)
            assert group.read_task() == "reuse"
        else:
            group.announce("reuse")
    time.sleep(p.get("seconds", 0.1))
    (out.parent / f"{out.name}{rank or ''}").write_text(str(time.monotonic()))
    return out.name
"""


def test_one_waits_for_another_and_a_failure_stops_only_those_that_need_it(tmp_path, monkeypatch):
    (tmp_path / "toy_stage.py").write_text(STAGE)
    monkeypatch.syspath_prepend(str(tmp_path))

    def job(name, *needs, processes=1, **values):
        out, needs = str(tmp_path / name), tuple(str(tmp_path / n) for n in needs)
        return card.Job(out, "toy_stage", {"out": out, **values}, needs, processes)

    jobs = [
        job("after", "slow"),
        job("slow", seconds=1.0),
        job("beside", seconds=0.1),
        job("bad", wrong=True),
        job("lost", "bad"),
        job("full", memory=True),
        job("pair", processes=2, group=True),
    ]
    failed = card.run_jobs(jobs, tmp_path / "logs", at_once=7, context=card.start_server())
    names = {Path(k).name: why for k, why in failed.items()}
    assert set(names) == {"bad", "lost"} and "something else" in names["bad"]
    assert names["lost"].startswith("needs")
    at = {n: float((tmp_path / n).read_text()) for n in ("after", "slow", "beside", "full")}
    assert at["beside"] < at["slow"] < at["after"]
    assert (tmp_path / "pair").exists() and (tmp_path / "pair1").exists()


def test_folders_are_those_of_the_notebooks(recipe, tmp_path):
    out = str(tmp_path / "out")
    given = dict(recipe=recipe, only=["tuned"], out=out)
    with pytest.raises(BadInput, match="prompts"):
        card.run(card.Params(**given))
    card.run(card.Params(**given, prepare=True))
    assert card.run(card.Params(**given)).startswith("3 stages")
    made = load_artifact(f"{out}/runs/tuned/alignment", "rating.alignment")
    assert made.facts["steps"] == 2 and made.facts["best_step"] in (0, 2)
    seen = {f: f.stat().st_mtime_ns for f in Path(out).rglob("manifest.json")}
    assert len(seen) == 8
    card.run(card.Params(**given))  # two processes find a folder that is there
    # and what the notebook asks for is what is there
    from recnb.rating import alignment, answer_only, prompts

    v = notebook_parameters(read_recipe(recipe), out, "sft_rating", run="tuned")
    told = {k: f"{v['dataset']}/{k}" for k in ("reviews", "sketch")}
    tokenizer = {"tokenizer": "tiny-qwen"}
    P = prompts.run({**tokenizer, **v["prompts_parameters"]}, **told, out=f"{v['run']}/prompts")
    asked = {**v["alignment_parameters"], "prompts": P.path, "kd_ratio": 0.0}
    H = alignment.run({**asked, "prompts": str(P.path)}, out=f"{v['run']}/alignment")
    answer = {**v["answer_only_parameters"], "mode": "answer", "prompts": str(P.path)}
    answer_only.run(answer, alignment=H, out=f"{v['run']}/answer_only")
    assert seen == {f: f.stat().st_mtime_ns for f in Path(out).rglob("manifest.json")}
