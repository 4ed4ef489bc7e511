"The budget agrees with what was measured, fits what recipes name, and refuses what cannot fit."

import glob
import json
import os
import re

import pytest
from conftest import ROOT

from recnb import budget, models, studies
from recnb.budget import SHAPES, Kernels, count_kept, find_misfits, list_costs
from recnb.recipes import read_recipe
from recnb.stages import BadInput

RECIPES = ROOT / "papermill_runs/recipes"
AT_FULL_SIZE = ("paper", "paper-rating")


def read_named(name, *settings):
    return read_recipe(str(RECIPES / f"{name}.yaml"), "DATA", settings)


def ask_what_is_kept(decoder, ids):
    "Bytes that torch keeps going forward, without weights."
    import torch

    kept = []
    weights = {w.untyped_storage().data_ptr() for w in decoder.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        decoder(input_ids=ids, use_cache=False)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(n for place, n in sizes.items() if place not in weights)


@pytest.mark.parametrize("tuning", ["full", "dropout", "everywhere", "norms"])
def test_what_a_layer_keeps(tuning, name="tiny-qwen"):
    import torch

    model, _ = models.load_model(name, device="cpu", dtype="float32")
    targets, dropout = models.ATTENTION, 0.0
    if tuning == "dropout":
        targets, dropout = ("k_proj", "v_proj"), 0.1
    if tuning == "everywhere":
        targets = (*targets, "gate_proj", "up_proj", "down_proj")
    if tuning == "full":
        model.train()
        said = count_kept(SHAPES[name], Kernels(4, full=True), 96)
    else:
        saved = ("embed_tokens", "norm") if tuning == "norms" else ()
        how = dict(dropout=dropout, targets=targets, modules_to_save=saved)
        model = models.add_lora(model, 4, **how).get_base_model()
        kernels = Kernels(4, noise=4, norms=bool(saved))
        said = count_kept(SHAPES[name], kernels, 96, 4, targets, dropout > 0)
    ids = torch.ones(2, 96, dtype=torch.long)
    assert ask_what_is_kept(model.get_decoder(), ids) == pytest.approx(
        2 * said * ids.numel(), rel=0.1
    )


def list_recorded(name, card, *settings):
    "Costs of a recipe beside the recorded manifests of the same stages."
    for c in list_costs(read_named(name, *settings), card):
        row = c.row.replace("runs.", "runs/").replace(", arm ", "/arms/")
        found = glob.glob(
            str(ROOT / f"papermill_runs/results/manifests/{name}/{row}/{c.stage}/*.json")
        )
        for file in found:
            yield c, json.loads(open(file).read())


@pytest.mark.parametrize("name", ["nyc", "nyc-compared", "movies"])
def test_memory_on_a_cpu_is_as_measured(name):
    checked = 0
    for c, made in list_recorded(name, "cpu"):
        if c.stage == "grpo" or "similar" in c.row:
            continue  # attention was computed in another way then; histories were shorter
        assert c.total == pytest.approx(made["peak_memory_mib"] / 1024, rel=0.21), (c.row, c.stage)
        checked += 1
    assert checked >= 2


def test_memory_on_a_card_is_as_measured():
    stages = set()
    for c, made in list_recorded("movies-gpu", "H100 80GB", "grpo.share_prompts=false"):
        if measured := made["facts"].get("memory_mib"):
            said = c.total - c.memory["context"]  # torch counts what it has given out itself
            assert said == pytest.approx(measured / 1024, rel=0.2), (c.row, c.stage)
            stages.add(c.stage)
    assert stages == {"warm_start", "grpo", "alignment"}


def test_time_and_tokens_of_a_recorded_training():
    trained = [(c, m) for c, m in list_recorded("nyc-gpu", "H100 80GB") if c.stage == "sft"]
    assert len(trained) == 2
    for c, made in trained:
        assert 0.5 < c.hours * 3600 / made["wall_time_s"] < 2
    (c, made) = trained[0]
    left_out = made["facts"]["too_long"] / (made["facts"]["prompts"] + made["facts"]["too_long"])
    assert made["facts"]["tokens"] < c.tokens < made["facts"]["tokens"] * (1 + 7 * left_out)


@pytest.mark.parametrize("name", AT_FULL_SIZE)
def test_published_sizes_fit_the_cards_that_their_heads_name(name):
    r = read_named(name)
    costs = list_costs(r)
    assert {c.row for c in costs if c.stage in ("sft", "alignment")} and not find_misfits(r)
    words = " ".join(f"{r.about.machine} {r.about.gpu}".split())
    hours = float(re.search(r"([\d,]+) hours of one card", words)[1].replace(",", ""))
    assert hours == pytest.approx(sum(c.hours * c.cards for c in costs), rel=0.05)
    largest = float(re.search(r"for each: (\d+) GiB", words)[1])
    assert largest == pytest.approx(max(c.total for c in costs), rel=0.05)
    cards = {"two": 2, "eight": 8}[r.about.gpu.split(";")[0]]
    assert max(c.cards for c in costs) == cards


def test_a_smaller_card_is_refused_with_what_fits():
    whole = read_named("paper-rating", "grpo.fsdp=false")
    with pytest.raises(BadInput, match=r"grpo.fsdp=true: .* GiB on a card of 80") as e:
        budget.check_room(whole, "H100 80GB")
    assert "\n" not in str(e.value)
    better = read_named("paper-rating")
    assert not find_misfits(better, "H100 80GB")
    assert find_misfits(better, "RTX 4090")


def test_a_run_is_refused_by_the_card_of_this_machine(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 24564\necho 24564\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert budget.find_cards() == (2, pytest.approx(23.99, abs=0.01))
    monkeypatch.chdir(ROOT)
    asked = studies.Params(recipe=["paper-rating"], data=str(tmp_path), out=str(tmp_path / "out"))
    with pytest.raises(BadInput, match="GiB on a card of 24"):
        studies.run(asked)
    assert not (tmp_path / "out").exists()
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert budget.find_cards() == (0, 0)


@pytest.mark.parametrize("name", ["smoke", "own", "own-rating", "quick-rating", "benchmarks"])
def test_a_budget_is_printed_and_nothing_is_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    data = tmp_path / "my.csv"
    data.write_text("user,item,rating,time\n" if "rating" in name else "user,poi,time\n")
    asked = studies.Params(recipe=[name], budget=True, data=str(data), out=str(tmp_path / "out"))
    text = studies.run(asked)
    assert "nan" not in text and not (tmp_path / "out").exists()
    assert ("no stage with a language model" if name == "benchmarks" else "weights") in text


def test_a_card_that_is_not_known():
    with pytest.raises(BadInput, match="did you mean 'A100 80GB'"):
        studies.run(studies.Params(recipe=["nyc-gpu"], data="x", budget=True, card="A100 80 GB"))
