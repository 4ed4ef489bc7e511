"From check-ins to instances: the published order, the ledger, and planted leaks."

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from recnb.poi import checkins
from recnb.poi import trajectories as t
from recnb.stages import BadInput

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("RECNB_DATA") or ROOT / "../shared/data")
real = pytest.mark.skipif(
    not (DATA / "nyc/NYC_test.csv.gz").exists()
    or not (DATA / "genup/results_predictions.parquet").exists(),
    reason=f"the NYC files or the published predictions are not in {DATA}; set RECNB_DATA",
)


def run(folder, **source):
    "The stage on a source: its artifact, instances and rows."
    c = checkins.run(source, out=f"{folder}/checkins")
    a = t.run(checkins=c, out=f"{folder}/trajectories")
    rows, instances = t.load_trajectories(a.path)
    return a, instances, rows


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    d = tmp_path_factory.mktemp("city")
    size = dict(num_users=40, num_pois=300, num_days=60, min_poi_freq=1, min_user_freq=1)
    return run(d, dataset="made", **size)


def test_instances_of_a_made_city(city):
    a, made, rows = city
    assert (
        list(made.columns)
        == "instance_id split user_id trajectory_id prefix prefix_length "
        "target_poi target_row target_time".split()
    )
    assert (made.prefix.map(len) == made.prefix_length).all() and made.instance_id.tolist() == list(
        range(len(made))
    )
    train = rows[rows.split == "train"]
    assert rows.poi_id.isin(train.poi_id).all() and rows.user_id.isin(train.user_id).all()
    assert (
        rows.groupby(["split", "user_id", "trajectory"]).local_time.diff().dropna()
        >= pd.Timedelta(0)
    ).all()


def test_ledger_accounts_for_every_row(city):
    a, made, rows = city
    dropped = pd.read_parquet(a / "dropped.parquet")
    assert dropped.drop_duplicates(["file", "row"]).shape[0] == a.facts["left_out"] > 0
    assert dropped.reason.value_counts()["POI not in train"] == a.facts["POI_not_in_train"] > 0
    assert len(rows) + a.facts["left_out"] == len(
        pd.read_parquet(a.path.parent / "checkins" / "checkins.parquet")
    )


def plant(made, rows, k, how):
    "Instances with one leak, at instance k."
    made, at = made.copy(), made.index[k]
    row = made.target_row[at]
    own = list(made.prefix[at])
    later = list(
        np.flatnonzero(
            (rows.user_id == made.user_id[at])
            & (rows.split == made.split[at])
            & (rows.local_time > made.target_time[at])
        )
    )
    leak = dict(
        target=own + [row],
        future=own + later[:1] if later else own + [row],
        other_user=own + [int(np.flatnonzero(rows.user_id != made.user_id[at])[0])],
        other_split=own
        + [
            int(
                np.flatnonzero((rows.split != made.split[at]) & (rows.user_id == made.user_id[at]))[
                    0
                ]
            )
        ],
    )[how]
    made.at[at, "prefix"] = np.array(leak)
    return made


@pytest.mark.parametrize("how", ["target", "future", "other_user", "other_split"])
def test_planted_leaks_are_caught(city, how):
    _, made, rows = city
    t.check_no_future(made, rows)
    for k in range(0, len(made), max(1, len(made) // 15)):
        with pytest.raises(BadInput, match="prefix"):
            t.check_no_future(plant(made, rows, k, how), rows)


@pytest.mark.parametrize(
    "column, value",
    [("target_poi", -1), ("target_time", pd.Timestamp("2030-01-01")), ("user_id", 999_999)],
)
def test_wrong_targets_are_caught(city, column, value):
    _, made, rows = city
    with pytest.raises(BadInput):
        t.check_no_future(made.assign(**{column: value}), rows)


def test_a_removed_last_checkin_makes_the_one_before_it_the_target():
    rows = pd.DataFrame(
        dict(
            user_id=0,
            poi_id=[1, 2, 1, 2, -1],
            split=["train"] * 2 + ["test"] * 3,
            trajectory=["a", "a", "b", "b", "b"],
            source_file="f",
            source_row=range(5),
            local_time=pd.Timestamp("2024-01-01") + pd.to_timedelta(range(5), unit="h"),
        )
    )
    kept, made, dropped, counts = t.cut_trajectories(rows)
    assert (
        made.target_poi.tolist() == [2, 2]
        and kept.source_row[made.target_row].tolist() == [1, 3]
        and dropped.source_row.tolist() == [4]
    )


def test_a_changed_checkins_file_is_refused(tmp_path):
    size = dict(num_users=10, num_pois=40, num_days=40)
    a = checkins.run(dataset="made", out=f"{tmp_path}/c", **size)
    with open(a / "checkins.parquet", "r+b") as f:
        f.seek(100)
        f.write(b"xx")
    with pytest.raises(BadInput, match="checkins.parquet"):
        t.run(checkins=a, out=f"{tmp_path}/t")
    with pytest.raises(BadInput):
        t.run(checkins=f"{tmp_path}/none", out=f"{tmp_path}/t")


@pytest.fixture(scope="module")
def nyc(tmp_path_factory):
    return run(tmp_path_factory.mktemp("nyc"), dataset="nyc", data=str(DATA / "nyc"))


@real
def test_nyc_targets_are_the_published_ones_in_order(nyc):
    _, made, _ = nyc
    test = made[made.split == "test"]
    published = pd.read_parquet(DATA / "genup/results_predictions.parquet")
    files = [
        g.sort_values("i")
        for name, g in published.groupby("file")
        if name.endswith("-FourSquare-NYC-POI")
    ]
    assert len(files) >= 9
    for g in files:
        assert g.target.tolist() == test.target_poi.astype(str).tolist()


@real
def test_nyc_counts(nyc):
    a, made, rows = nyc
    test = made[made.split == "test"]
    dropped = pd.read_parquet(a / "dropped.parquet")
    dropped = dropped[dropped.file == "NYC_test.csv.gz"]
    assert dropped.drop_duplicates("row").shape[
        0
    ] == 1300 and dropped.reason.value_counts().to_dict() == {
        "user not in train": 789,
        "POI not in train": 686,
    }
    assert (
        len(test) == 1429
        and round(test.prefix_length.mean(), 2) == 5.34
        and test.prefix_length.median() == 3
        and test.prefix_length.max() == 196
    )
    pois = rows.poi_id.to_numpy()
    assert sum(p in pois[x] for x, p in zip(test.prefix, test.target_poi)) == 531


@real
def test_nyc_train_has_11022_instances_or_11023_with_ties(nyc):
    "One trajectory of the reconstructed train file is three check-ins of one second."
    a, made, rows = nyc
    assert a.facts["train"] == 11022 and a.facts["train_without_instance"] == 1
    kept = t.list_instances(rows, keep_ties=True)
    assert (kept.split == "train").sum() == 11023
    test = [x[x.split == "test"] for x in (made, kept)]
    assert (
        test[0].target_row.tolist() == test[1].target_row.tolist()
        and test[0].prefix_length.tolist() == test[1].prefix_length.tolist()
    )
