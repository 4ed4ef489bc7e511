"Sketches: what they may see, the real token counts, names by a model, restarts."

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from recnb.artifacts import load_artifact, read_jsonl
from recnb.rating import reviews, sketch
from recnb.rating.sketch import (
    Params,
    count_ratings_by_topic,
    find_polarity,
    name_by_model,
    run,
)
from recnb.stages import BadInput


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp("s")
    R = reviews.run(num_users=25, num_items=40, seed=4, out=str(d / "reviews"))
    return R, reviews.INTERACTIONS.read(R), reviews.ROWS.read(R), d


def test_ties_in_time_are_counted_from_the_lists(tmp_path):
    a = reviews.run(dataset="ml-100k", out=str(tmp_path / "ml"))
    df = reviews.INTERACTIONS.read(a)
    rows = reviews.ROWS.read(a)
    few = rows[rows.user_id.isin(rows.user_id.unique()[:6])]
    topic = (df.row_id % 5).to_numpy()
    likes, others, total = count_ratings_by_topic(df, few, topic, 5)
    for i, h in enumerate(few.history):
        y = df.rating.to_numpy()[h]
        t = topic[h]
        assert (
            likes[i].tolist() == [int(((t == k) & (y >= 4)).sum()) for k in range(5)]
            and others[i].sum() + likes[i].sum() == len(h)
            and np.allclose(total[i], np.bincount(t, y, 5))
        )


def test_the_stage_does_not_depend_on_the_order_of_items_and_runs_alike(made):
    R, df, rows, d = made
    a, b = (run(reviews=R, n_clusters=5, top_k=8, out=str(d / n)) for n in "ab")
    assert a.digest == b.digest and a.facts["centroids"] == b.facts["centroids"]


def test_faults(made):
    R, *_, d = made
    for kw, said in (
        (dict(n_clusters=900), "as many clusters as items|clusters as items"),
        (dict(provider="server", api_key_variable="NO_SUCH_KEY"), "NO_SUCH_KEY"),
        (dict(provider="replay"), "--replay"),
        (dict(provider="replay", replay=str(d / "gone.jsonl")), "recorded answers"),
        (dict(encoder=str(d / "gone")), "no sentence encoder"),
    ):
        with pytest.raises(BadInput, match=said):
            run({"n_clusters": 4, **kw}, reviews=R, out=str(d / "bad"))


def test_names_by_a_model_come_from_recorded_answers(made):
    "A provider that answers badly once, well then, or never: its names, made unlike, or the terms."
    from recnb import llm

    *_, d = made
    folder = d / "names"
    folder.mkdir()
    answers = {
        0: ['{"name": "' + "many " * 11 + '"}', '{"name": "Dark comedies"}'],
        1: ['{"name": "Dark comedies"}'],
        2: ["no", "no", "no"],
    }

    def provider(request):
        i = next(k for k in answers if f"item {k}" in request["messages"][0]["content"])
        return dict(
            text=answers[i].pop(0) if len(answers[i]) > 1 else answers[i][0],
            prompt_tokens=1,
            completion_tokens=1,
            finish_reason="stop",
        )

    p = Params(
        reviews="x",
        out="y",
        provider="replay",
        replay=str(folder / "names.jsonl"),
        model_checkpoint="m",
    )
    requests = {i: sketch.build_naming_request([f"item {i}"], p) for i in range(3)}
    ask = llm.Recorder(folder / "names.jsonl", provider)
    llm.collect_answers(ask, requests, sketch.make_name_schema())
    names, more = name_by_model(p, [[f"item {i}"] for i in range(3)], ["t0", "t1", "t2"], folder)
    assert names == ["Dark comedies", "Dark comedies (2)", "t2"] and more == dict(unnamed=1)


def test_topic_names_by_a_real_model(made, capsys):
    "Names of a small instruct model where it gives one; terms where it does not, said aloud."
    R, *_, d = made
    asked = dict(provider="local", model_checkpoint="smollm2-135m", dtype="float32")
    small = dict(n_clusters=2, top_k=3, answer_attempts=2, max_new_tokens=30)
    try:
        a = run({**asked, **small}, reviews=R, out=str(d / "named"))
    except BadInput as e:
        pytest.skip(str(e))
    err = capsys.readouterr().err
    names = json.loads((a / "topic_names.json").read_text())
    failures = json.loads((a / "usage.json").read_text())["failures"]
    said = [r["text"] for r in read_jsonl(a / "names.jsonl") if r["event"] == "answer"]
    plain = run(reviews=R, n_clusters=2, top_k=3, out=str(d / "terms"))
    terms = json.loads((plain / "topic_names.json").read_text())
    assert len(names) == 2 <= len(said) and a.facts["unnamed"] == len(failures)
    for i, name in enumerate(names):
        assert name == terms[i] if str(i) in failures else any(name[:9] in text for text in said)
    assert ("keep their terms" in err) == bool(failures)
    texts = " ".join(sketch.SKETCHES.read(a)["count"])
    assert all(name in texts for name in names)


