"The audit's numbers on the released Movies files."

import json

from recnb.rating import audit


def test_movies(data, tmp_path):
    a = audit.run(audit.Params(str(data / "movies"), str(tmp_path / "a")))
    x = json.loads((a / "audit.json").read_text())
    assert (
        x["inside"]["train"]["value"],
        x["inside"]["train"]["n"],
        x["inside"]["validation"]["value"],
        x["inside"]["test"]["value"],
    ) == (1, 22_097, 0, 0)
    assert (
        x["constant"]["errors"] == 2102
        and x["constant"]["n"] == 2629
        and round(x["constant"]["standard_error"], 3) == 0.024
    )
    assert (
        x["shipped"]["sketches"] == 2629
        and x["shipped"]["empty"] == 11
        and x["shipped"]["say_book"]["value"] > 0.99
    )
    assert (
        abs(x["saving"]["all"]["longer"]["value"] - 0.806) < 0.02
        and abs(x["saving"]["all"]["full"] - 976) < 10
    )
    assert (
        x["formats"]["targets_with_commas"] == 803
        and x["formats"]["ends_in_empty_line"]["value"] > 0.9
    )
    few = x["agreement"]["train, users with at most 10 ratings"]
    assert (
        x["agreement"]["train"]["full"]["value"] > x["agreement"]["train"]["past"]["value"] + 0.08
        and few["full"]["value"] > few["past"]["value"] + 0.15
    )
    assert (
        abs(x["agreement"]["test"]["full"]["value"] - x["agreement"]["test"]["past"]["value"])
        < 0.01
    )
    shares = [x["saving"]["all"]["longer"], *x["inside"].values(), x["agreement"]["test"]["past"]]
    assert all(v["users"] and v["users_low"] <= v["value"] <= v["users_high"] for v in shares)
    gap = x["agreement"]["train"]["difference"]
    assert 0 < gap["users_low"] < gap["difference"] < gap["users_high"] and gap["users_p"] < 0.001
    past = x["agreement"]["train"]["past"]  # some users have dozens of train rows
    assert past["users_high"] - past["users_low"] > 1.2 * (past["high"] - past["low"])
