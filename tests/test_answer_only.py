"The answer-only stage: probabilities against brute force, common rows, shared work."

import json
from pathlib import Path

import numpy as np
import pytest
from test_reasoning import ENV, TORCHRUN, Adapted, alignment, grpo, made  # noqa: F401

import recnb.rating.answer_only as answer_only
from recnb import models
from recnb.artifacts import load_artifact
from recnb.rating.prompts import EMPTY_REASONING, find_digit_tokens, open_prompts, render_chat
from recnb.stages import BadInput

# ruff: noqa: F811  `made` is a fixture
torch = pytest.importorskip("torch")
P = [f"p{k}" for k in range(1, 6)]
READINGS = ["argmax", "expected", "median"]


def run(d, **kw):
    given = dict(prompts=d / "prompts", model_checkpoint=d / "model", max_new_tokens=50)
    return answer_only.run(given | dict(out=d / "out", batch_size=4) | kw).path


def files(folder):
    return {f: (Path(folder) / f).read_bytes() for f in ("predictions.parquet", "metrics.json")}


def read(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    return answer_only.PREDICTIONS.read(folder), metrics


@pytest.fixture(scope="module")
def plain(made):
    return run(made, out=made / "plain")


@pytest.fixture(scope="module")
def cot(made):
    return run(made, out=made / "cot", mode="cot", temperature=1.0)


def rate_by_brute_force(model, tokenizer, text):
    "Probability of each digit after a text, one whole pass for each."
    found = []
    for k in find_digit_tokens(tokenizer, EMPTY_REASONING):
        ids = torch.tensor([[*tokenizer.encode(text), k]])
        with torch.inference_mode():
            found.append(model(ids).logits[0, -2].double().softmax(0)[k].item())
    return np.array(found)


def open_test_chats(made, tokenizer):
    "row_id → chat, and the table of test prompts by row_id."
    system, tables = open_prompts(made / "prompts")
    rows = tables["test"].set_index("row_id")
    return {r: render_chat(tokenizer, system, x) for r, x in rows.prompt.items()}, rows


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen"])
def test_probabilities_are_those_of_brute_force(made, name):
    t, m = read(run(made, model_checkpoint=name, out=made / name))
    model, tokenizer = models.load_model(name)
    chats, rows = open_test_chats(made, tokenizer)
    assert t.columns.tolist() == ["row_id", "label", *P, "invalid", "greedy_valid", *READINGS]
    assert t.row_id.tolist() == sorted(rows.index)
    assert (t.label.to_numpy() == rows.label[t.row_id].to_numpy()).all()
    for r in t.itertuples():
        p = rate_by_brute_force(model, tokenizer, chats[r.row_id] + EMPTY_REASONING)
        assert np.allclose([r.p1, r.p2, r.p3, r.p4, r.p5], p / p.sum(), atol=1e-6)
        assert np.isclose(r.invalid, 1 - p.sum(), atol=1e-6)
        assert r.argmax == 1 + p.argmax() and not r.greedy_valid
        assert np.isclose(r.expected, p @ np.arange(1, 6) / p.sum(), atol=1e-5)
    assert m["invalid"]["value"] > 0.9 and m["greedy_valid"]["value"] == 0
    assert m["argmax"]["unanswered"] == 0  # nothing became a 5
    assert m["argmax"]["MAE"]["value"] == pytest.approx(abs(t.argmax - t.label).mean())
    rmse = ((t.expected - t.label) ** 2).mean() ** 0.5
    assert m["expected"]["RMSE"]["value"] == pytest.approx(rmse)


def test_a_model_that_knows_the_form(made, plain):
    t, m = read(plain)
    model, tokenizer = models.load_trained_model(f"{made}/model")
    chats, _ = open_test_chats(made, tokenizer)
    assert t.greedy_valid.any() and m["greedy_valid"]["value"] == t.greedy_valid.mean()
    for r in t[t.greedy_valid].itertuples():
        ids = torch.tensor([tokenizer.encode(chats[r.row_id] + EMPTY_REASONING)])
        with torch.inference_mode():
            assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == str(int(r.argmax))


def test_padding_and_common_beginning_change_nothing(made, plain, monkeypatch):
    one = read(run(made, out=made / "one", batch_size=1))[0]
    monkeypatch.setattr(answer_only, "cache_common_beginning", lambda *a: (0, None))
    whole = read(run(made, out=made / "whole"))[0]
    columns = [*P, "invalid"]
    for other in (one, whole):
        assert np.abs(other[columns] - read(plain)[0][columns]).to_numpy().max() < 1e-6


def test_two_processes_write_the_same_bytes(made, plain, copies):
    given = dict(
        prompts=made / "prompts",
        model_checkpoint=made / "model",
        out=made / "two",
        max_new_tokens=50,
        batch_size=4,
        latency_rows=2,
    )
    copies.run("recnb.rating.answer_only", given, processes=2)
    assert files(made / "two") == files(plain)


def test_reasoning_first(made, cot):
    t, m = read(cot)
    model, tokenizer = models.load_trained_model(f"{made}/model")
    chats, _ = open_test_chats(made, tokenizer)
    answered = t.predicted.notna()
    assert t.columns.tolist()[-3:] == ["predicted", "text", "tokens"]
    assert answered.any() and (t.p1.notna() == answered).all()
    for r in t[answered].itertuples():
        before = r.text[: r.text.rindex("<answer>") + 8]
        p = rate_by_brute_force(model, tokenizer, chats[r.row_id] + before)
        assert np.allclose([r.p1, r.p2, r.p3, r.p4, r.p5], p / p.sum(), atol=1e-5)
    policy = open_prompts(made / "prompts")[1]["validation"].label.mean()
    assert m["policy"]["value"] == policy
    mae = abs(t.predicted.fillna(policy) - t.label).mean()
    assert m["predicted"]["MAE"]["value"] == pytest.approx(mae)


def test_rows_without_an_answer(made):
    t, m = read(run(made, out=made / "cut", mode="cot", max_new_tokens=3))
    policy = open_prompts(made / "prompts")[1]["validation"].label.mean()
    assert t[[*P, *READINGS, "predicted", "invalid"]].isna().all(axis=None)
    assert m["predicted"]["unanswered"] == len(t) and m["invalid"]["n"] == 0
    assert m["median"]["MAE"]["value"] == pytest.approx(abs(policy - t.label).mean())
    sensitivity = m["median"]["sensitivity"]
    assert sensitivity["as_5"]["MAE"]["value"] == pytest.approx((5 - t.label).mean())
    assert sensitivity["answered"]["MAE"]["n"] == 0


def test_same_rows_for_every_model(made):
    def draw(model, seed):
        out = f"{made}/{model[-5:]}{seed}"
        few = run(made, out=out, model_checkpoint=model, test_rows=5, seed=seed)
        return read(few)[0].row_id.tolist()

    rows = draw("tiny-llama", 1)
    assert len(rows) == 5 and rows == draw(f"{made}/model", 1) != draw("tiny-llama", 2)


def test_what_earlier_stages_made(made, plain):
    grpo(Adapted(f"{made}/model", f"{made}/grpo"))
    alignment(Adapted(f"{made}/model", f"{made}/aligned", f"{made}/grpo", 0.1))
    both = dict(grpo=made / "grpo", alignment=made / "aligned")
    first = read(run(made, out=made / "first", grpo=made / "grpo"))[0][P].to_numpy()
    second = read(run(made, out=made / "both", **both))[0][P].to_numpy()
    assert abs(first - read(plain)[0][P]).max(axis=None) > 1e-4
    assert abs(first - second).max() > 1e-4
    with pytest.raises(BadInput, match="on which .* was trained"):
        run(made, out=made / "wrong", alignment=made / "aligned")


def test_times_are_no_part_of_the_result(made, plain):
    timed = run(made, out=made / "timed", latency_rows=3)
    found = json.loads((timed / "latency.json").read_text())
    assert files(timed) == files(plain)
    assert load_artifact(timed).digest == load_artifact(plain).digest
    arms = [(a["mode"], a["batch"]) for a in found["arms"]]
    assert arms == [("answer", 1), ("cot", 1), ("answer", 4), ("cot", 4)] and found["rows"] == 3
    assert all(0 < a["seconds"] <= a["seconds_median"] for a in found["arms"])
    assert found["arms"][0]["tokens_written"] == 1 < found["arms"][1]["tokens_written"]
