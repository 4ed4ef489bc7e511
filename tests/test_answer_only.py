"The answer-only stage as a user meets it: probabilities against brute force, the same rows for every model, shared work."

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_reasoning import ENV, Adapted, alignment, grpo  # `made` is a fixture

import recnb.rating.answer_only as answer_only
from recnb import models
from recnb.artifacts import load
from recnb.rating.prompts import EMPTY, chat, digit_ids, open_prompts
from recnb.stages import BadInput

torch = pytest.importorskip("torch")
P = [f"p{k}" for k in range(1, 6)]


def params(d, **kw):
    return answer_only.Params(
        **dict(
            prompts=f"{d}/prompts",
            model_checkpoint=f"{d}/model",
            out=f"{d}/out",
            max_completion_length=50,
            batch_size=4,
        )
        | kw
    )


def run(d, **kw):
    return answer_only.run(params(d, **kw)).path


def files(folder):
    return {f: (Path(folder) / f).read_bytes() for f in ("predictions.parquet", "metrics.json")}


def read(folder):
    return pd.read_parquet(folder / "predictions.parquet"), json.loads(
        (folder / "metrics.json").read_text()
    )


@pytest.fixture(scope="module")
def plain(made):
    return run(made, out=f"{made}/plain")


@pytest.fixture(scope="module")
def cot(made):
    return run(made, out=f"{made}/cot", mode="cot", temperature=1.0)


def brute(model, tokenizer, tokens):
    "Probability of each digit after some tokens, one whole pass for each."
    found = []
    for k in digit_ids(tokenizer, EMPTY):
        ids = torch.tensor([[*tokens, k]])
        with torch.inference_mode():
            found.append(model(ids).logits[0, -2].double().softmax(0)[k].item())
    return np.array(found)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen"])
def test_probabilities_are_those_of_brute_force(made, name):
    t, m = read(run(made, model_checkpoint=name, out=f"{made}/{name}"))
    model, tokenizer = models.load(name)
    system, tables = open_prompts(made / "prompts")
    rows = tables["test"].set_index("row_id")
    assert t.columns.tolist() == [
        "row_id",
        "label",
        *P,
        "invalid",
        "greedy_valid",
        "argmax",
        "expected",
        "median",
    ]
    assert (
        t.row_id.tolist() == sorted(rows.index)
        and (t.label.to_numpy() == rows.label[t.row_id].to_numpy()).all()
    )
    for r in t.itertuples():
        p = brute(
            model,
            tokenizer,
            tokenizer.encode(chat(tokenizer, system, rows.prompt[r.row_id]) + EMPTY),
        )
        assert np.allclose([r.p1, r.p2, r.p3, r.p4, r.p5], p / p.sum(), atol=1e-6) and np.isclose(
            r.invalid, 1 - p.sum(), atol=1e-6
        )
        assert (
            r.argmax == 1 + p.argmax()
            and np.isclose(r.expected, p @ np.arange(1, 6) / p.sum(), atol=1e-5)
            and not r.greedy_valid
        )
    assert (
        m["invalid"]["value"] > 0.9
        and m["greedy_valid"]["value"] == 0
        and m["argmax"]["unanswered"] == 0
    )  # nothing became a 5
    assert m["argmax"]["MAE"]["value"] == pytest.approx(abs(t.argmax - t.label).mean()) and m[
        "expected"
    ]["RMSE"]["value"] == pytest.approx(((t.expected - t.label) ** 2).mean() ** 0.5)


def test_a_model_that_knows_the_form(made, plain):
    t, m = read(plain)
    model, tokenizer = models.assemble(f"{made}/model")
    system, tables = open_prompts(made / "prompts")
    prompts = tables["test"].set_index("row_id").prompt
    assert t.greedy_valid.any() and m["greedy_valid"]["value"] == t.greedy_valid.mean()
    for r in t[t.greedy_valid].itertuples():
        ids = torch.tensor([tokenizer.encode(chat(tokenizer, system, prompts[r.row_id]) + EMPTY)])
        with torch.inference_mode():
            assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == str(int(r.argmax))


def test_padding_and_common_beginning_change_nothing(made, plain, monkeypatch):
    one = read(run(made, out=f"{made}/one", batch_size=1))[0]
    monkeypatch.setattr(answer_only, "shared", lambda *a: (0, None))
    whole = read(run(made, out=f"{made}/whole"))[0]
    for other in (one, whole):
        assert (
            np.abs(other[[*P, "invalid"]] - read(plain)[0][[*P, "invalid"]]).to_numpy().max() < 1e-6
        )


