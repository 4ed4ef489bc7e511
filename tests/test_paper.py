"""The recipe of the published tables lists every row.

The same grid runs with a tiny model on made cities, so that no preset is dead.
"""

import importlib
import itertools
import json
import re
import subprocess
import sys

import pandas as pd
import pytest
from conftest import ROOT

from recnb import recorded
from recnb.artifacts import Artifact, load_artifact
from recnb.methods import find_baselines, read_methods
from recnb.poi import analyses, checkins, evaluate, profiles, prompts, sft, templates, trajectories
from recnb.recipes import baseline_parameters, cross_parameters, read_recipe, run_parameters
from recnb.stages import make_params

PAPER = read_recipe(str(ROOT / "papermill_runs/recipes/paper.yaml"), "DATA")
CITIES, MODELS = ("nyc", "tky", "ca", "moscow", "sao_paulo"), ("llama2", "llama31", "llama32")
HERE = ("nyc", "tky", "ca")


def rows():
    "The notebooks that the papers' tables need, counted out by hand."
    runs = {f"{c}-{m}-full" for c in CITIES for m in MODELS}
    runs |= {f"{c}-llama2-none" for c in CITIES}
    runs |= {f"{c}-llama2-{h}" for c in HERE for h in ("similar", "last")}
    runs |= {f"{c}-longlora-last" for c in HERE}
    runs |= {f"nyc-llama2-{p}" for p in ("text", "routines", "attributes", "cot")}

    def decoding(city, model):
        if city in ("moscow", "sao_paulo"):
            return "cities"
        return "llama2" if model in ("llama2", "longlora") else "llama3"

    own, away = set(), set()
    for run in runs:
        city, model, what = run.split("-")
        if what != "cot":
            own.add(f"{run}/{city}/{decoding(city, model)}")
        if what == "full" and city in HERE:
            away |= {f"{run}/{c}/{decoding(c, model)}" for c in HERE if c != city}
    return runs, own | away


