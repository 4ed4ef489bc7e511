"The counters: the published numbers on NYC, nothing learnt from test, and how bad input ends."

import json

import numpy as np
import pandas as pd
import pytest

from recnb.poi import checkins, counters, trajectories
from recnb.poi.counters import METHODS, measure_ceilings, predict_counters, run
from recnb.stages import BadInput

COUNTERS = {method.name for method in METHODS}


def make_city(d, **source):
    "Folders of check-ins and trajectories under d, and the two tables."
    c = checkins.run(source, out=f"{d}/checkins")
    a = trajectories.run(checkins=c, out=f"{d}/trajectories")
    return pd.read_parquet(a / "rows.parquet"), pd.read_parquet(a / "instances.parquet")


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    d = tmp_path_factory.mktemp("city")
    return d, *make_city(d, dataset="made", num_users=12, num_pois=40, num_days=60)


def test_every_ranking_is_whole(city, tmp_path):
    d, rows, instances = city
    a = run(trajectories=f"{d}/trajectories", out=str(tmp_path / "c"))
    metrics = json.loads((a / "metrics.json").read_text())
    test = instances[instances.split == "test"]
    n = rows.poi_id[rows.split == "train"].nunique()
    assert set(metrics) == COUNTERS
    for name in COUNTERS:
        p = pd.read_parquet(a / f"{name}.parquet")
        assert list(p.columns) == ["instance_id", "target_poi", "rank", "top", "logprob", "text"]
        assert p.instance_id.tolist() == test.instance_id.tolist() and p["rank"].between(1, n).all()
        assert all(len(set(t)) == len(t) == min(20, n) for t in p.top)
        assert [r if r <= 20 else None for r in p["rank"]] == [
            list(t).index(x) + 1 if x in t else None for t, x in zip(p.top, p.target_poi)
        ]
        assert metrics[name]["Acc@1"]["value"] == pytest.approx((p["rank"] == 1).mean())


def test_nothing_is_learnt_from_test(city):
    _, rows, instances = city
    visible = np.concatenate(
        [rows.index[rows.split == "train"], *instances.prefix[instances.split == "test"]]
    )
    hidden = ~rows.index.isin(visible)
    other = rows.assign(poi_id=np.where(hidden, rows.poi_id.min(), rows.poi_id))
    blind = instances.assign(
        target_poi=np.where(instances.split == "test", rows.poi_id.min(), instances.target_poi)
    )
    a, b = predict_counters(rows, instances), predict_counters(other, blind)
    leaked = predict_counters(other.assign(split="train"), blind)
    assert hidden.any()
    for name in COUNTERS:
        assert a[name].top.tolist() == b[name].top.tolist()
    assert a["user_top"].top.tolist() != leaked["user_top"].top.tolist()


def test_the_order_of_the_rows_does_not_matter_to_train_counts(city):
    _, rows, instances = city
    order = np.random.default_rng(0).permutation(len(rows))
    place = np.argsort(order)
    other = instances.assign(
        prefix=[place[np.asarray(p)].tolist() for p in instances.prefix],
        target_row=place[instances.target_row],
    )
    times = rows.utc_time[rows.split == "train"]
    if times.duplicated().any():
        rows = rows.assign(utc_time=rows.utc_time + pd.to_timedelta(np.arange(len(rows)), "us"))
    shuffled = rows.iloc[order].reset_index(drop=True)
    a, b = predict_counters(rows, instances), predict_counters(shuffled, other)
    for name in ("user_top", "user_bin3", "user_kernel", "global_top", "markov1"):
        assert a[name]["rank"].equals(b[name]["rank"]), name


def test_bad_input_is_one_line(city, tmp_path, copies):
    given = dict(trajectories=f"{city[0]}/trajectories", out=str(tmp_path / "c"))
    for wrong, says in (
        (dict(trajectories=f"{city[0]}/checkins"), "poi.trajectories"),
        (dict(ties="best"), "first, last, id"),
        (dict(kernel_hours=0), "at least 0.01"),
    ):
        assert says in copies.refuse("recnb.poi.counters", given | wrong)
    assert not (tmp_path / "c").exists()


def test_nyc(new_york):
    "The hits on the 1,429 NYC instances under each rule for ties."
    rows, instances = trajectories.load_trajectories(new_york / "trajectories")

    def count_hits(*args, **more):
        found = predict_counters(rows, instances, *args, **more)
        return {name: int((p["rank"] == 1).sum()) for name, p in found.items()}

    hits = {ties: count_hits(ties=ties) for ties in ("first", "last", "id")}
    assert hits["first"] == dict(
        global_top=13,
        last_poi=125,
        markov1=210,
        prefix_mode=244,
        user_top=317,
        user_bin3=383,
        user_kernel=412,
    )
    assert (
        hits["last"]["prefix_mode"],
        hits["last"]["user_top"],
        hits["id"]["prefix_mode"],
        hits["id"]["user_bin3"],
    ) == (156, 326, 180, 376)
    chosen = {
        hours: count_hits("validation", kernel_hours=hours)["user_kernel"]
        for hours in (0.5, 1.5, 3)
    }
    assert chosen == {0.5: 401, 1.5: 426, 3: 414}  # the width is chosen on validation
    found = {k: round(v["value"], 4) for k, v in measure_ceilings(rows, instances).items()}
    assert found == dict(prefix=0.3716, history=0.7250, either=0.7586)


def test_train_after_the_first_target_is_not_counted(city, monkeypatch):
    "A source may cut its splits otherwise than in time; most of train too late is refused."
    _, rows, instances = city
    end = rows.utc_time[instances.target_row[instances.split == "test"]].min()
    train = rows.index[rows.split == "train"]
    late = rows.loc[train[:30]].assign(utc_time=end, poi_id=rows.poi_id[train[-1]])
    planted = pd.concat([rows, late], ignore_index=True)
    before, after = (predict_counters(x, instances) for x in (rows, planted))
    assert all(before[k].top.tolist() == after[k].top.tolist() for k in COUNTERS)
    with monkeypatch.context() as patch:
        patch.setattr(counters, "find_earlier", lambda times, targets: np.ones(len(times), bool))
        seen = predict_counters(planted, instances)
    assert any(before[k].top.tolist() != seen[k].top.tolist() for k in COUNTERS)
    moved = rows.assign(utc_time=rows.utc_time.where(rows.split != "train", end))
    with pytest.raises(BadInput, match="splits cut in time"):
        predict_counters(moved, instances)