def test_a_topic_without_a_name_is_said_aloud(made, capsys, monkeypatch):
    *_, d = made
    monkeypatch.setattr("recnb.llm.Server.__call__", lambda self, request: dict(text="Horror!"))
    p = Params(reviews="x", out="y", provider="server", base_url="http://demo.invalid/v1")
    names, more = name_by_model(p, [["item 0"]], ["old dark house"], d)
    assert names == ["old dark house"] and more == dict(unnamed=1)
    err = capsys.readouterr().err
    assert "1 of 1 topics got no name" in err and "'old dark house'" in err and "Horror!" in err


@pytest.fixture
def encoder(tmp_path):
    "A copy of MiniLM, and a function that writes how its states are pooled."
    try:
        where = Path(sketch.find_encoder("minilm"))
    except BadInput as e:
        pytest.skip(str(e))
    copy = tmp_path / "bge-small"  # the name says nothing
    copy.mkdir()
    for file in where.iterdir():
        if file.is_file():
            (copy / file.name).symlink_to(file)

    def pool(config, modules=("Transformer", "Pooling", "Normalize")):
        shutil.rmtree(copy / "pool", ignore_errors=True)
        (copy / "modules.json").unlink(missing_ok=True)
        if config is not None:
            (copy / "pool").mkdir()
            (copy / "pool/config.json").write_text(json.dumps(config))
        kinds = [dict(type=f"sentence_transformers.models.{m}", path="pool") for m in modules]
        (copy / "modules.json").write_text(json.dumps(kinds))
        return str(copy)

    return pool


def test_states_are_pooled_as_the_encoder_says(encoder, tmp_path, capsys):
    "On real weights: the first token's state, the mean, the largest or the last, by its own files."
    import torch
    import transformers

    texts = ["a sad drama", "horror at night in a house"]

    def embed(config, n=iter(range(99)), **kw):
        where = encoder(config, **kw)
        return sketch.embed_texts(texts, where, tmp_path / f"parts{next(n)}")

    where = encoder(None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    model = transformers.AutoModel.from_pretrained(where).eval()
    with torch.inference_mode():
        each = [model(**tokenizer(t, return_tensors="pt")).last_hidden_state[0] for t in texts]
    right = {
        "cls": [x[0] for x in each],
        "mean": [x.mean(0) for x in each],
        "max": [x.amax(0) for x in each],
        "lasttoken": [x[-1] for x in each],
    }
    for pooling, key in sketch.POOLINGS.items():
        expected = torch.nn.functional.normalize(torch.stack(right[pooling]), dim=-1).numpy()
        for config in ({"pooling_mode": pooling}, {key: True, "include_prompt": True}):
            assert np.allclose(embed(config), expected, atol=1e-5), (pooling, config)
    assert "mean is taken" not in capsys.readouterr().err
    mean = embed({"pooling_mode": "mean"})
    assert np.array_equal(embed(None), mean) and "mean is taken" in capsys.readouterr().err
    assert np.array_equal(mean, sketch.embed_texts(texts, "minilm", tmp_path / "minilm"))
    for config in ({"pooling_mode": "weightedmean"}, dict.fromkeys(sketch.POOLINGS.values(), True)):
        with pytest.raises(BadInput, match="one pooling of cls, mean"):
            embed(config)
    with pytest.raises(BadInput, match="Dense"):
        embed({"pooling_mode": "cls"}, modules=("Transformer", "Pooling", "Dense"))


def test_a_text_longer_than_the_encoder_is_cut(encoder, tmp_path):
    long = ["word " * 3000, "short"]
    found = sketch.embed_texts(long, encoder({"pooling_mode": "cls"}), tmp_path / "p", 2, 5000)
    assert np.allclose((found**2).sum(1), 1, atol=1e-5)


def test_movies(movies, tmp_path):
    R = load_artifact(movies / "reviews")
    a = run(reviews=R, as_shipped=True, out=str(tmp_path / "s"))
    df = reviews.INTERACTIONS.read(R)
    rows = reviews.ROWS.read(R)
    s = sketch.SKETCHES.read(a)
    assert (
        len(s) == 22_097 + 2 * 2_629 and (s["mean"] != "").all()
    )  # with three earlier ratings there is always a topic
    saved = {x["history"]: x for x in json.loads((a / "tokens.json").read_text())["test"]}
    assert (
        abs(saved["all"]["full"] - 976) < 25 and abs(saved["all"]["recent"] - 516) < 30
    )  # 516 where an empty last line counts as one of the ten
    assert saved["at most 10"]["share_saving"] == 0 and saved["more than 30"]["share_saving"] == 1
    # the sign of the row's own topic agrees with its label more often once it has seen the label
    topic = df.item_id.map(sketch.TOPICS.read(a).set_index("item_id").topic).to_numpy()
    train = rows[rows.split == "train"]
    label = np.where(train.label >= 4, 1, -1)
    own = topic[train.row_id]
    past = find_polarity(*count_ratings_by_topic(df, train, topic, 20))[np.arange(len(train)), own]
    whole = df[df.split.isin(["history", "train"])].groupby("user_id").row_id.apply(list)
    full = find_polarity(
        *count_ratings_by_topic(
            df,
            pd.DataFrame(
                dict(
                    row_id=0, user_id=train.user_id, history=whole.reindex(train.user_id).to_numpy()
                )
            ),
            topic,
            20,
        )
    )[np.arange(len(train)), own]

    def agree(x):
        return (x == label)[x != 0].mean()

    assert agree(full) > agree(past) + 0.05