def test_dry_run_lists_exactly_the_published_rows(tmp_path):
    runs, cross = rows()
    wanted = {f"runs/{r}/{n}_poi.ipynb" for r in runs for n in ("train", "evaluate")} | {
        f"cross/{p}/cross_poi.ipynb" for p in cross
    }
    wanted |= (
        {f"cities/{c}/data_poi.ipynb" for c in CITIES}
        | {f"baselines/{b}/baseline_poi.ipynb" for b in PAPER.baselines}
        | {"results_poi.ipynb"}
    )
    (tmp_path / "data").mkdir()
    r = subprocess.run(
        [
            sys.executable,
            "-m",
            "snakemake",
            "-n",
            "-s",
            "papermill_runs/Snakefile",
            "--config",
            "recipe=paper",
            f"data={tmp_path}/data",
            f"out={tmp_path}/out",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    listed = {
        m
        for line in re.findall(r"^ +output: (.*)$", r.stdout + r.stderr, re.M)
        for m in re.findall(rf"{tmp_path}/out/(\S+\.ipynb)", line)
    }
    assert r.returncode == 0 and listed == wanted
    for c, stage in itertools.product(HERE, ("ranker", "getnext", "sthgcn")):
        assert any(
            baseline_parameters(PAPER, b)["city"] == c
            and baseline_parameters(PAPER, b)["stage"] == stage
            for b in PAPER.baselines
        )


def test_published_values_reach_the_stages():
    for r, v in ((r, run_parameters(PAPER, r)) for r in PAPER.runs):
        assert (
            v["sft"]["learning_rate"] == (2e-4 if "llama3" in r else 2e-5)
            and v["sft"]["num_epochs"] == 3
            and v["sft"]["tuning"] == "qlora"
        )
        assert v["sft"]["batch_size"] == (
            1 if r.startswith("nyc") or r.endswith(("similar", "last")) else 2
        )
        assert v["sft"]["max_length"] == (32768 if r.endswith(("similar", "last")) else 16384)


def test_llm4poi_as_its_authors_train_it_stands_beside_their_number(tmp_path):
    v = run_parameters(PAPER, "nyc-longlora-last")
    together = v["sft"]["gradient_accumulation_steps"] * v["launch"]["sft"]["nproc_per_node"]
    assert together * v["sft"]["batch_size"] == 8

    def ran(name, **more):
        (tmp_path / name).mkdir()
        manifest = dict(stage=f"poi.{name}", parameters=v[name] | more, facts={})
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
        return Artifact(tmp_path / name, manifest)

    told = ran("prompts", llm4poi=str(ran("llm4poi").path))
    row = analyses.label_language_model(ran("evaluate"), ran("sft"), told)
    usual = read_methods(ROOT / "papermill_runs/published")[row["method"]]["as_published"]
    assert {k: x for k, x in row["settings"].items() if x not in usual.get(k, [])} == {}
    lines, _ = recorded.read_recorded(ROOT)
    printed = [x for x in lines if x.source == "published" and x.method == row["method"]]
    assert row["model"] in {x.model for x in printed}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    "A made city for each real one, each made once by each process."
    base = tmp_path_factory.mktemp("paper")
    done = {}

    def city(name):
        if name not in done:
            at = base / "cities" / name
            p = dict(PAPER.cities[name])
            C = checkins.run(
                make_params(
                    checkins.Params,
                    dict(
                        dataset="made",
                        num_users=16,
                        num_pois=40,
                        num_days=40,
                        seed=CITIES.index(name),
                        out=str(at / "checkins"),
                    ),
                )
            )
            T = trajectories.run(
                make_params(
                    trajectories.Params,
                    dict(
                        p.get("trajectories") or {}, checkins=C.path, out=str(at / "trajectories")
                    ),
                )
            )
            F = profiles.run(
                make_params(
                    profiles.Params,
                    dict(
                        provider="statistics",
                        checkins=C.path,
                        trajectories=T.path,
                        out=str(at / "profiles"),
                    ),
                )
            )
            done[name] = T, F
        return done[name]

    city.base = base
    return city


def asked(made, name, values, at):
    "Prompts of a city, with the history of LLM4POI where the run has one."
    T, F = made(name)
    given = {
        **values["prompts"],
        "trajectories": T.path,
        "profiles": F.path,
        "out": str(at / "prompts"),
    }
    if given.get("reasonings"):
        given["reasonings"] = str(at.parent / "reasonings.jsonl")
        at.parent.mkdir(parents=True, exist_ok=True)
        ids = pd.read_parquet(T / "instances.parquet").query("split == 'train'").instance_id
        (at.parent / "reasonings.jsonl").write_text(
            "".join(
                json.dumps(
                    {
                        "instance_id": int(i),
                        **{k: "Often there at this hour." for k in templates.REASONS},
                    }
                )
                + "\n"
                for i in ids
            )
        )
    if given.get("tokenizer"):
        given |= {"tokenizer": "tiny-llama", "max_length": 700}
    if values.get("llm4poi"):
        small = dict(
            max_checkins=12, **({"encoder": "tiny-llama"} if "encoder" in values["llm4poi"] else {})
        )
        llm4poi = importlib.import_module("recnb.poi.llm4poi")
        given["llm4poi"] = llm4poi.run(
            make_params(
                llm4poi.Params,
                {**values["llm4poi"], **small, "trajectories": T.path, "out": str(at / "llm4poi")},
            )
        ).path
    return prompts.run(make_params(prompts.Params, given))


def scored(values, P, S, out):
    small = dict(
        model_checkpoint="tiny-llama",
        first_rows=2,
        dtype="float32",
        max_think_tokens=8,
        prompts=P.path,
        sft=S.path,
        out=str(out),
    )
    return evaluate.run(make_params(evaluate.Params, {**values, **small}))


@pytest.mark.parametrize("run", PAPER.runs)
def test_twin_of_a_run(run, made):
    "Prompts, fine-tuning, ranking, and all that the model is asked elsewhere."
    v = run_parameters(PAPER, run)
    at = made.base / "runs" / run
    P = asked(made, v["city"], v, at)
    small = dict(
        model_checkpoint="tiny-llama",
        tuning="lora",
        fsdp=False,
        dtype="float32",
        max_steps=1,
        train_rows=4,
        prompts=P.path,
        out=str(at / "sft"),
    )
    S = sft.run(make_params(sft.Params, {**v["sft"], **small}))
    found = [("", v["city"], scored(v["evaluate"], P, S, at / "evaluate"), P)]
    for pair in (c for c in PAPER.cross if c.split("/")[0] == run):
        c = cross_parameters(PAPER, pair)
        Q = P if c["city"] == v["city"] else asked(made, c["city"], v, at / "cross" / c["city"])
        found.append(
            (
                v["city"] if c["city"] != v["city"] else "",
                c["city"],
                scored(
                    {**v["evaluate"], **c["values"]}, Q, S, at / "cross" / pair.replace("/", "-")
                ),
                Q,
            )
        )
    seen = set()
    for trained, city, E, Q in found:
        labels = analyses.label_language_model(E, S, Q, trained_on=trained)
        row = (city, json.dumps(labels, sort_keys=True))
        assert (
            row not in seen and E.facts["rows"] == 2
        )  # no two rows of the table that look the same
        seen.add(row)
        assert analyses.make_folder_lines(
            E.path, made(city)[0].path, dataset=city, where="x", families=[], **labels
        )


SMALLER = dict(  # than SMOKE of the notebook: there are thirty of them
    ranker=dict(num_trees=5),
    getnext=dict(num_epochs=1, gcn_dims=[4, 8], poi_dim=8, user_dim=8, feedforward_dim=16),
    sthgcn=dict(max_steps=4, eval_steps=2, batch_size=8),
    in_context=dict(test_rows=2),
    agentmove=dict(test_rows=2, geocoder="grid"),
)


@pytest.mark.parametrize("name", PAPER.baselines)
def test_twin_of_a_baseline(name, made):
    b = baseline_parameters(PAPER, name)
    stage = importlib.import_module(f"recnb.poi.{b['stage']}")
    a = stage.run(
        make_params(
            stage.Params,
            {
                **b["values"],
                **stage.SMOKE,
                **SMALLER.get(b["stage"], {}),
                "trajectories": made(b["city"])[0].path,
                "out": str(made.base / "baselines" / name),
            },
        )
    )
    assert load_artifact(a.path).facts["n"] > 0


LISTED = {baseline_parameters(PAPER, name)["stage"] for name in PAPER.baselines}


NEED_MORE = {"elsewhere", "reranker"}  # a file of one's own, a ranker


@pytest.mark.parametrize("name", sorted(find_baselines().keys() - LISTED - NEED_MORE))
def test_a_baseline_that_the_paper_does_not_list(name, made):
    stage = importlib.import_module(f"recnb.poi.{name}")
    folders = dict(trajectories=made("nyc")[0].path, out=str(made.base / "baselines" / name))
    a = stage.run(make_params(stage.Params, {**stage.SMOKE, **folders}))
    assert load_artifact(a.path).facts["n"] > 0


def test_a_part_of_it_and_a_name_that_is_none(tmp_path):
    (tmp_path / "data").mkdir()

    def asked(only):
        return subprocess.run(
            [
                sys.executable,
                "-m",
                "snakemake",
                "-n",
                "-s",
                "papermill_runs/Snakefile",
                "--config",
                "recipe=paper",
                f"data={tmp_path}/data",
                f"out={tmp_path}/out",
                f"only={only}",
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )

    r = asked("nyc-llama32-full,nyc-getnext-42")
    listed = {
        m
        for line in re.findall(r"^ +output: (.*)$", r.stdout + r.stderr, re.M)
        for m in re.findall(rf"{tmp_path}/out/(\S+\.ipynb)", line)
    }
    assert listed == {
        "cities/nyc/data_poi.ipynb",
        "runs/nyc-llama32-full/train_poi.ipynb",
        "runs/nyc-llama32-full/evaluate_poi.ipynb",
        "cross/nyc-llama32-full/nyc/llama3/cross_poi.ipynb",
        "baselines/nyc-getnext-42/baseline_poi.ipynb",
        "results_poi.ipynb",
    }
    assert "did you mean 'nyc-llama2-full'" in (r := asked("nyc-llama23-full")).stdout + r.stderr


def test_every_published_row_of_a_city_is_promised():
    lines, facts = recorded.read_recorded(ROOT)
    for city in CITIES:
        missing = recorded.list_unmeasured(
            [line for line in lines if line.source == "published"],
            city,
            facts,
            str(ROOT / "papermill_runs/recipes/paper.yaml"),
        )
        assert (
            len(missing) >= 7
            and missing.command.str.startswith("`make study").all()
            and (missing.needs != "–").all()
        )
