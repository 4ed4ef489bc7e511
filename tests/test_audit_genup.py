"The audit of GenUP against a recount that shares no code with it: plain loops over the answers."

import json
import math
from collections import defaultdict
from fractions import Fraction

import pandas as pd
import pytest
from conftest import ROOT

from recnb.poi import analyses, audit

SEVEN = "Llama-2-7b-longlora-32k-merged"
EIGHT = "Meta-Llama-3.1-8B"
ONE = "Llama-3.2-1B"


@pytest.fixture(scope="module")
def audited(data, tmp_path_factory):
    d = tmp_path_factory.mktemp("audit")
    given = dict(
        stored=str(data / "genup/results_predictions.parquet"),
        published=str(ROOT / "papermill_runs/published"),
    )
    P = analyses.run(analyses.Params(out=str(d / "published"), **given))
    A = audit.run(audit.Params(analysis=P.path, out=str(d / "audit"), **given))
    return json.loads((A / "cells.json").read_text()), json.loads((A / "claims.json").read_text())


@pytest.fixture(scope="module")
def right(data):
    "file → instance → whether the answer was right, read row by row."
    out = defaultdict(dict)
    for r in pd.read_parquet(data / "genup/results_predictions.parquet").itertuples():
        out[r.file][r.i] = (r.pred or "") == r.target
    return out


def name(city, model, trained=None, tail=""):
    place = dict(
        nyc="FourSquare-NYC",
        tky="FourSquare-TKY",
        ca="Gowalla-CA",
        moscow="FourSquare-Moscow",
        sao_paulo="FourSquare-SaoPaulo",
    )
    tested = "" if tail == "-LLM4POI" else tail
    return f"{model}-{place[trained or city]}-POI{tail}-{place[city]}-POI{tested}"


def file_of(cell):
    kind, _, value = cell["cell"].partition("=")
    if cell["method"] == "LLM4POI*":
        return name(cell["dataset"], cell["model"], tail="-LLM4POI")
    if kind == "trained_on":
        return name(cell["dataset"], cell["model"], value)
    if kind == "profile" and value != "full":
        return name(
            cell["dataset"],
            cell["model"],
            tail=dict(
                text="-profile",
                routines="-profile-routines-pref",
                attributes="-profile-routines-pref-attrs",
            )[value],
        )
    return name(cell["dataset"], cell["model"])


def test_every_cell(audited, right):
    "Equal: rounds to the printed digits. Rounding: only cutting gives them. Differs: neither does."
    cells = audited[0]
    found = defaultdict(int)
    assert len(cells) == 141
    for c in cells:
        found[c["verdict"]] += 1
        if c["cell"].startswith(("activity=", "length=")):
            continue  # below
        answers = right.get(file_of(c))
        if answers is None:
            assert c["verdict"] == "not derivable"
            continue
        share, digits = (
            Fraction(sum(answers.values()), len(answers)),
            3 if c["dataset"] in ("moscow", "sao_paulo") and not c["cell"] else 4,
        )
        printed = Fraction(str(c["printed"]))
        rounds, cuts = (
            abs(share - printed) * 2 * 10**digits <= 1,
            math.floor(share * 10**digits) == printed * 10**digits,
        )
        assert c["verdict"] == ("equal" if rounds else "rounding" if cuts else "differs"), c
        assert c["n"] == len(answers) and c["low"] < float(share) < c["high"]
    assert found == dict(equal=31, rounding=15, differs=2, consistent=90) | {
        "not derivable": 3
    }  # New York's groups are only added up here, not formed


def test_groups_add_up(audited, right):
    "The hits that the printed shares of three groups allow are those of all instances."
    groups = defaultdict(list)
    for c in audited[0]:
        kind, _, _ = c["cell"].partition("=")
        if kind in ("activity", "length"):
            groups[c["dataset"], c["model"], kind].append(c)
    assert len(groups) == 30
    for (city, model, kind), three in groups.items():
        hits = [
            [
                h
                for h in range(c["n"] + 1)
                if math.floor(Fraction(h, c["n"]) * 10_000) == Fraction(str(c["printed"])) * 10_000
            ]
            for c in three
        ]
        assert (
            all(len(h) == 1 for h in hits)
            and sum(h[0] for h in hits) == sum(right[name(city, model)].values())
            and all(c["verdict"] == "consistent" for c in three)
        )


