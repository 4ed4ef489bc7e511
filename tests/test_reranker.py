"A model that chooses from a ranker's list: what it is told, and from whom it learns."

import json

import numpy as np
import pandas as pd
import pytest

from recnb.artifacts import read_jsonl
from recnb.poi import reranker
from recnb.poi.evaluate import PREDICTIONS
from recnb.stages import BadInput


@pytest.fixture(scope="module")
def made(smoke):
    return smoke("poi")


def give(made, **more):
    folders = dict(
        trajectories=f"{made}/cities/alpha/trajectories",
        ranker=f"{made}/baselines/ranker/ranker",
        out="out",
    )
    return reranker.Params(**{**reranker.SMOKE, **folders, **more})


def test_a_row_of_the_study(made):
    "Learnt from validation alone, beside the ranker it goes on from."
    folder = made / "baselines/reranker/reranker"
    facts = json.loads((folder / "manifest.json").read_text())["facts"]
    test = PREDICTIONS.read(folder)
    base = PREDICTIONS.read(made / "baselines/ranker/ranker")
    assert facts["n"] == len(test) == len(base) and facts["prompts"] > 0
    assert [sorted(x) for x in test.top] == [sorted(x) for x in base.top]
    lines = [json.loads(x) for x in (made / "results.jsonl").read_text().splitlines()]
    rows = [x for x in lines if x["method"] == "LightGBM ranker, reranked"]
    assert {x["model"] for x in rows} == {"tiny-llama"}


def test_who_teaches_does_not_choose(made):
    "No user of validation is on both sides, and the ranking of validation is of those who choose."
    p = give(made)
    told = reranker.read_shortlists(p)["validation"]
    teaching = reranker.draw_teachers(told.users, p.learning_share, p.seed)
    assert not set(told.users[teaching]) & set(told.users[~teaching])
    kept = pd.read_parquet(made / "baselines/reranker/reranker/validation.parquet")
    assert kept.instance_id.tolist() == told.ranked.instance_id[~teaching].tolist()


def test_letters_alone_and_one_pass_as_many(made, tmp_path):
    "The same log-probabilities whatever stands beside a prompt; those of a plain pass."
    import torch

    p = give(made)
    told = reranker.read_shortlists(p)["test"]
    loaded = reranker.load_trained_model(p.model_checkpoint, dtype="float32")
    prompts, sizes = told.prompts[:6], [4, 4, 3, 4, 2, 4]
    together = reranker.read_letters(loaded, tmp_path / "a", prompts, sizes, 4)
    alone = reranker.read_letters(loaded, tmp_path / "b", prompts, sizes, 1)
    model, tokenizer = loaded
    for prompt, size, x, y in zip(prompts, sizes, together, alone):
        (ids,) = reranker.encode_texts(tokenizer, [prompt])
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
        letters = reranker.find_answer_tokens(tokenizer, prompt, "ABCD"[:size])
        plain = logits[letters].log_softmax(0).numpy()
        assert np.allclose(x, plain, atol=1e-4) and np.allclose(y, plain, atol=1e-4)


@pytest.mark.timeout(300)
def test_a_killed_stage_goes_on(made, tmp_path, monkeypatch):
    "Stopped while it reads: what was trained stands, and the result is that of a whole run."
    p = give(made, out=f"{tmp_path}/cut")
    read = reranker.read_letters
    monkeypatch.setattr(reranker, "read_letters", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reranker.run(p)
    monkeypatch.setattr(reranker, "read_letters", read)
    monkeypatch.setattr(reranker, "learn_to_choose", lambda *a: 1 / 0)
    again = reranker.run(p)
    whole = made / "baselines/reranker/reranker"
    for name in ("predictions.parquet", "weights.jsonl", "metrics.jsonl"):
        a, b = (
            (PREDICTIONS.read(x) if name.endswith("parquet") else read_jsonl(x / name))
            for x in (again.path, whole)
        )
        if name == "metrics.jsonl":
            assert [x["loss"] for x in a] == [x["loss"] for x in b]
        else:
            assert str(a) == str(b)


def test_what_cannot_be_is_refused(made, tmp_path):
    wrong = {
        "weights of 0 or more": dict(weights=[-1.0]),
        "users to learn from and users to choose": dict(learning_share=1.0),
    }
    for said, changed in wrong.items():
        with pytest.raises(BadInput, match=said):
            reranker.run(give(made, out=f"{tmp_path}/x", **changed))
    other = give(made, trajectories=f"{made}/cities/beta/trajectories")
    with pytest.raises(BadInput):
        reranker.read_shortlists(other)
