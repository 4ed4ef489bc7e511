"What a card is asked: the whole of it at tiny size on a CPU, and every command of the real size."

import importlib
import json
import os
import subprocess

import pytest
from conftest import ROOT

from recnb import gpu, models
from recnb.budget import SHAPES, count_parameters
from recnb.results import read_lines
from recnb.stages import BadInput, Incomplete, make_params
from recnb.tables import check_tables, write_tables


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    "A run at tiny size, and what it said."
    out = tmp_path_factory.mktemp("gpu")
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        yield out, gpu.run(gpu.Params(out=str(out), size="tiny", at_once=2))
    finally:
        os.chdir(before)


def test_the_whole_of_it_runs_and_holds_at_tiny_size(ran):
    out, said = ran
    report = json.loads((out / "gpu.json").read_text())
    assert [part["part"] for part in report["parts"]] == list(gpu.PARTS)
    found = {x["what"]: x for part in report["parts"] for x in part["findings"]}
    assert all(x["holds"] for x in found.values()) and "DOES NOT HOLD" not in said
    for tuning in ("LoRA", "QLoRA", "all weights"):  # both are the CPU here
        assert found[f"{tuning}, float32"]["value"] == 0
    assert 0 < found["LoRA, bfloat16"]["value"] < 0.03
    assert found["killed and resumed"]["value"] == 0
    assert report["card"] in said and report["commit"][:8] in said
    assert str(out) not in json.dumps([report["lines"], report["manifests"]])


def test_the_file_is_taken_in_anywhere(ran, tmp_path):
    out, _ = ran
    results = tmp_path / "results"
    count = gpu.record_report(out / "gpu.json", results)
    lines = read_lines(results / "results.jsonl")
    assert len(lines) == count and {x.task for x in lines} == {"benchmark"}
    assert all((results / x.where).is_file() for x in lines)
    assert any("/runs/grpo/" in x.where and x.metric == "times as fast" for x in lines)
    write_tables(results, tmp_path / "nowhere")
    assert check_tables(results, tmp_path / "nowhere") == []
    before = {f: f.read_bytes() for f in results.rglob("*.json*")}
    gpu.record_report(out / "gpu.json", results)  # the same again
    assert before == {f: f.read_bytes() for f in results.rglob("*.json*")}
    report = json.loads((out / "gpu.json").read_text())
    other = json.loads(json.dumps(report).replace(report["card"], "Another card"))
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert gpu.record_report(tmp_path / "other.json", results) == 2 * count
    assert len({x.where.split("/")[1] for x in read_lines(results / "results.jsonl")}) == 2
    with pytest.raises(BadInput, match="recnb.gpu"):
        gpu.record_report(results / "results.jsonl")


def test_what_fails_leaves_the_others(tmp_path, monkeypatch):
    "A stage that fails, one that takes too long and a number that is off: each says so alone."
    (tmp_path / "toy_check.py").write_text(
        "import pathlib, time\n"
        "def run(p):\n"
        "    time.sleep(p.get('seconds', 0))\n"
        "    pathlib.Path(p['out']).mkdir()\n"
        "    assert not p.get('wrong'), 'no such luck'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def part(name, value=0.0, **given):
        out = str(tmp_path / name)
        limit = 2 if "seconds" in given else 60  # the first of all waits for the server's imports
        job = gpu.Job(out, "toy_check", {"out": out, **given}, (), 1, limit)
        return gpu.Part(name, [job], [gpu.Check("a number", lambda: value, (out,), bound=1)])

    parts = [part("good"), part("bad", wrong=True), part("slow", seconds=60), part("off", 3.0)]
    parts.append(part("alone")._replace(alone=True))
    found = {x["part"]: x["findings"][0] for x in gpu.run_parts(parts, str(tmp_path / "l"), 4, 60)}
    assert {name for name, x in found.items() if x["holds"]} == {"good", "alone"}
    assert "no such luck" in found["bad"]["why"] and "stopped after 2 s" in found["slow"]["why"]
    assert found["off"]["value"] == 3 and found["slow"]["value"] is None
    late = gpu.run_parts(parts[:1], str(tmp_path / "l"), 1, seconds=0)
    assert late[0]["findings"][0]["why"] == "no time left"
    monkeypatch.setattr(gpu, "list_parts", lambda p: parts)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Incomplete, match="slow .*DOES NOT HOLD stopped"):
        gpu.run(gpu.Params(out=str(tmp_path / "out"), minutes=1))


def test_every_command_of_the_real_size_is_one(ran, monkeypatch):
    "Stages take the parameters that a card's run gives them, and its models fit on 80 GiB."
    out, _ = ran
    monkeypatch.setattr(gpu, "_find_device", lambda: "cuda")
    parts = gpu.list_parts(gpu.Params(out=str(out), size="card"))
    seen = set()
    for part in parts:
        made = {job.out for other in parts for job in (*other.data, *other.jobs)}
        for job in (*part.data, *part.jobs):
            assert set(job.needs) <= made
            if ":" not in job.module:
                make_params(importlib.import_module(job.module).run.Params, job.parameters)
                seen.add(job.module)
    assert {"recnb.poi.evaluate", "recnb.rating.alignment", "recnb.rating.baselines"} <= seen
    (memory,) = (part for part in parts if part.name == "memory")
    for job in memory.jobs:
        stage = job.module.removeprefix("recnb.")
        assert 2 < gpu.predict_memory(stage, job.parameters, card=True) < 75
    pages = [job.parameters["page"] for job in parts[-1].jobs[1:]]
    assert set(pages) == {"ranking", "grpo", "answer_only", "sft"}
    with pytest.raises(BadInput, match="losses"):
        gpu.list_parts(gpu.Params(size="card", parts=["loses"]))


@pytest.mark.parametrize("name", models.RANDOM)
def test_models_with_random_weights_have_the_sizes_of_the_budget(name):
    built = models.build_random_model(name, device="meta")
    assert built.num_parameters() == count_parameters(SHAPES[name])


def test_the_scripts_give_the_flags_of_their_modules():
    def ask(script, *words, **more):
        env = {**os.environ, "PYTHON": "echo", **more}
        call = ["bash", str(ROOT / "papermill_runs" / script), *words]
        return subprocess.run(call, env=env, capture_output=True, text=True, check=True).stdout

    assert ask("gpu.sh", "--minutes", "4").split() == "-m recnb.gpu --minutes 4".split()
    flags = "--recipe nyc --at_once 8 --processes 2 --data folder"
    assert ask("on_a_card.sh", "nyc", "folder") == f"-m recnb.card {flags}\n"
    said = ask("on_a_card.sh", "prepare", "nyc", "folder", LOGS="logs")
    assert said == f"-m recnb.card --prepare {flags} --logs logs\n"
    assert (ROOT / "papermill_runs/gpu.sh").stat().st_mode & 0o100
