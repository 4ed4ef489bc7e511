"The learnt ranker: whole rankings, the same each time, nothing of the future, bad input."

import json
import signal
import subprocess
import sys

import lightgbm as lgb
import numpy as np
import pandas as pd
import pytest

from recnb.poi import checkins, ranker, trajectories
from recnb.poi.city import build_predictions, load_city
from recnb.poi.counters import predict_counters
from recnb.poi.ranker import (
    FEATURE_GROUPS,
    ask_inside,
    build_pair_features,
    build_training_pairs,
    freeze_history,
    plan_folds,
    run,
)

SMALL = dict(num_cuts=3, num_models=2, num_trees=40, near_candidates=10)


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    d = tmp_path_factory.mktemp("city")
    made = dict(dataset="made", num_users=20, num_pois=40, num_days=45, seed=5)
    c = checkins.run(made, out=f"{d}/checkins")
    trajectories.run(checkins=c, out=f"{d}/trajectories")
    return d, load_city(f"{d}/trajectories")


@pytest.fixture(scope="module")
def done(city):
    return run(SMALL, trajectories=f"{city[0]}/trajectories", out=f"{city[0]}/ranker")


def of(city, split):
    return city.instances[city.instances.split == split]


def test_every_ranking_is_whole(city, done):
    n = len(city[1].catalogue)
    metrics = json.loads((done / "metrics.json").read_text())
    for name, split in dict(predictions="test", validation="validation").items():
        p = pd.read_parquet(done / f"{name}.parquet")
        asked = of(city[1], split)
        assert list(p.columns) == ["instance_id", "target_poi", "rank", "top", "logprob", "text"]
        assert (
            p.instance_id.tolist() == asked.instance_id.tolist() and p["rank"].between(1, n).all()
        )
        assert all(len(set(t)) == min(20, n) for t in p.top)
        assert [r if r <= 20 else None for r in p["rank"]] == [
            list(t).index(x) + 1 if x in t else None for t, x in zip(p.top, p.target_poi)
        ]
        assert metrics[split]["Acc@1"]["value"] == pytest.approx((p["rank"] == 1).mean())
    assert (
        done.facts["n"] == len(of(city[1], "test"))
        and done.facts["parameters"] > done.facts["trees"] > 0
    )


def test_the_number_of_trees_is_that_of_validation(city, done):
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert done.facts["trees"] == max(lines, key=lambda line: line["score"])["round"]
    near = of(city[1], "validation")
    cut = freeze_history(city[1]).cut
    far = freeze_history(city[1], cut=2 * cut - int(near.seconds.max()) - 1)  # validation's length
    keys, x = build_pair_features(city[1], far, near, near=10)
    models = [lgb.Booster(model_file=str(done / f"model_{k}.txt")) for k in (1, 2)]
    scores = (models[0].predict(x) + models[1].predict(x)) / 2
    blocks = ranker.complete_scores(keys, scores, far, len(near))
    ranks = build_predictions(near, city[1].catalogue, blocks)["rank"]
    best = next(line for line in lines if line["round"] == done.facts["trees"])
    found = np.isin(np.arange(len(near)) * len(city[1].catalogue) + near.target.to_numpy(), keys)
    assert best["Acc@1"] == pytest.approx(((ranks == 1) & found).mean())  # over all instances


def test_it_learns_what_counters_cannot(city, done):
    c = city[1]
    found = predict_counters(c.rows, c.instances, "validation")
    counted = max((p["rank"] == 1).mean() for p in found.values())
    assert done.facts["validation Acc@1"] >= counted - 0.1
    gain = pd.DataFrame(json.loads((done / "importance.json").read_text()))
    assert set(gain.group) == set(FEATURE_GROUPS) and gain.gain.sum() == pytest.approx(1, abs=1e-3)


def test_a_killed_run_ends_like_any_other(city, done, tmp_path):
    "Killed while the trees grow; the second run gives the same bytes."
    d = city[0]
    out = tmp_path / "again"
    args = [
        sys.executable,
        "-m",
        "recnb.poi.ranker",
        "--trajectories",
        f"{d}/trajectories",
        "--out",
        str(out),
        *[x for k, v in SMALL.items() for x in (f"--{k}", str(v))],
    ]
    p = subprocess.Popen(args, stderr=subprocess.PIPE, text=True)
    for line in p.stderr:
        if "ranker: round" in line:
            break
    p.send_signal(signal.SIGKILL)
    p.wait()
    p.stderr.close()
    assert not out.exists()
    again = run(SMALL, trajectories=f"{d}/trajectories", out=str(out))
    for f in (
        "model_1.txt",
        "model_2.txt",
        "predictions.parquet",
        "validation.parquet",
        "metrics.jsonl",
        "importance.json",
    ):
        assert (again / f).read_bytes() == (done / f).read_bytes(), f


