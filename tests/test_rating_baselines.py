"Baselines: the anchors of the real test rows, bad input."

import json

import numpy as np
import pandas as pd
import pytest

from recnb.metrics import holm
from recnb.rating import reviews
from recnb.rating.baselines import run
from recnb.stages import BadInput


def test_movies_come_near_the_anchors(movies, tmp_path):
    a = run(reviews=movies / "reviews", out=str(tmp_path / "b"))
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
    lines = "".join(f"u,{i},{1 + i % 5},{1_600_000_000 + i},T{i}\n" for i in range(1, 7))
    (tmp_path / "t.csv").write_text("user_id,item_id,rating,timestamp,title\n" + lines)
    R = reviews.run(dataset="table", data=str(tmp_path / "t.csv"), out=str(tmp_path / "r"))
    with pytest.raises(BadInput, match="at least 5 rows of train"):
        run(reviews=R, out=str(tmp_path / "b"))


def test_errors_are_compared_in_pairs_both_metrics_and_each_decoder_with_its_like():
    from recnb.rating import analyses

    rng = np.random.default_rng(0)
    rows = pd.DataFrame(dict(row_id=range(60), user_id=np.arange(60) // 4))
    rows["label"] = rng.integers(1, 6, 60).astype(float)
    y = rows.set_index("row_id").label
    mine = pd.DataFrame(dict(predicted=y, argmax=y - 1, expected=y - 0.5, median=y))
    theirs = pd.DataFrame(dict(argmax=y + 1, expected=y + 0.5, median=y * 0 + 3))
    pairs = [(dict(method="a", where="m"), "b", mine, theirs)]
    lines = pd.DataFrame(analyses.make_error_test_lines(pairs, rows, dataset="made"))
    value = {
        (x["settings"].get("decoder", ""), x["metric"]): x["value"]
        for x in lines.to_dict("records")
    }
    assert value["", "difference"] == -1 and value["", "RMSE difference"] == -1
    assert value["expected", "difference"] == 0 == value["expected", "RMSE difference"]
    own = np.sqrt(((3 - y) ** 2).mean())
    assert np.isclose(value["median", "RMSE difference"], -own)
    assert value["argmax", "difference"] == 0  # what was written is compared with their argmax
    p = lines[lines.metric.str.endswith("permutation p")].value.to_numpy(float)
    q = lines[lines.metric.str.endswith("Holm p")].value.to_numpy(float)
    assert np.allclose(q, holm(p)) and set(lines.users) == {15}
    found = analyses.make_error_lines(
        mine.argmax, y, users=rows.user_id, dataset="m", method="a", where="w"
    )
    assert all(x["users_low"] <= x["value"] <= x["users_high"] and x["users"] == 15 for x in found)
