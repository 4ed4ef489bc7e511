"Sketches: what they may see, the real token counts, names by a model, restarts."

import json

import numpy as np
import pandas as pd
import pytest

from recnb.rating import reviews, sketch
from recnb.rating.sketch import (
    Params,
    build_sketches,
    count_ratings_by_topic,
    find_label_leaks,
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


def test_no_sketch_has_seen_its_label_and_the_shipped_kind_has(made):
    _, df, rows, _ = made
    topic = pd.factorize(df.categories)[0]
    names = sorted(set(df.categories))
    some = pd.concat(
        [
            rows[rows.split == "train"].sample(25, random_state=2),
            rows[rows.split == "test"].head(10),
        ]
    )

    def of(rule):
        return lambda x: build_sketches(x, some, topic, names).set_index("row_id")[rule]

    assert find_label_leaks(of("count"), df, some) == find_label_leaks(of("mean"), df, some) == []

    def shipped(x):
        return sketch.build_shipped_sketches(x, some, topic, names).set_axis(some.row_id)

    assert len(find_label_leaks(shipped, df, some[some.split == "train"])) > 8
    planted = some.assign(history=[np.append(h, i) for h, i in zip(some.history, some.row_id)])
    assert (
        len(
            find_label_leaks(
                lambda x: build_sketches(x, planted, topic, names).set_index("row_id")["mean"],
                df,
                some,
            )
        )
        > 8
    )


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


def test_movies(data, tmp_path):
    R = reviews.run(dataset="movies", data=str(data / "movies"), out=str(tmp_path / "r"))
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
