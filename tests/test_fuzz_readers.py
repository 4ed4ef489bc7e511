"""Mangled files: every reader of both tasks gives right rows, or one line that says what is wrong.

A small source is mangled: cut, bytes flipped, fields replaced, columns lost, recoded, packed.
A line that was not touched must be read as it was before, or the file be refused in one line.
"""

import bz2
import decimal
import gzip
import io
import json
import math
import random
import re
import zlib
from itertools import product
from pathlib import Path

import pandas as pd
import pytest

from recnb.poi import checkins
from recnb.rating import reviews
from recnb.stages import BadInput

ROUNDS = 3  # mangled files for each way and rule, shared by the sources of a reader
ODD = [
    *("", " ", "nan", "inf", "-inf", "-1", "0", "1e400", "9" * 30, "1.5", "true", "null", "None"),
    *(
        "2020-13-45",
        "31/12/2019",
        "20200101",
        "1600000000",
        "-62135596800000",
        "é",
        "\x00",
        "\u200b",
    ),
    *('"', "'", "a,b", "a\tb", "[]", "{}", "[1, 2]", '{"a": 1}', "x" * 300, "\ud83d", "=1+1", "\\"),
]
BYTES = [b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\n", b"\r", b'"', b",", b"\t", b"\x1a", b"{", b"["]


def cut(data, rng):
    return data[: rng.randrange(len(data) + 1)]


def flip(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if data:
            data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def insert(data, rng):
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.choice(BYTES) * rng.choice((1, 1, 3)) + data[at:]


def remove(data, rng):
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[:a] + data[min(b, a + 40) :]


def replace_field(data, rng):
    "One field of one line, by something odd."
    lines = data.split(b"\n")
    i = rng.randrange(len(lines))
    for sep in (b"\t", b"|", b",", b";"):
        if sep in lines[i]:
            fields = lines[i].split(sep)
            fields[rng.randrange(len(fields))] = rng.choice(ODD).encode("utf-8", "surrogatepass")
            lines[i] = sep.join(fields)
            break
    return b"\n".join(lines)


def replace_value(data, rng):
    "One value of one JSON record, by something odd of any type."
    lines = data.split(b"\n")
    i = rng.randrange(len(lines))
    try:
        record = json.loads(lines[i])
    except ValueError:
        return replace_field(data, rng)
    one = rng.choice(record) if isinstance(record, list) and record else record
    if not isinstance(one, dict) or not one:
        return b"[]"
    key = rng.choice(list(one))
    odd = [
        *ODD,
        None,
        True,
        0,
        -1,
        1e300,
        10**25,
        float("nan"),
        float("inf"),
        [],
        [[]],
        {},
        ["a", 1],
    ]
    one[key] = rng.choice(odd)
    if rng.random() < 0.2:
        del one[key]
    lines[i] = json.dumps(record).encode()
    return b"\n".join(lines)


def move_lines(data, rng):
    lines = data.split(b"\n")
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    return b"\n".join(rng.choice((lines[:i] + lines[i + 1 :], [*lines[:i], lines[j], *lines[i:]])))


def drop_column(data, rng):
    sep = rng.choice((b"\t", b",", b"|"))
    k = rng.randrange(6)
    lines = [line.split(sep) for line in data.split(b"\n")]
    return b"\n".join(sep.join(x[:k] + x[k + 1 :]) for x in lines)


def recode(data, rng):
    text = data.decode(errors="replace")
    names = ("utf-8-sig", "utf-16", "utf-16-le", "latin-1", "cp1251", "shift_jis", "utf-7")
    return text.encode(rng.choice(names), errors="replace")


def pack(data, rng):
    packed = rng.choice((gzip.compress(data, mtime=0), bz2.compress(data)))
    return packed if rng.random() < 0.5 else flip(cut(packed, rng), rng)


def end_lines(data, rng):
    return data.replace(b"\n", rng.choice((b"\r\n", b"\n\n", b"\n \n", b"\r")))


def change_type(data, rng):
    "A column of a Parquet file as another type."
    df = pd.read_parquet(io.BytesIO(data))
    c = rng.choice(list(df))
    x = df[c]
    n = pd.Series(range(len(df)))
    odd = [
        n,
        n.where(n != 3),
        n.astype("Int64").where(n != 3),
        n + 1.6e9,
        (n + DAY) * 10**9,
        n > 3,
        pd.to_datetime(n + DAY, unit="s"),
        pd.to_datetime(n + DAY, unit="s").dt.tz_localize("America/New_York"),
        pd.to_datetime(n + DAY, unit="s").where(n != 3).dt.date,
        pd.to_timedelta(n, unit="s"),
        x.astype("category"),
        x.where(n != 3),
        x.map(str.encode),
        x.map(lambda v: [v, None]),
        x.map(lambda v: dict(a=v)),
        x.map(lambda v: None),
        n.map(lambda v: decimal.Decimal(v) / 3),
        pd.Series(rng.choice((math.nan, math.inf, -1.0, 2.0**70)), n.index),
        x.map(lambda v: rng.choice(ODD[:-3])),
    ]
    df[c] = rng.choice(odd)
    if rng.random() < 0.2:
        df = df.set_index(rng.choice(list(df)))
    out = io.BytesIO()
    df.to_parquet(out)
    return out.getvalue()


WAYS = (cut, flip, insert, remove, replace_field, replace_value, move_lines, drop_column, recode)
WAYS += (pack, end_lines)


# Small sources that are read whole, one a reader.
USERS, ITEMS = range(1, 5), range(1, 6)
PAIRS = [(u, i) for u in USERS for i in ITEMS]
DAY = 1_600_000_000
MOMENTS = {(u, i): pd.Timestamp(DAY + 86_400 * u + 3_600 * i, unit="s") for u, i in PAIRS}
TWITTER = "%a %b %d %H:%M:%S +0000 %Y"


def join(sep, *rows):
    return "".join(sep.join(map(str, r)) + "\n" for r in rows).encode()


def json_lines(*records):
    return "".join(json.dumps(r) + "\n" for r in records).encode()


def rate(u, i):
    return 1 + (u * i) % 5


def make_amazon():
    reviews = [
        dict(
            user_id=f"u{u}",
            parent_asin=f"i{i}",
            rating=float(rate(u, i)),
            timestamp=1000 * (DAY + 9 * u + i),
        )
        for u, i in PAIRS
    ]
    items = [
        dict(parent_asin=f"i{i}", title=f"Títle {i}", categories=["Toys", "Cars"]) for i in ITEMS
    ]
    return {"Toys.jsonl": json_lines(*reviews), "meta_Toys.jsonl": json_lines(*items)}


def make_movielens():
    rows = [(u, i, rate(u, i), DAY + 9 * u + i) for u, i in PAIRS]
    items = [(i, f"Films {i} (1995)", "01-Jan-1995", "", "http", *[0, 1] * 9, 0) for i in ITEMS]
    return {"u.data": join("\t", *rows), "u.item": join("|", *items)}


def make_exp3rt():
    return [
        dict(
            reviewerID=f"u{u}",
            asin=f"i{i}",
            overall=rate(u, i),
            unixReviewTime=DAY + 9 * u + i,
            title=f"B {i}",
        )
        for u, i in PAIRS
    ]


def make_siren():
    history = [
        dict(
            user_id=f"u{u}",
            history="\n".join(f"Títle {i}, A|B, {rate(u, i)}" for i in (1, 2, 3)),
            history_asins=["i1", "i2", "i3"],
            history_ratings=[rate(u, i) for i in (1, 2, 3)],
        )
        for u in USERS
    ]

    def rows(i):
        return json_lines(
            *(
                dict(
                    user_id=f"u{u}",
                    parent_asin=f"i{i}",
                    label=float(rate(u, i)),
                    target=f"Títle {i}, A",
                )
                | dict(timestamp=1000 * (DAY + i))
                for u in USERS
            )
        )

    out = {f"{name}.jsonl": rows(i) for name, i in (("train", 3), ("valid", 4), ("test", 5))}
    return {"history.jsonl": json_lines(*history)} | out


RATED = [(f"u{u}", f"i{i}", rate(u, i), MOMENTS[u, i], f"Café {i}") for u, i in PAIRS]
COLUMNS = ["user_id", "item_id", "rating", "timestamp", "title"]


def make_tsmc():
    rows = [
        (u, f"v{i}", f"c{i}", "Café", 40 + i / 9, -74, -240, MOMENTS[u, i].strftime(TWITTER))
        for u, i in PAIRS
    ]
    return {"dataset_TSMC2014_NYC.txt": join("\t", *rows).decode().encode("latin-1")}


def make_tist():
    rows = [(u, f"v{i}", MOMENTS[u, i].strftime(TWITTER), 180) for u, i in PAIRS]
    venues = [(f"v{i}", 55.75 + i / 999, 37.6, "Bar", "RU") for i in ITEMS]
    return {
        "dataset_TIST2015_Checkins.txt": join("\t", *rows),
        "dataset_TIST2015_POIs.txt": join("\t", *venues),
        "dataset_TIST2015_Cities.txt": join(
            "\t", ("Moscow", 55.75, 37.6, "RU", "Russia", "Capital")
        ),
    }


def make_gowalla():
    rows = [(u, f"{MOMENTS[u, i]:%Y-%m-%dT%H:%M:%SZ}", 40 + i / 9, -74, i) for u, i in PAIRS]
    spots = [(i, f"\"[{{'url': '/categories/{i}', 'name': 'Bar'}}]\"") for i in ITEMS]
    return {
        "loc-gowalla_totalCheckins.txt": join("\t", *rows),
        "gowalla_spots_subset1.csv": join(",", ("id", "spot_categories"), *spots),
    }


def make_getnext():
    head = "user_id POI_id POI_catid POI_catname latitude longitude".split()
    head += ["UTC_time", "local_time", "trajectory_id"]
    out = {}
    for split, items in dict(train=(1, 2, 3, 4), test=(5,)).items():
        rows = [
            (
                u,
                f"v{i}",
                f"c{i}",
                "Café",
                40 + i / 9,
                -74,
                f"{MOMENTS[u, i]}+00:00",
                f"{MOMENTS[u, i]}+00:00",
                f"{u}_{i}",
            )
            for u, i in PAIRS
            if i in items
        ]
        out[f"NYC_{split}.csv"] = join(",", head, *rows)
    return out


def make_llm4poi():
    head = "UserId PoiId PoiCategoryId PoiCategoryName Latitude Longitude".split()
    head += ["UTCTimeOffset", "pseudo_session_trajectory_id"]
    out = {}
    for split, items in dict(train=(1, 2, 3), validate=(4,), test=(5,)).items():
        rows = [
            (u, i, 7, "Café", 40 + i / 9, -74, MOMENTS[u, i], u) for u, i in PAIRS if i in items
        ]
        out[f"{split}_sample.csv"] = join(",", head, *rows)
    return out


VISITS = [(f"u{u}", f"v{i}", MOMENTS[u, i], f"Café {i}", 40 + i / 9) for u, i in PAIRS]
VISIT_COLUMNS = ["user", "poi", "time", "category", "latitude"]


def make_parquet(columns, rows):
    out = io.BytesIO()
    pd.DataFrame([tuple(map(str, r)) for r in rows], columns=columns).to_parquet(out, index=False)
    return out.getvalue()


def make_tables(columns, rows):
    "One table in several kinds of file."
    records = [dict(zip(columns, map(str, r))) for r in rows]
    return [
        {"t.csv": join(",", columns, *rows)},
        {"t.txt": join("\t", columns, *rows)},
        {"t.data": join(";", columns, *rows)},
        {"t.json": json_lines(*records)},
        {"list.json": json.dumps(records).encode()},
        {"t.parquet": make_parquet(columns, rows)},
    ]


READERS = dict(  # dataset, and the files of each of its sources
    amazon=("amazon", [make_amazon()]),
    movielens=("ml-100k", [make_movielens()]),
    exp3rt=(
        "exp3rt",
        [{"x.json": json.dumps(make_exp3rt()).encode()}, {"x.jsonl": json_lines(*make_exp3rt())}],
    ),
    siren=("siren", [make_siren()]),
    ratings=("table", make_tables(COLUMNS, RATED)),
    tsmc=("nyc", [make_tsmc()]),
    tist=("moscow", [make_tist()]),
    gowalla=("gowalla", [make_gowalla()]),
    getnext=("nyc", [make_getnext()]),
    llm4poi=("tky", [make_llm4poi()]),
    visits=("table", make_tables(VISIT_COLUMNS, VISITS)),
)
RATINGS = ("amazon", "movielens", "exp3rt", "siren", "ratings")


def read_ratings(dataset, data, skip):
    "The rows of a source, where they stood, and what was left out."
    p = reviews.Params(
        out="", dataset=dataset, data=data, k_core=0, skip_bad_rows=skip, duplicates="drop"
    )
    df, left, _ = reviews.read_usable_ratings(p)
    if len(df):
        assert df.rating.isin([1, 2, 3, 4, 5]).all() and (df.title.str.strip() != "").all()
        assert (df.user_id.str.strip() != "").all() and (df.item_id.str.strip() != "").all()
        times = df.timestamp.dropna()
        assert times.between(6e11, 4.2e12).all() or times.tolist() == list(range(len(times)))
    own = df[["user_id", "item_id", "rating", "timestamp", "title"]]
    return own, df, left


def read_visits(dataset, data, skip):
    "The check-ins of a source, where they stood, and what was left out."
    columns = [f"{c}={c}" for c in VISIT_COLUMNS] if dataset == "table" else []
    loose = dict(min_poi_freq=0, min_user_freq=0, isolation_minutes=1e7, duplicates="keep")
    p = checkins.Params(dataset, "", data, columns=columns, skip_bad_rows=skip, **loose)
    df, dropped, *_ = checkins.prepare_checkins(p)
    assert df.local_time.dt.year.between(1990, 2100).all()
    assert df.latitude.dropna().between(-90, 90).all()
    for c in ("user", "poi"):
        assert (df[c].notna() & (df[c].astype(str).str.strip() != "")).all()
    own = df[["user", "poi", "local_time", "latitude", "category"]]
    return own, df, dropped


def read_source(name, folder, files, skip):
    data = folder / next(iter(files)) if len(files) == 1 else folder
    return (read_ratings if name in RATINGS else read_visits)(READERS[name][0], str(data), skip)


def split_rows(data):
    "What each row of a file says, by its line (of a JSON list, by its number)."
    if data[:4] == b"PAR1":
        return []
    try:
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        data = bz2.decompress(data) if data[:3] == b"BZh" else data
    except (OSError, EOFError, ValueError, zlib.error):
        return []
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = data.decode("utf-16", errors="replace")
    else:
        text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape")
    if not text.lstrip().startswith("["):
        return re.split("\r\n|\r|\n", text)
    try:
        return [json.dumps(x) for x in json.loads(text)]
    except (ValueError, RecursionError):
        return []


def tell_rows(own, df, columns):
    "File and line → what was read there."
    out = {}
    where = zip(df.source_file.astype(str), df.source_row.astype(int))
    for (file, row), values in zip(
        where, own[own.columns[:columns]].astype(str).itertuples(index=False)
    ):
        out.setdefault((Path(file).name, row), []).append(tuple(values))
    return {k: sorted(v) for k, v in out.items()}


def write_sources(name, folder):
    "Each source of a reader: its folder, its files, and what it says when nothing is wrong."
    out = []
    for i, files in enumerate(READERS[name][1]):
        place = folder / f"{i}"
        place.mkdir()
        for file, data in files.items():
            (place / file).write_bytes(data)
        own, df, left = read_source(name, place, files, False)
        assert len(df) == len(PAIRS) and not len(left), name
        out.append((place, files, {k: tell_rows(own, df, k) for k in (3, 5)}))
    return out


def check_mangled(name, source, seed, way, skip):
    "Read a source of which one file was mangled."
    rng = random.Random(seed)
    folder, files, original = source
    file = rng.choice(list(files))
    typed = file.endswith("parquet") and rng.random() < 0.7
    data = (change_type if typed else way)(files[file], rng)
    (folder / file).write_bytes(data)
    try:
        own, df, left = read_source(name, folder, files, skip)
    except BadInput as e:
        said = str(e)
        assert "\n" not in said and len(said) < 1500 and said.isprintable(), said
        row = re.search(r", row (\d+)", said)  # with skip, no row but a header may stop it
        if skip and row and file not in ("x.json", "list.json") and "--time_format" not in said:
            header = int(row[1]) == 1 or "expected a column" in said  # after blank lines
            assert typed or header, said
        return 0
    finally:
        (folder / file).write_bytes(files[file])
    main = file == next(iter(files)) and name != "siren"
    old, new = split_rows(files[file]), split_rows(data)
    whole = main and name != "tist" and old[:1] == new[:1]  # a header may lose an optional column
    columns = 5 if whole else 3
    before, after = original[columns], tell_rows(own, df, columns)
    for (f, row), values in after.items():
        same = f != file or row <= min(len(old), len(new)) and old[row - 1] == new[row - 1]
        if same and (f, row) in before:
            assert values == before[f, row], (file, way, f, row, values, before[f, row])
    return len(df)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", READERS)
def test_a_mangled_file_is_read_right_or_refused_in_one_line(name, tmp_path):
    "Each source in every way, bad rows refused and skipped."
    sources = write_sources(name, tmp_path)
    read = []
    for i, (way, skip) in product(range(ROUNDS), product(WAYS, (False, True))):
        seed = f"{name}, {way.__name__}, {i}, {skip}"
        try:
            read.append(check_mangled(name, sources[i % len(sources)], seed, way, skip))
        except Exception as e:
            e.add_note(seed)
            raise
    assert any(read) and not all(read)