def test_nothing_of_the_future_is_seen(city):
    "Check-ins are changed and planted at and after a cut, the answer beside the prefix."
    c = city[1]
    for cut, asked in [*plan_folds(c, 3), (freeze_history(c).cut, of(c, "test"))]:
        keep = np.zeros(len(c.rows), bool)
        keep[np.concatenate([*asked.prefix])] = True
        hit = ~keep & (c.rows.seconds >= cut).to_numpy()
        rows = c.rows.copy()
        rows.loc[hit, ["poi", "cat", "latitude", "user"]] = 0, 0, 1.0, rows.user[~hit].iloc[0]
        planted = c.rows.iloc[asked.target_row].assign(split="train")
        planted = pd.concat([planted] * 20)  # a builder that looked at them could not miss them
        other = c._replace(rows=pd.concat([rows, planted], ignore_index=True))
        other.rows.loc[asked.target_row, "poi"] = 0
        a, b = (
            build_pair_features(x, freeze_history(x, cut=cut), asked, near=10) for x in (c, other)
        )
        assert hit.any() and (a[0] == b[0]).all()
        pd.testing.assert_frame_equal(a[1], b[1])
        leaky = build_pair_features(other, freeze_history(other, cut=cut + 10**9), asked, near=10)
        assert len(leaky[0]) != len(a[0]) or not leaky[1].equals(a[1])  # the check can fail


def test_a_train_instance_does_not_count_itself(city):
    "Without its target row the features of an instance stay as they are."
    c = city[1]
    folds = plan_folds(c, 3)
    for cut, asked in [*folds, *((cut, ask_inside(c, asked)) for cut, asked in folds)]:
        rows = c.rows.copy()
        rows.loc[asked.target_row, "split"] = "gone"
        a, b = (
            build_pair_features(x, freeze_history(x, cut=cut), asked, near=10)[1]
            for x in (c, c._replace(rows=rows))
        )
        pd.testing.assert_frame_equal(a, b)
        keys, _ = build_pair_features(c, freeze_history(c, cut=cut), asked, near=10)
        prefix_rows = c.rows.seconds.to_numpy()[np.concatenate([*asked.prefix])]
        assert (prefix_rows >= cut).all() and (asked.seconds >= cut).all()


def test_the_target_time_is_read_only_where_it_may_be(city):
    c = city[1]
    asked = of(city[1], "test")
    rows = c.rows.copy()
    rows.loc[asked.target_row, ["seconds", "clock", "weekday"]] = (
        c.rows.seconds.max() + 5 * 86400,
        3.5,
        2,
    )
    other = c._replace(rows=rows)
    h = freeze_history(c)
    for use in (True, False):
        a, b = (build_pair_features(x, h, asked, use, near=10)[1] for x in (c, other))
        assert a.equals(b) == (not use)


def test_variants(city, done, tmp_path):
    "Validation check-ins bring the test nearer, and left-out groups are gone."
    options = SMALL | dict(history_until="validation")
    more = run(options, trajectories=f"{city[0]}/trajectories", out=str(tmp_path / "more"))
    a, b = (pd.read_parquet(x / "predictions.parquet") for x in (more, done))
    assert any(list(s) != list(t) for s, t in zip(a.top, b.top))
    folds = plan_folds(city[1], 3)
    x, y, sizes, weights = build_training_pairs(
        city[1], folds, excluded=("others", "habit"), near=10
    )
    assert (
        not {"also", "visits", "best_visits"} & set(x)
        and {"there", "km"} <= set(x)
        and y.sum() == len(sizes) == len(weights)
    )


def test_bad_input_is_one_line(city, tmp_path, copies):
    given = dict(trajectories=f"{city[0]}/trajectories", out=str(tmp_path / "r"))
    for wrong, says in (
        (dict(trajectories=f"{city[0]}/checkins"), "poi.trajectories"),
        (dict(excluded_features=["moods"]), "moods"),
    ):
        assert says in copies.refuse("recnb.poi.ranker", given | wrong)
    for wrong in (
        dict(num_cuts=0),
        dict(num_models=0),
        dict(inner_weight=-1),
        dict(near_candidates=0),
        dict(num_trees=0),
    ):
        with pytest.raises(ValueError):
            run(wrong, trajectories=f"{city[0]}/trajectories", out=str(tmp_path / "r"))
    assert not (tmp_path / "r").exists()


def test_nyc(new_york):
    "On NYC: what a single feature finds, and how many targets are candidates."
    c = load_city(new_york / "trajectories")
    asked = of(c, "validation")
    keys, x = build_pair_features(c, freeze_history(c), asked)
    who, poi = np.divmod(keys, len(c.catalogue))
    *_, recall = ranker.keep_answerable(keys, x, asked, len(c.catalogue))
    assert recall == pytest.approx(0.8126, abs=1e-3)
    order = np.lexsort((-x.visits, -x.hour_15.round(5), who))
    first = order[np.r_[True, np.diff(who[order]) > 0]]
    assert (poi[first] == asked.target.to_numpy()).sum() == pytest.approx(
        426, abs=2
    )  # the counter `user_kernel`, but for its rule among equals
