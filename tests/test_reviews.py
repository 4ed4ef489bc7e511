"Reviews: real counts, published histories, faults with file and line, memory, equal runs."

import gzip
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from recnb.rating.reviews import build_histories, find_history_leaks, leave_last_out, run
from recnb.stages import BadInput


def read(a):
    return pd.read_parquet(a / "interactions.parquet"), pd.read_parquet(a / "rows.parquet")


@pytest.fixture(scope="module")
def movies(tmp_path_factory):
    from conftest import DATA

    if not (DATA / "movies").exists():
        pytest.skip(f"needs the real data in {DATA}")
    return run(
        out=str(tmp_path_factory.mktemp("r") / "movies"),
        dataset="movies",
        data=str(DATA / "movies"),
    ), DATA / "movies"


def test_counts_of_movies(movies):
    a, _ = movies
    f = a.facts
    assert (f["train"], f["validation"], f["test"], f["users"], f["items"], f["ratings"]) == (
        22_097,
        2_629,
        2_629,
        2_629,
        10_874,
        35_242,
    )
    assert f["ties"] == f["empty_histories"] == f["dropped"] == 0
    t = pd.DataFrame(json.loads((a / "statistics.json").read_text())).set_index("split")
    assert (
        (t.rows == t.published).all()
        and t.cold_items["test"] == 295
        and t.history_max["test"] == 450
        and t.users["train"] == 2_047
    )
    assert [round(100 * t.loc["test", f"share of {k}"], 1) for k in range(1, 6)] == [
        7.1,
        5.9,
        9.5,
        15.1,
        62.5,
    ]
    assert round(t.mean_label["train"], 2) == 3.64 and round(t.history_mean["test"], 1) == 11.4


def test_histories_are_the_published_text(movies):
    a, folder = movies
    df, rows = read(a)
    row_of, seen, differ = (
        {(u, i): r for u, i, r in zip(df.user_id, df.item_id, df.row_id)},
        dict(zip(rows.row_id, rows.history)),
        0,
    )
    text = [
        f"{t}{', ' + c if c else ''}, {r:g}" for t, c, r in zip(df.title, df.categories, df.rating)
    ]
    for split in ("train", "test"):
        with gzip.open(folder / f"{split}.jsonl.gz", "rt") as f:
            for r in list(map(json.loads, f))[::40]:
                printed = [x.removesuffix(".0") for x in r["history"].split("\n") if x]
                ours = seen[row_of[r["user_id"], r["parent_asin"]]]
                assert len(ours) == len(printed) and [x.rpartition(", ")[2] for x in printed] == [
                    f"{df.rating[i]:g}" for i in ours
                ]
                differ += printed != [text[i] for i in ours]
    assert differ <= 15  # a handful of titles were changed between the files


def test_ml_100k_has_many_ties(tmp_path):
    a = run(out=str(tmp_path / "ml"), dataset="ml-100k")
    df, rows = read(a)
    assert (a.facts["users"], a.facts["items"], a.facts["ratings"], a.facts["test"]) == (
        943,
        1_682,
        100_000,
        943,
    )
    assert a.facts["ties"] > 40_000 and len(find_history_leaks(rows, df)) == 0
    assert df.title.str.contains(r"\(19\d\d\)").mean() > 0.9


times = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 6), st.integers(1, 5)), min_size=1, max_size=25
)


@settings(max_examples=60, deadline=None)
@given(times, st.booleans())
def test_a_rating_never_reaches_its_own_row_or_an_earlier_one(xs, sees):
    "A history is what its row may see, as counted by hand; none reaches the row's own time."
    df = pd.DataFrame(xs, columns=["user_id", "timestamp", "rating"]).assign(
        item_id=range(len(xs)), title="t", categories=""
    )
    df = leave_last_out(df).assign(
        row_id=range(len(xs)), timestamp=lambda x: x.timestamp.astype("Int64")
    )
    rows = build_histories(df, test_sees_validation=sees)
    assert len(find_history_leaks(rows, df)) == 0
    for r in rows.itertuples():
        ok = (
            (df.user_id == r.user_id)
            & (df.timestamp < r.timestamp)
            & df.split.isin(["history", "train"] + ["validation"] * (sees and r.split == "test"))
        )
        assert list(r.history) == df.row_id[ok].tolist()


SIREN = {
    name: json.dumps(record) + "\n"
    for name, record in dict(
        history=dict(
            user_id="u",
            history="A, X|Y, 3\nB, 4\nC, X, 5\nD, X, 1",
            history_asins=["a", "b", "c", "d"],
            history_ratings=[3, 4, 5, 1],
        ),
        train=dict(user_id="u", parent_asin="d", timestamp=4, label=1.0, target="D, X", history=""),
        valid=dict(user_id="u", parent_asin="e", timestamp=5, label=2.0, target="E, X", history=""),
        test=dict(user_id="u", parent_asin="f", timestamp=6, label=5.0, target="F, X", history=""),
    ).items()
}


