"Baselines: nothing seen too early, the anchors of the real test rows, equal bytes."

import pandas as pd
import pytest

from recnb.rating import reviews
from recnb.rating.baselines import Params, features, leaks, run
from recnb.stages import BadInput, make


def test_features_have_seen_nothing_late_and_a_planted_leak_is_caught(tmp_path):
    R = reviews.run(
        make(
            reviews.Params,
            dict(dataset="made", users=30, items=30, seed=9, out=str(tmp_path / "r")),
        )
    )
    df, rows = pd.read_parquet(R / "interactions.parquet"), pd.read_parquet(R / "rows.parquet")
    some = rows.sample(40, random_state=1)
    assert leaks(features, df, some) == []
    planted = lambda d, r: features(
        d, r.assign(history=[[*h, i] for h, i in zip(r.history, r.row_id)])
    )
    assert len(leaks(planted, df, some)) > 20  # a 3 turned over stays a 3


def test_movies_come_near_the_anchors(data, tmp_path):
    R = reviews.run(
        make(
            reviews.Params,
            dict(dataset="movies", data=str(data / "movies"), out=str(tmp_path / "r")),
        )
    )
    a = run(Params(str(R.path), str(tmp_path / "b")))
    import json

    m = {
        k: (v["MAE"]["value"], v["RMSE"]["value"])
        for k, v in json.loads((a / "metrics.json").read_text()).items()
    }
    near = lambda name, mae, rmse, by=5e-5: (
        abs(m[name][0] - mae) <= by and abs(m[name][1] - rmse) <= by
    )
    assert m["constant_5"][0] == 2102 / 2629
    assert (
        near("constant_5", 0.7995, 1.4797)
        and near("constant_valid_mean", 0.9942, 1.2452)
        and near("train_mean", 1.2487, 1.3664)
    )
    assert near("user_mean_5", 0.9217, 1.3098) and near("user_mean_10", 0.9680, 1.3239)
    assert (
        near("lightgbm_median", 0.7356, 1.2783, 0.02)
        and m["lightgbm_l2"][1] < 1.15
        and m["lightgbm_expected"][1] < 1.15
    )
    assert m["lightgbm_median"][0] < 0.7603  # what the paper reports


def test_too_little(tmp_path):
    (tmp_path / "t.csv").write_text(
        "user_id,item_id,rating,timestamp,title\n"
        + "".join(f"u,{i},{1 + i % 5},{i},T{i}\n" for i in range(1, 7))
    )
    R = reviews.run(reviews.Params(str(tmp_path / "r"), "table", str(tmp_path / "t.csv")))
    with pytest.raises(BadInput, match="at least 5 rows of train"):
        run(Params(str(R.path), str(tmp_path / "b")))