def test_two_processes_write_the_same_bytes(made, plain):
    flags = [
        "--prompts",
        f"{made}/prompts",
        "--model_checkpoint",
        f"{made}/model",
        "--out",
        f"{made}/two",
        "--max_completion_length",
        "50",
        "--batch_size",
        "4",
        "--latency_rows",
        "2",
    ]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            "-m",
            "recnb.rating.answer_only",
            *flags,
        ],
        env=ENV,
        check=True,
        timeout=180,
        cwd=made,
    )
    assert files(made / "two") == files(plain)


def test_reasoning_first(made, cot):
    t, m = read(cot)
    model, tokenizer = models.assemble(f"{made}/model")
    system, tables = open_prompts(made / "prompts")
    prompts = tables["test"].set_index("row_id").prompt
    there = t.predicted.notna()
    assert (
        t.columns.tolist()[-3:] == ["predicted", "text", "tokens"]
        and 0 < there.sum()
        and (t.p1.notna() == there).all()
    )
    for r in t[there].itertuples():
        before = r.text[: r.text.rindex("<answer>") + 8]
        p = brute(
            model, tokenizer, tokenizer.encode(chat(tokenizer, system, prompts[r.row_id]) + before)
        )
        assert np.allclose([r.p1, r.p2, r.p3, r.p4, r.p5], p / p.sum(), atol=1e-5)
    assert m["policy"]["value"] == tables["valid"].label.mean()
    assert m["predicted"]["MAE"]["value"] == pytest.approx(
        abs(t.predicted.fillna(m["policy"]["value"]) - t.label).mean()
    )


def test_rows_without_an_answer(made):
    t, m = read(run(made, out=f"{made}/cut", mode="cot", max_completion_length=3))
    policy, label = open_prompts(made / "prompts")[1]["valid"].label.mean(), t.label
    assert (
        t[[*P, "argmax", "expected", "median", "predicted", "invalid"]].isna().all(axis=None)
        and m["predicted"]["unanswered"] == len(t)
        and m["invalid"]["n"] == 0
    )
    assert m["median"]["MAE"]["value"] == pytest.approx(abs(policy - label).mean())
    assert (
        m["median"]["sensitivity"]["as_5"]["MAE"]["value"] == pytest.approx((5 - label).mean())
        and m["median"]["sensitivity"]["answered"]["MAE"]["n"] == 0
    )


def test_same_rows_for_every_model(made):
    rows = {
        (m, s): read(run(made, out=f"{made}/{m[-5:]}{s}", model_checkpoint=m, test_rows=5, seed=s))[
            0
        ].row_id.tolist()
        for m in ("tiny-llama", f"{made}/model")
        for s in (1, 2)
    }
    assert (
        rows["tiny-llama", 1] == rows[f"{made}/model", 1] != rows["tiny-llama", 2]
        and len(rows["tiny-llama", 1]) == 5
    )


def test_what_earlier_stages_made(made, plain):
    (
        grpo(Adapted(f"{made}/model", f"{made}/grpo")),
        alignment(Adapted(f"{made}/model", f"{made}/aligned", f"{made}/grpo", 0.1)),
    )
    kw = dict(grpo=f"{made}/grpo", alignment=f"{made}/aligned")
    first, both = (
        read(run(made, out=f"{made}/{n}", **k))[0][P].to_numpy()
        for n, k in dict(first=dict(grpo=kw["grpo"]), both=kw).items()
    )
    assert abs(first - read(plain)[0][P]).max(axis=None) > 1e-4 and abs(first - both).max() > 1e-4
    with pytest.raises(BadInput, match="on which .* was trained"):
        run(made, out=f"{made}/wrong", alignment=f"{made}/aligned")


def test_times_are_no_part_of_the_result(made, plain):
    timed = run(made, out=f"{made}/timed", latency_rows=3)
    found = json.loads((timed / "latency.json").read_text())
    assert files(timed) == files(plain) and load(timed).digest == load(plain).digest
    assert found["rows"] == 3 and [(a["mode"], a["batch"]) for a in found["arms"]] == [
        ("answer", 1),
        ("cot", 1),
        ("answer", 4),
        ("cot", 4),
    ]
    assert (
        all(0 < a["seconds"] <= a["seconds_median"] for a in found["arms"])
        and found["arms"][0]["tokens_written"] == 1 < found["arms"][1]["tokens_written"]
    )
