"Reviews: real counts, published histories, faults with file and line, memory, equal runs."

import gzip
import json
import re
import subprocess
import sys
import zipfile

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from recnb.rating import analyses, answer_only, baselines, prompts, sketch
from recnb.rating.reviews import build_histories, find_history_leaks, leave_last_out, run
from recnb.recipes import read_recipe
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


moments = st.one_of(st.none(), st.integers(0, 6))
times = st.lists(st.tuples(st.integers(0, 2), moments, st.integers(1, 5)), min_size=1, max_size=25)


@settings(max_examples=60, deadline=None)
@given(times, st.booleans(), st.booleans())
def test_a_rating_never_reaches_its_own_row_or_an_earlier_one(xs, sees, ties):
    "A history is what its row may see, as counted by hand; none reaches the row's own time."
    df = pd.DataFrame(xs, columns=["user_id", "timestamp", "rating"]).assign(
        item_id=range(len(xs)), title="t", categories=""
    )
    df = leave_last_out(df).assign(
        row_id=range(len(xs)), timestamp=lambda x: x.timestamp.astype("Int64")
    )
    rows = build_histories(df, keep_ties=ties, test_sees_validation=sees)
    assert len(find_history_leaks(rows, df, ties)) == 0
    for r in rows.itertuples():
        earlier = df.timestamp.isna() | (df.timestamp < r.timestamp).fillna(True)
        if ties:
            earlier |= (df.timestamp == r.timestamp).fillna(False)
        ok = (
            (df.user_id == r.user_id)
            & (df.position < df.position[r.row_id])
            & earlier
            & df.split.isin(["history", "train"] + ["validation"] * (sees and r.split == "test"))
        )
        assert list(r.history) == df.row_id[ok].tolist()


DAY = 1_600_000_000_000  # ms
SIREN = {
    name: json.dumps(record) + "\n"
    for name, record in dict(
        history=dict(
            user_id="u",
            history="A, X|Y, 3\nB, 4\nC, X, 5\nD, X, 1",
            history_asins=["a", "b", "c", "d"],
            history_ratings=[3, 4, 5, 1],
        ),
        train=dict(
            user_id="u", parent_asin="d", timestamp=DAY + 4, label=1.0, target="D, X", history=""
        ),
        valid=dict(
            user_id="u", parent_asin="e", timestamp=DAY + 5, label=2.0, target="E, X", history=""
        ),
        test=dict(
            user_id="u", parent_asin="f", timestamp=DAY + 6, label=5.0, target="F, X", history=""
        ),
    ).items()
}