@pytest.mark.parametrize(
    "name, old, new, said",
    [
        ("test", '"label": 5.0', '"label": 7', "expected a rating from 1 to 5"),
        ("valid", '"E, X"', '""', "expected a title"),
        ("valid", '"target": "E, X"', '"target": null', "column target"),
        ("test", "}\n", '}\n{"user_id": \n', "row 2"),
        ("test", '"user_id": "u"', '"user_id": "w"', "expected a user of history.jsonl"),
        ("history", "[3, 4, 5, 1]", "[3, 4, 5]", "as many lines"),
        ("train", '"parent_asin": "d"', '"parent_asin": "z"', "each train row"),
        ("history", "[3, 4, 5, 1]", '[3, "nan", 5, 1]', "nan"),
    ],
)
def test_faults_of_siren_files_are_one_line(tmp_path, name, old, new, said):
    for k, v in SIREN.items():
        (tmp_path / f"{k}.jsonl").write_text(v.replace(old, new) if k == name else v)
    with pytest.raises(BadInput) as e:
        run(out=str(tmp_path / "o"), dataset="siren", data=str(tmp_path))
    assert (
        said in str(e.value)
        and f"{name}.jsonl" in str(e.value)
        and "\n" not in str(e.value)
        and not (tmp_path / "o").exists()
    )


def test_an_item_without_categories_is_kept_and_counted(tmp_path):
    for k, v in SIREN.items():
        (tmp_path / f"{k}.jsonl").write_text(v)
    a = run(out=str(tmp_path / "o"), dataset="siren", data=str(tmp_path))
    assert a.facts["without_categories"] == 1 and read(a)[0].categories.tolist()[1] == ""


def test_a_file_that_is_cut_or_gone(tmp_path):
    for k, v in SIREN.items():
        (tmp_path / f"{k}.jsonl.gz").write_bytes(
            gzip.compress(v.encode())[: -9 if k == "test" else None]
        )
    with pytest.raises(BadInput, match="whole gzip"):
        run(out=str(tmp_path / "o"), dataset="siren", data=str(tmp_path))
    (tmp_path / "valid.jsonl.gz").unlink()
    with pytest.raises(BadInput, match="valid.jsonl"):
        run(out=str(tmp_path / "o"), dataset="siren", data=str(tmp_path))


def test_tables_and_duplicates(tmp_path):
    f = tmp_path / "t.csv"
    f.write_text(
        "user_id,item_id,rating,timestamp,title\n"
        + "".join(f"u,{i},{1 + i % 5},{i},T{i}\n" for i in range(1, 7))
        + "u,3,4,3,T3\n"
    )
    with pytest.raises(BadInput, match="row 8.*each rating once"):
        run(out=str(tmp_path / "o"), dataset="table", data=str(f))
    a = run(out=str(tmp_path / "o"), dataset="table", data=str(f), duplicates="drop")
    assert (
        a.facts["dropped"] == 1
        and pd.read_parquet(a / "dropped.parquet").row.tolist() == [8]
        and a.facts["train"] == 1
    )
    for kind in ("parquet", "jsonl"):
        df = pd.read_csv(f)[:6]
        g = tmp_path / f"t.{kind}"
        df.to_parquet(g) if kind == "parquet" else df.to_json(g, orient="records", lines=True)
        assert run(out=str(tmp_path / kind), dataset="table", data=str(g)).facts["test"] == 1


GROWTH = """
import json, resource, sys
from pathlib import Path
from recnb.rating import reviews
d, n = Path(sys.argv[1]), int(sys.argv[2])
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
keep, left = reviews.select_reviews(d/'Toys.jsonl', 5)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([(peak - base) * 1024 / n, len(keep)]))
"""


def test_memory_of_the_raw_reader(tmp_path):
    "Bytes a review in the first reading: they do not depend on the length of its text."
    n = 150_000
    rng = np.random.default_rng(0)
    text = "x" * 400
    with open(tmp_path / "Toys.jsonl", "w") as f:
        for u, i in rng.integers(0, (30_000, 6_000), (n, 2)):
            review = dict(user_id=f"u{u}", parent_asin=f"i{i}", rating=5.0, timestamp=int(u + i))
            f.write(json.dumps(review | dict(text=text)) + "\n")
    r = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path), str(n)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    per_review, kept = json.loads(r.stdout)
    assert (
        per_review * 30e6 < 4.5e9 and per_review < 150 and 0 < kept < n
    )  # a small file pays for fixed buffers


def test_raw_amazon_names_the_fault(tmp_path):
    (tmp_path / "Toys.jsonl").write_text('{"user_id": "u", "parent_asin": "i", "rating": 5.0}\n')
    with pytest.raises(BadInput, match="meta_"):
        run(out=str(tmp_path / "o"), dataset="amazon", data=str(tmp_path))
    (tmp_path / "meta_Toys.jsonl").write_text("")
    with pytest.raises(BadInput, match="Toys.jsonl, row 1, column timestamp"):
        run(out=str(tmp_path / "o"), dataset="amazon", data=str(tmp_path))


def test_equal_runs_give_equal_bytes(tmp_path):
    a, b = (run(num_users=10, num_items=30, out=str(tmp_path / n)) for n in "ab")
    assert a.digest == b.digest
