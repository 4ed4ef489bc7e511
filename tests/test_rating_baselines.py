"Baselines: nothing seen too early, the anchors of the real test rows, bad input."

import json

import numpy as np
import pytest

from recnb.rating import reviews
from recnb.rating.baselines import build_history_features, run
from recnb.rating.reviews import INTERACTIONS, ROWS
from recnb.stages import BadInput


def find_leaking_rows(build, df, rows):
    "Rows with a number that changes with a rating at or after their time."
    plain = build(df, rows)
    found = []
    for k, row_id in enumerate(rows.row_id):
        one = rows.iloc[[k]]
        late = (df.timestamp >= one.timestamp.iloc[0]).fillna(False) | (df.row_id == row_id)
        turned = df.rating.where(~late, np.where(df.rating >= 4, 1.0, 5.0))
        if not build(df.assign(rating=turned), one).equals(plain.iloc[[k]]):
            found.append(row_id)
    return found


def test_features_have_seen_nothing_late_and_planted_leaks_are_caught(tmp_path):
    R = reviews.run(dataset="made", num_users=30, num_items=30, seed=9, out=str(tmp_path / "r"))
    df, rows = INTERACTIONS.read(R), ROWS.read(R)
    some = rows.sample(40, random_state=1)

    def see_own_label(df, rows):
        history = [[*h, i] for h, i in zip(rows.history, rows.row_id)]
        return build_history_features(df, rows.assign(history=history))

    def see_all_ratings(df, rows):
        mean = df.groupby("item_id").rating.mean().reindex(df.item_id[rows.row_id.to_numpy()])
        return build_history_features(df, rows).assign(item_mean=mean.to_numpy())

    assert find_leaking_rows(build_history_features, df, some) == []
    assert len(find_leaking_rows(see_own_label, df, some)) > 20  # a 3 turned over stays a 3
    assert len(find_leaking_rows(see_all_ratings, df, some)) > 20


def test_movies_come_near_the_anchors(data, tmp_path):
    R = reviews.run(dataset="movies", data=str(data / "movies"), out=str(tmp_path / "r"))
    a = run(reviews=R, out=str(tmp_path / "b"))
    metrics = json.loads((a / "metrics.json").read_text())
    m = {k: (v["MAE"]["value"], v["RMSE"]["value"]) for k, v in metrics.items()}
    assert m["constant_5"][0] == 2102 / 2629
    for name, mae, rmse, tolerance in (
        ("constant_5", 0.7995, 1.4797, 5e-5),
        ("constant_validation_mean", 0.9942, 1.2452, 5e-5),
        ("train_mean", 1.2487, 1.3664, 5e-5),
        ("user_mean_5", 0.9217, 1.3098, 5e-5),
        ("user_mean_10", 0.9680, 1.3239, 5e-5),
        ("lightgbm_median", 0.7356, 1.2783, 0.02),
    ):
        assert abs(m[name][0] - mae) <= tolerance and abs(m[name][1] - rmse) <= tolerance, name
    assert m["lightgbm_l2"][1] < 1.15 and m["lightgbm_expected"][1] < 1.15
    assert m["lightgbm_median"][0] < 0.7603  # what the paper reports


def test_too_little(tmp_path):
    lines = "".join(f"u,{i},{1 + i % 5},{i},T{i}\n" for i in range(1, 7))
    (tmp_path / "t.csv").write_text("user_id,item_id,rating,timestamp,title\n" + lines)
    R = reviews.run(dataset="table", data=str(tmp_path / "t.csv"), out=str(tmp_path / "r"))
    with pytest.raises(BadInput, match="at least 5 rows of train"):
        run(reviews=R, out=str(tmp_path / "b"))