@pytest.mark.parametrize(
    "name, old, new, said",
    [
        ("test", '"label": 5.0', '"label": 7', "expected a rating of 1, 2, 3, 4 or 5"),
        ("valid", '"E, X"', '""', "expected a title"),
        ("valid", '"target": "E, X"', '"target": null', "column target"),
        ("test", "}\n", '}\n{"user_id": \n', "row 2"),
        ("test", '"user_id": "u"', '"user_id": "w"', "expected a user of history.jsonl"),
        ("history", "[3, 4, 5, 1]", "[3, 4, 5]", "as many lines"),
        ("train", '"parent_asin": "d"', '"parent_asin": "z"', "each train row in its user's line"),
        ("test", f'"timestamp": {DAY + 6}', '"timestamp": 6', "milliseconds since 1970"),
        ("history", "[3, 4, 5, 1]", "7", "as many lines"),
        ("history", '"a", "b"', '"a", {}', "an id"),
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


@pytest.mark.parametrize("skipped", [False, True])
def test_rows_without_a_time_and_items_that_stand_twice(tmp_path, skipped):
    "What stands before a row is its history, also where times are missing and lines are dropped."
    for k, v in SIREN.items():
        v = re.sub(r'"timestamp": \d+, ', "", v) if k in ("valid", "test") else v
        (tmp_path / f"{k}.jsonl").write_text(v.replace('"b", "c"', '"b", "b"') if skipped else v)
    given = dict(dataset="siren", data=str(tmp_path), duplicates="drop")
    df, rows = read(run(given, out=str(tmp_path / "o")))
    assert df.position.tolist() == list(range(6 - skipped))
    assert rows.history_length.tolist() == [3 - skipped, 4 - skipped, 4 - skipped]
    F = baselines.build_history_features(df, rows)
    assert F.item_n.isna().tolist() == [False, True, True]


def test_a_file_that_is_cut_or_gone(tmp_path):
    for k, v in SIREN.items():
        (tmp_path / f"{k}.jsonl.gz").write_bytes(
            gzip.compress(v.encode())[: -9 if k == "test" else None]
        )
    with pytest.raises(BadInput, match="test.jsonl.gz.*whole archive"):
        run(out=str(tmp_path / "o"), dataset="siren", data=str(tmp_path))
    (tmp_path / "valid.jsonl.gz").unlink()
    with pytest.raises(BadInput, match="valid.jsonl"):
        run(out=str(tmp_path / "o"), dataset="siren", data=str(tmp_path))


def test_tables_and_duplicates(tmp_path):
    f = tmp_path / "t.csv"
    f.write_text(
        "user_id,item_id,rating,timestamp,title\n"
        + "".join(f"u,{i},{1 + i % 5},{DAY + i},T{i}\n" for i in range(1, 7))
        + f"u,3,4,{DAY + 3},T3\n"
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
from recnb.records import BadRows
d, n = Path(sys.argv[1]), int(sys.argv[2])
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
keep, left = reviews.select_reviews(d/'Toys.jsonl', 5, BadRows())
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
            review = dict(
                user_id=f"u{u}", parent_asin=f"i{i}", rating=5.0, timestamp=DAY + int(u + i)
            )
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


# What public files of this kind hold, each with its right value.
MOVIE = dict(parent_asin="i0", title="Movie 0", categories=["Movies & TV", "Drama"])


def write_amazon(folder, review=None, item=None):
    "Six users who rate the same five items; one review and one item are altered."
    lines = [
        dict(
            user_id=f"u{u}",
            parent_asin=f"i{i}",
            rating=1.0 + (u + i) % 5,
            timestamp=DAY + 9 * u + i,
        )
        for u in range(6)
        for i in range(5)
    ]
    items = [MOVIE | dict(parent_asin=f"i{i}") for i in range(5)]
    lines[7] |= review or {}
    items[2] |= item or {}
    for name, records in (("Toys", lines), ("meta_Toys", items)):
        text = "".join(json.dumps(r) + "\n" for r in records)
        (folder / f"{name}.jsonl").write_text(text)
    return dict(dataset="amazon", data=str(folder), k_core=4)


@pytest.mark.parametrize(
    "review, said",
    [
        (dict(rating=0.0), "column rating: found '0.0', expected a rating of 1, 2, 3, 4 or 5"),
        (dict(rating=None), "column rating"),
        (dict(rating=True), "column rating"),
        (dict(rating=float("nan")), "column rating"),
        (dict(timestamp=-62_135_596_800_000), "column timestamp: found '-62135596800000'"),
        (dict(timestamp=1_600_000_000), "column timestamp: found '1600000000'"),
        (dict(timestamp="2020-09-13"), "column timestamp: found '2020-09-13'"),
        (dict(timestamp=10**25), "column timestamp"),
        (dict(user_id="a\x00"), "column user_id"),
        (dict(parent_asin=["i2"]), "column parent_asin"),
    ],
)
def test_one_bad_review_is_named_or_left_out(tmp_path, review, said):
    given = write_amazon(tmp_path, review)
    with pytest.raises(BadInput) as e:
        run(given, out=str(tmp_path / "o"))
    assert f"Toys.jsonl, row 8, {said}" in str(e.value) and "\n" not in str(e.value)
    a = run(given, out=str(tmp_path / "o"), skip_bad_rows=True)
    dropped = pd.read_parquet(a / "dropped.parquet")
    assert a.facts["ratings"] == 29 and dropped.row.tolist() == [8]
    assert dropped.reason.str.startswith(said.partition(":")[0].removeprefix("column ")).all()


def test_a_file_in_seconds_is_not_read_as_milliseconds(tmp_path):
    given = write_amazon(tmp_path)
    f = tmp_path / "Toys.jsonl"
    records = [json.loads(x) for x in f.read_text().splitlines()]
    f.write_text(
        "".join(json.dumps(r | dict(timestamp=r["timestamp"] // 1000)) + "\n" for r in records)
    )
    with pytest.raises(BadInput, match="row 1, column timestamp"):
        run(given, out=str(tmp_path / "o"))
    with pytest.raises(BadInput, match="at least one rating.*30 left out: timestamp"):
        run(given, out=str(tmp_path / "o"), skip_bad_rows=True)


@pytest.mark.parametrize(
    "categories, path",
    [("Movies", "Movies"), ([["Movies", "Drama"]], "Movies|Drama"), (None, ""), ([], "")],
)
def test_category_paths_of_older_files(tmp_path, categories, path):
    a = run(write_amazon(tmp_path, item=dict(categories=categories)), out=str(tmp_path / "o"))
    df = read(a)[0]
    assert set(df.categories[df.item_id == "i2"]) == {path}


def test_a_title_with_half_a_character(tmp_path):
    given = write_amazon(tmp_path, item=dict(title="x \ud83d y"))
    with pytest.raises(BadInput, match=r"meta_Toys.jsonl, row 3, column title"):
        run(given, out=str(tmp_path / "o"))
    a = run(given, out=str(tmp_path / "o"), skip_bad_rows=True)
    dropped = pd.read_parquet(a / "dropped.parquet")
    assert a.facts["ratings"] == 24 and a.facts["dropped"] == len(dropped) == 7


ITEMS = [f"{i}|Title {i} (1995)|01-Jan-1995||http://x|{'|'.join('0' * 19)}" for i in range(1, 9)]
RATED = [
    f"{u}\t{i}\t{1 + (u + i) % 5}\t{880_000_000 + 9 * u + i}"
    for u in range(1, 4)
    for i in range(1, 9)
]


def write_movielens(folder, rated=None, item=None):
    "GroupLens' two files; the sixth rating and the fourth item are altered."
    rows, items = list(RATED), list(ITEMS)
    if rated is not None:
        rows[5] = rated
    if item is not None:
        items[3] = item
    (folder / "u.data").write_text("\n".join(rows) + "\n")
    (folder / "u.item").write_bytes("\n".join(items).encode("latin-1"))
    return dict(dataset="ml-100k", data=str(folder))


@pytest.mark.parametrize(
    "rated, item, said, left",
    [
        ("1\t6\t1", None, "u.data, row 6: found", 1),
        ("1\t6\t1\tx", None, "u.data, row 6, column timestamp: found 'x'", 1),
        ("1\t6\t1\t-1", None, "u.data, row 6, column timestamp", 1),
        ("1\t6\t9\t880000000", None, "u.data, row 6, column rating: found '9'", 1),
        (None, "1::Toy Story (1995)::Animation", "u.item, row 4: found", 4),
        (None, "4|Broken", "u.item, row 4: found", 4),
    ],
)
def test_faults_of_movielens_are_one_line(tmp_path, rated, item, said, left):
    given = write_movielens(tmp_path, rated, item)
    with pytest.raises(BadInput) as e:
        run(given, out=str(tmp_path / "o"))
    assert said in str(e.value) and "\n" not in str(e.value)
    a = run(given, out=str(tmp_path / "o"), skip_bad_rows=True)
    assert len(pd.read_parquet(a / "dropped.parquet")) == left


def test_movielens_from_a_zip_with_accents(tmp_path):
    given = write_movielens(tmp_path, item=ITEMS[3].replace("Title", "Misérables"))
    with zipfile.ZipFile(tmp_path / "ml.zip", "w") as z:
        for name in ("u.data", "u.item"):
            z.write(tmp_path / name, f"ml-100k/{name}")
            z.writestr(f"__MACOSX/ml-100k/._{name}", b"\0")
    plain, packed = (
        run(given, data=str(data), out=str(tmp_path / out))
        for data, out in ((tmp_path, "a"), (tmp_path / "ml.zip", "b"))
    )
    assert read(plain)[0].equals(read(packed)[0])
    assert read(plain)[0].title.str.startswith("Misérables").sum() == 3
    (tmp_path / "ml.zip").write_bytes(b"PK\x03\x04junk")
    with pytest.raises(BadInput, match="ml.zip.*archive"):
        run(given, data=str(tmp_path / "ml.zip"), out=str(tmp_path / "c"))


@pytest.mark.parametrize(
    "text", [b"[1, 2]", b'[{"user_id":"\xe9"}]', b"", b"[", b'{"a": 1}', b"[[[" * 9999]
)
def test_faults_of_exp3rt_files_are_one_line(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(BadInput) as e:
        run(dataset="exp3rt", data=str(tmp_path / "x.json"), out=str(tmp_path / "o"))
    assert "x.json" in str(e.value) and "\n" not in str(e.value)


def write_exp3rt(folder, users=30, items=40):
    "A made folder in the layout of EXP3RT's amazon-book; the last user has a test row alone."
    rng = np.random.default_rng(0)

    def rate(u, i):
        text = (
            f"Title: Book {i}\nCategories: Books, Kind {i % 4}\nAuthor: Writer {i % 7}\n"
            f"Plot: A tale of {'horses ships ghosts letters'.split()[i % 4]}."
        )
        score = str(int(np.clip(round(2 + u % 3 + (i % 4 == u % 4) + rng.normal(0, 0.5)), 1, 5)))
        written = dict(user_persona="[Like]", item_synopsis="[Like]", rationale="good")
        return dict(user_id=f"U{u}", item_id=f"B{i}", item_description=text, score=score, **written)

    read = [rng.choice(items, 8, replace=False) for _ in range(users)]
    train = [rate(u, i) for u, own in enumerate(read) for i in own[:6]]
    parts = dict(train_0=train[:100], train_1=train[100:])
    parts["valid"] = [rate(u, own[6]) for u, own in enumerate(read)]
    parts["test"] = [rate(u, own[7]) for u, own in enumerate(read)] + [rate(users, 0)]
    parts |= dict(cold_data=parts["test"][:3], test_helpful=parts["test"])
    (folder / "amazon-book/rating_bias").mkdir(parents=True)
    for name, records in parts.items():
        (folder / f"amazon-book/rating_bias/{name}.json").write_text(json.dumps(records))
    return str(folder / "amazon-book"), train


def test_books_in_exp3rts_layout(tmp_path):
    "Read, sketched and predicted as the recipe has it."
    data, train = write_exp3rt(tmp_path)
    recipe = read_recipe(str(ROOT / "papermill_runs/recipes/books-baselines.yaml"), data)
    told = recipe.datasets["books"]
    a = run(told["reviews"], out=str(tmp_path / "r"))
    df, rows = read(a)
    assert [a.facts[k] for k in ("train", "validation", "test", "dropped")] == [180, 30, 31, 0]
    assert a.facts["without_time"] == len(df) == 241 and df.timestamp.isna().all()
    mine = df[df.user_id == "U3"]
    assert mine.split.tolist() == ["train"] * 6 + ["validation", "test"]
    assert mine.item_id.tolist()[:6] == [r["item_id"] for r in train if r["user_id"] == "U3"]
    of = rows.set_index("row_id").history.map(list)
    ids = mine.row_id.tolist()
    assert [of[i] for i in ids] == [ids[:k] for k in (0, 1, 2, 3, 4, 5, 6, 6)]
    assert rows.history_length[rows.user_id == "U30"].tolist() == [0]
    assert df.categories.str.startswith("Books|Kind ").all()
    described = pd.read_parquet(a / "descriptions.parquet").set_index("item_id").description
    assert len(described) == df.item_id.nunique() and described["B5"].startswith(
        "Author: Writer 5 "
    )
    small = dict(n_clusters=4, top_k=5)
    s = sketch.run(told["sketch"] | small, reviews=a, out=str(tmp_path / "s"))
    names = json.loads((s / "topic_names.json").read_text())
    assert any(word in " ".join(names) for word in ("horses", "ships", "ghosts", "letters"))
    b = baselines.run(told["baselines"], num_trees=20, reviews=a, out=str(tmp_path / "b"))
    predicted = pd.read_parquet(b / "lightgbm_median.parquet")
    assert len(predicted) == 31 and predicted.prediction.between(1, 5).all()


def test_features_of_amazons_meta_file_reach_the_sketch(tmp_path):
    for k, v in SIREN.items():
        (tmp_path / f"{k}.jsonl").write_text(v)
    made = [dict(parent_asin=x, features=[f"Page of {x}", "Bound"]) for x in "abz"]
    made.append(dict(parent_asin="c", features=[]))
    (tmp_path / "meta_X.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made))
    given = dict(dataset="siren", data=str(tmp_path))
    a = run(given, meta=str(tmp_path / "meta_X.jsonl"), out=str(tmp_path / "a"))
    assert pd.read_parquet(a / "descriptions.parquet").values.tolist() == [
        ["a", "Page of a. Bound"],
        ["b", "Page of b. Bound"],
    ]
    s = sketch.run(reviews=a, n_clusters=2, top_k=2, out=str(tmp_path / "s"))
    assert s.facts["described"] == 2
    plain = run(given, out=str(tmp_path / "plain"))
    assert not len(pd.read_parquet(plain / "descriptions.parquet"))
    with pytest.raises(BadInput, match="meta_Y.jsonl"):
        run(given, meta=str(tmp_path / "meta_Y.jsonl"), out=str(tmp_path / "o"))


NAMES = "user=who,item=what,rating=stars,time=when,title=name".split(",")


def write_table(folder, name, form="%Y-%m-%d", sep=","):
    "Ratings on days of two years; nothing in the order of the file."
    days = pd.date_range("2020-01-01", periods=400, freq="37h").strftime(form)
    rng = np.random.default_rng(3)
    rows = [
        (u, i, 1 + (u * i) % 5, days[rng.integers(400)], f"T{i}")
        for u in range(9)
        for i in range(8)
    ]
    text = "\n".join(
        sep.join(map(str, r)) for r in [("who", "what", "stars", "when", "name"), *rows]
    )
    (folder / name).write_text(text + "\n")
    return dict(dataset="table", data=str(folder / name), columns=NAMES)


@pytest.mark.parametrize(
    "form, sep",
    [("%d/%m/%Y", ","), ("%d.%m.%Y", ","), ("%m/%d/%Y", ";"), ("%b %d %Y", "::"), ("%s", "\t")],
)
def test_a_date_means_the_same_in_every_row(tmp_path, form, sep):
    "Day first, month first or ISO: the same table, or a refusal, and never a swap in some rows."
    iso = run(write_table(tmp_path, "iso.csv"), out=str(tmp_path / "iso"))
    other = write_table(tmp_path, "other.txt", form, sep)
    try:
        a = run(other, out=str(tmp_path / "other"))
    except BadInput as e:
        assert "time_format" in str(e) or "column timestamp" in str(e)
        a = run(other, out=str(tmp_path / "other"), time_format=form)
    days = [pd.to_datetime(read(x)[0].timestamp, unit="ms").dt.floor("D") for x in (iso, a)]
    assert days[0].equals(days[1]) and read(iso)[1].history.map(list).equals(
        read(a)[1].history.map(list)
    )


def test_dates_that_fit_two_orders_are_not_guessed(tmp_path):
    f = tmp_path / "t.csv"
    f.write_text(
        "who,what,stars,when,name\n" + "".join(f"u,{i},3,0{i}/02/2020,T\n" for i in range(1, 8))
    )
    given = dict(dataset="table", data=str(f), columns=NAMES)
    with pytest.raises(BadInput, match="time_format"):
        run(given, out=str(tmp_path / "o"))
    a = run(given, out=str(tmp_path / "o"), time_format="%d/%m/%Y")
    assert pd.to_datetime(read(a)[0].timestamp, unit="ms").dt.month.unique().tolist() == [2]


@pytest.mark.parametrize(
    "name", ["lines.json", "lines.jsonl", "bom.jsonl", "list.txt", "lines.json.gz"]
)
def test_json_under_any_name(tmp_path, name):
    plain = run(write_table(tmp_path, "t.csv"), out=str(tmp_path / "plain"))
    df = pd.read_csv(tmp_path / "t.csv")
    text = df.to_json(orient="records", lines=not name.startswith("list"))
    data = text.encode("utf-8-sig" if name.startswith("bom") else "utf-8")
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    a = run(dataset="table", data=str(tmp_path / name), columns=NAMES, out=str(tmp_path / "o"))
    assert read(a)[0].equals(read(plain)[0])


def test_a_missing_rating_in_parquet_has_its_row(tmp_path):
    write_table(tmp_path, "t.csv")
    df = pd.read_csv(tmp_path / "t.csv").astype(dict(stars="Int64"))
    df.loc[5, "stars"] = pd.NA
    df.to_parquet(tmp_path / "t.parquet")
    given = dict(dataset="table", data=str(tmp_path / "t.parquet"), columns=NAMES)
    with pytest.raises(BadInput, match="row 6, column rating"):
        run(given, out=str(tmp_path / "o"))
    assert run(given, out=str(tmp_path / "o"), skip_bad_rows=True).facts["dropped"] == 1


def test_a_column_that_is_not_there_lists_those_that_are(tmp_path):
    given = write_table(tmp_path, "t.csv", sep=";")
    assert run(given, out=str(tmp_path / "o")).facts["ratings"] == 72
    with pytest.raises(BadInput, match="who, what, stars, when, name"):
        run(given, columns=[*NAMES[:-1], "title=nam"], out=str(tmp_path / "p"))


def test_line_numbers_after_a_newline_in_quotes(tmp_path):
    f = tmp_path / "t.csv"
    row = 'u,{i},{y},2020-01-0{i},"T\n{i}"\n'
    rows = [row.format(i=i, y=9 if i == 5 else 3) for i in range(1, 8)]
    f.write_text("who,what,stars,when,name\n" + "".join(rows))
    with pytest.raises(BadInput, match="row 10, column rating"):
        run(dataset="table", data=str(f), columns=NAMES, out=str(tmp_path / "o"))


SCALES = {"0.5:5": 0.5, "1:10": 1, "0:1": 0.1, "1:5": 0.5, "-10:10": 2}


@pytest.mark.parametrize("scale, step", SCALES.items())
def test_another_scale_is_refused_or_put_in_five_steps(tmp_path, scale, step):
    low, high = map(float, scale.split(":"))
    given = write_table(tmp_path, "t.csv")
    df = pd.read_csv(given["data"])
    levels = np.round(np.arange(low, high + step / 2, step), 3)
    df["stars"] = np.resize(levels, len(df))
    df.to_csv(given["data"], index=False)
    with pytest.raises(BadInput, match="--scale"):
        run(given, out=str(tmp_path / "o"))
    a = run(given, out=str(tmp_path / "o"), scale=scale)
    mapped = read(a)[0].assign(
        what=lambda x: x.item_id.astype(int), who=lambda x: x.user_id.astype(int)
    )
    both = mapped.merge(df, on=["who", "what"]).sort_values("stars")
    assert a.facts["scale"] == json.loads((a / "meta.json").read_text())["scale"] == scale
    assert both.rating.is_monotonic_increasing and set(both.rating) == {1, 2, 3, 4, 5}
    assert both.rating.iloc[0] == 1 and both.rating.iloc[-1] == 5


def test_the_scale_is_named_in_prompts_and_metrics(tmp_path):
    given = write_table(tmp_path, "t.csv")
    df = pd.read_csv(given["data"])
    df.assign(stars=2 * df.stars).to_csv(given["data"], index=False)
    R = run(given, out=str(tmp_path / "reviews"), scale="1:10")
    P = prompts.run(reviews=R, use_long_history=False, out=str(tmp_path / "prompts"))
    system = prompts.open_prompts(P.path)[0]
    assert "from 1 to 10" in system and "five equal steps" in system and P.facts["scale"] == "1:10"
    B = baselines.run(reviews=R, num_trees=2, out=str(tmp_path / "baselines"))
    lines = analyses.make_baseline_lines(B.path, read(R)[1], "mine", "m.json")
    assert {x["settings"]["scale"] for x in lines} == {"1:10"}
    A = answer_only.run(
        prompts=P, model_checkpoint="tiny-qwen", test_rows=2, out=str(tmp_path / "a")
    )
    assert json.loads((A / "metrics.json").read_text())["scale"] == "1:10"
    assert analyses.label_answers(A.path)["settings"]["scale"] == "1:10"


def test_skipped_lines_of_siren_take_what_hangs_on_them(tmp_path):
    "Without its line of history, nothing of a user is left; everything left out is listed."
    for k, v in SIREN.items():
        other = v.replace('"user_id": "u"', '"user_id": "w"')
        broken = v.replace("[3, 4, 5, 1]", '[3, "nan", 5, 1]')
        (tmp_path / f"{k}.jsonl").write_text(broken + other)
    given = dict(dataset="siren", data=str(tmp_path))
    a = run(given, out=str(tmp_path / "o"), skip_bad_rows=True)
    dropped = pd.read_parquet(a / "dropped.parquet")
    assert set(read(a)[0].user_id) == {"w"} and len(read(a)[0]) == 6
    assert sorted(dropped.file) == ["history.jsonl", "test.jsonl", "valid.jsonl"]


def test_lost_ratings_and_empty_splits_are_said(tmp_path, capfd):
    given = write_table(tmp_path, "t.csv")
    run(given, out=str(tmp_path / "quiet"))
    assert "left out" not in capfd.readouterr().err
    run(given, out=str(tmp_path / "o"), min_history=9)
    said = capfd.readouterr().err
    assert "no row in train" in said and "--min_history" in said
    with open(given["data"], "a") as f:
        f.write("".join(f"x{i},y{i},3,2020-01-01,T\n" for i in range(60)))
    run(given, out=str(tmp_path / "core"), k_core=5)
    said = capfd.readouterr().err
    assert "60 of 132 rows were left out" in said and "--k_core" in said