def mcnemar(x, y):
    "Twice the smaller binomial tail, by whole numbers."
    b, c = sum(x[i] and not y[i] for i in x), sum(y[i] and not x[i] for i in x)
    return (
        b,
        c,
        min(
            1.0,
            float(
                Fraction(2 * sum(math.comb(b + c, k) for k in range(min(b, c) + 1)), 2 ** (b + c))
            ),
        ),
    )


def test_every_paired_comparison(audited, right):
    cities = {
        "New York": "nyc",
        "Tokyo": "tky",
        "California": "ca",
        "Moscow": "moscow",
        "São Paulo": "sao_paulo",
    }
    models = {"Llama-2-7B": SEVEN, "Llama-3.1-8B": EIGHT, "Llama-3.2-1B": ONE}
    paired = [c for c in audited[1] if c.get("test") == "McNemar"]
    tested = [c for c in audited[1] if c.get("p") is not None]
    for c in paired:
        city, model = (
            cities[c["city"]],
            next((m for n, m in models.items() if n in c["better"]), SEVEN),
        )
        a = name(city, model)
        if c["than"].startswith("LLM4POI*"):
            b = name(city, SEVEN, tail="-LLM4POI")
        elif c["than"].startswith("of "):
            b = name(city, model, cities[c["than"][3:]])
        elif c["than"] in models:
            b = name(city, models[c["than"]])
        else:
            b = name(
                city,
                SEVEN,
                tail=dict(
                    text="-profile",
                    routines="-profile-routines-pref",
                    attributes="-profile-routines-pref-attrs",
                )[c["than"]],
            )
        only_a, only_b, p = mcnemar(right[a], right[b])
        assert (c["only_a"], c["only_b"]) == (only_a, only_b) and math.isclose(
            c["p"], p, rel_tol=1e-6, abs_tol=1e-12
        ), c
    assert len(paired) == 15 + 6 + 3 + 18
    order = sorted(tested, key=lambda c: c["p"])
    worst = 0
    for k, c in enumerate(order):
        worst = max(worst, min(1, c["p"] * (len(order) - k)))
        assert math.isclose(c["p_holm"], worst, rel_tol=1e-9) and c["verdict"] == (
            "not shown" if worst >= 0.05 else "stands" if c["difference"] > 0 else "contradicted"
        )


def test_what_the_reader_is_told(audited):
    table = audit.summarise_claims(audited[1]).set_index("claim")
    assert (
        table.loc["a profile helps", "stands"] == 2
        and table.loc["each part of the profile helps", "not shown"] == 3
    )
    assert table.loc["the larger backbone is better", "contradicted"] == 2


def test_where_users_are_known_the_verdict_follows_them():
    "One user has all the instances that only one side is right for: no difference is shown."
    right = [1] * 20 + [0] * 20
    sides = [
        pd.DataFrame(
            dict(
                instance_id=range(40),
                target_poi=5,
                rank=pd.array([1 if x else None for x in hits], dtype="Int64"),
            )
        )
        for hits in (right, [0] * 40)
    ]
    runs = {("nyc", SEVEN, m, ""): side for m, side in zip(("GenUP", "LLM4POI*"), sides)}
    plain = audit.judge_claims(audit.compare_runs(runs))
    users = {"nyc": ["a"] * 20 + list("bcdefghijklmnopqrstu")}
    known = audit.judge_claims(audit.compare_runs(runs, users))
    assert plain[0]["verdict"] == "stands" and known[0]["verdict"] == "not shown"
    assert known[0]["p"] == plain[0]["p"] < 0.001 < known[0]["users_p"]


def test_bad_input(tmp_path):
    from recnb.stages import BadInput

    pd.DataFrame(dict(file=["x"], i=[0], pred=["1"])).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(BadInput, match="target"):
        audit.read_runs(tmp_path / "a.parquet")
    pd.DataFrame(dict(file=["no-name"], i=[0], pred=["1"], target=["1"])).to_parquet(
        tmp_path / "b.parquet"
    )
    with pytest.raises(BadInput, match="no-name"):
        audit.read_runs(tmp_path / "b.parquet")
