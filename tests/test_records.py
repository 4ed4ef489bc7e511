"Tables from outside: what a file says, or one line about why it says nothing certain."

import gzip
import io
import json
import zipfile
from datetime import datetime

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recnb import records as r
from recnb.stages import BadInput
from recnb.times import convert_times
from recnb.values import convert_ids, convert_numbers

TABLE = pd.DataFrame(
    dict(
        who=["ann", "bob", "Zoë"],
        where=["a", "b, c", 'd "e"'],
        when=["2012-04-03 18:00:09", "2012-04-04 09:30:00", "2012-05-13 00:00:00"],
    )
)


def read(file, columns=("who", "where", "when"), skip=False, **reading):
    bad = r.BadRows(skip)
    df = r.read_columns(file, list(columns), r.Reading(**reading), bad)
    return bad.drop_from(df), bad


def to_zip(text):
    "A zip archive as macOS makes it."
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as z:
        for name in ("a.csv", "__MACOSX/._a.csv", ".DS_Store"):
            z.writestr(name, text if name == "a.csv" else b"\0")
    return packed.getvalue()


def to_bytes(sep=",", encoding="utf-8", **kw):
    return TABLE.to_csv(index=False, sep=sep, **kw).encode(encoding)


def save(kind, **kw):
    "The bytes of the table as JSON or Parquet."
    packed = io.BytesIO()
    getattr(TABLE, f"to_{kind}")(packed, **kw)
    return packed.getvalue()


FILES = {
    "a.csv": to_bytes(),
    "semicolons.csv": to_bytes(";"),
    "bars.txt": to_bytes("|"),
    "bom.csv": to_bytes(encoding="utf-8-sig"),
    "utf16.csv": to_bytes(encoding="utf-16"),
    "windows.csv": to_bytes(lineterminator="\r\n"),
    "blank.csv": to_bytes() + b"\n\n",
    "a.csv.gz": gzip.compress(to_bytes()),
    "gzip.csv": gzip.compress(to_bytes()),
    "a.zip": to_zip(to_bytes()),
    "list.json": save("json", orient="records"),
    "lines.json": save("json", orient="records", lines=True),
    "lines.jsonl.gz": gzip.compress(save("json", orient="records", lines=True)),
    "bom.jsonl": b"\xef\xbb\xbf" + save("json", orient="records", lines=True),
    "pretty.json": save("json", orient="records", indent=2),
    "columns.json": save("json"),
    "a.parquet": save("parquet"),
    "parquet": save("parquet"),
    "a.parquet.gz": gzip.compress(save("parquet")),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_table(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    df, _ = read(tmp_path / name)
    pd.testing.assert_frame_equal(df[list(TABLE)].astype("str"), TABLE.astype("str"))
    first = 2 if name.endswith((".csv", ".txt", ".csv.gz", ".zip")) else 1
    assert df.source_row.tolist() == [first, first + 1, first + 2]


def test_a_file_without_quotes_between_tabs_or_double_colons(tmp_path):
    (tmp_path / "tab.tsv").write_text('who\twhere\tcount\n1\t5" pipe\t3\n')
    assert read(tmp_path / "tab.tsv", ["where"])[0]["where"][0] == '5" pipe'
    (tmp_path / "colons.dat").write_text(
        "who::what::name\n1::2::Heat: a film\n3::4::Ran\n", "utf-8"
    )
    df, bad = read(tmp_path / "colons.dat", ["what", "name"])
    assert df.name.tolist()[0] == "Heat: a film" and df.what.tolist() == ["2", "4"]


def test_a_separator_is_never_split_between_two_reads(tmp_path):
    for pad in (65520, 1 << 20):
        rows = "".join(f"{i}::{'x' * 7}\n" for i in range(pad // 4))
        (tmp_path / "long.dat").write_text("a::b\n" + rows)
        df, _ = read(tmp_path / "long.dat", ["a", "b"], separator="::")
        assert len(df) == pad // 4 and (df.b == "x" * 7).all()


REFUSED = {
    "columns that are not there": (
        b"who,wher,when\n1,2,3\n",
        "row 1: expected a column named where (did you mean 'wher",
        "there are who, wher, when",
    ),
    "a column twice": (b"who,who,where,when\n1,1,2,3\n", "column who", "only once"),
    "latin": ("who,where,when\n1,2,3\n1,Café,3\n".encode("latin-1"), "row 3", "utf-8 text"),
    "cut gzip": (gzip.compress(bytes(range(256)) * 99)[:-40], "whole archive", ""),
    "cut list": (b'[{"who": 1, "where": 2, "when": 3}, {"who"', "row 1", "JSON"),
    "cut line": (b'{"who": 1, "where": 2, "when": 3}\n{"who"', "row 2", "JSON"),
    "no object": (b'{"who": 1, "where": 2, "when": 3}\n7\n', "row 2: found '7'", "one JSON object"),
    "deep": (b"[" * 200_000, "sensible size", ""),
    "many digits": (b'{"who": ' + b"1" * 5000 + b"}", "JSON", ""),
    "cut Parquet": (FILES["a.parquet"][:-30], "a file that can be read", ""),
    "two in a zip": (
        FILES["a.zip"].replace(b"__MACOSX/._a.csv", b"another/folder/x"),
        "one file",
        "a.csv",
    ),
    "header only": (b"who,where,when\n", "at least one row", ""),
    "nothing": (b"", "the file is empty", ""),
    "too few": (b"who,where,when\n1,2,3\n1,2\n", "row 3: found '1,2'", "as many fields"),
    "too many": (b"who,where,when\n1,2,3\n1,2,3,4\n", "row 3", "as many fields"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_one_line_for_a_broken_file(tmp_path, name):
    content, *said = REFUSED[name]
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(BadInput) as e:
        read(tmp_path / "x")
    text = str(e.value)
    assert "\n" not in text and all(s in text for s in said), text
    assert str(tmp_path / "x") in text


def test_rows_are_lines_after_line_breaks_in_quotes_blank_lines_and_bad_rows(tmp_path):
    text = 'who,note,when\n1,"a\nb\nc",t\n\n2,,t\n3,t\n4,"""x""\n",t\n5,,t,t\n6,,t\n'
    (tmp_path / "x.csv").write_text(text)
    lines = text.split("\n")
    df, bad = read(tmp_path / "x.csv", ["who", "when"], skip=True)
    assert df.who.tolist() == ["1", "2", "4", "6"] and df.source_row.tolist() == [2, 6, 8, 11]
    assert bad.to_frame().source_row.tolist() == [7, 10]
    assert [lines[n - 1][0] for n in df.source_row] == ["1", "2", "4", "6"]


cell = st.text(st.sampled_from('ab1 ,"\n\té'), max_size=6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(cell, cell), min_size=1, max_size=12), st.integers(16, 400))
def test_what_is_written_is_read(tmp_path_factory, rows, part):
    "Any text in quotes comes back, and stands on the line where an editor shows it."
    file = tmp_path_factory.mktemp("t") / "x.csv"
    df = pd.DataFrame(rows, columns=["a", "b"]).assign(c="x")
    text = df.to_csv(index=False)
    file.write_text(text, newline="")
    got = r.read_text(file, ["a", "b"], r.BadRows(), separator=",", part_size=max(part, 64))
    assert got[["a", "b"]].values.tolist() == df[["a", "b"]].values.tolist()
    before = np.cumsum([0, *(1 + a.count("\n") + b.count("\n") for a, b in rows[:-1])])
    assert got.source_row.tolist() == (2 + before).tolist()


def test_an_unclosed_quote_loses_no_line_without_a_word(tmp_path):
    (tmp_path / "x.csv").write_text('who,where\n1,a\n2,"b\n3,c\n4,"d"\n5,e\n6,""\n')
    with pytest.raises(BadInput, match="row 3.*closed"):
        read(tmp_path / "x.csv", ["who", "where"])
    (tmp_path / "x.csv").write_text('who,where\n1,a\n2,"b\n3,c\n4,d\n')
    df, bad = read(tmp_path / "x.csv", ["who", "where"], skip=True)
    assert df.who.tolist() == ["1"] and bad.to_frame().source_row.tolist() == [3, 4, 5, 6]
    (tmp_path / "x.csv").write_text('who,where\n1,5" pipe\n2,b\n')  # an inch, and no line break
    assert read(tmp_path / "x.csv", ["where"])[0]["where"].tolist() == ['5" pipe', "b"]


def times(values, skip=False, **kw):
    df = pd.DataFrame(dict(t=pd.Series(values, dtype=object))).assign(
        source_file="f", source_row=range(1, len(values) + 1)
    )
    return convert_times(df, "t", r.BadRows(skip), **kw)


MOMENT = pd.Timestamp("2012-04-13 18:00:09")
WRITTEN = [
    "%Y-%m-%d %H:%M:%S",
    "%Y-%m-%dT%H:%M:%S",
    "%Y/%m/%d %H:%M:%S",
    "%d/%m/%Y %H:%M:%S",
    "%m/%d/%Y %H:%M:%S",
    "%d.%m.%Y %H:%M:%S",
    "%d-%m-%Y %H:%M:%S",
    "%m/%d/%Y %I:%M:%S %p",
    "%b %d, %Y, %I:%M:%S %p",
    "%d %B %Y %H:%M:%S",
    "%Y%m%d%H%M%S",
    "%a %b %d %H:%M:%S %Y",
]


@pytest.mark.parametrize("form", WRITTEN)
def test_a_format_is_found_for_a_whole_column(form):
    days = [MOMENT + pd.Timedelta(days=d) for d in range(0, 60, 7)]
    t = times([d.strftime(form) for d in days])
    assert t.wall.tolist() == days and t.utc is None


moments = st.datetimes(pd.Timestamp("1991-01-01"), pd.Timestamp("2099-01-01"))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.lists(moments, min_size=1, max_size=6),
    st.sampled_from([*WRITTEN, "%d/%m/%Y", "%m-%d-%Y", "%Y%m%d", "%Y%m%d%H%M", "%Y%m%d%H"]),
)
def test_a_column_is_read_right_or_refused(found, form):
    written = [t.strftime(form) for t in found]
    try:
        t = times(written)
    except BadInput as e:
        assert "--time_format" in str(e)
        t = times(written, time_format=form)
    assert t.wall.tolist() == [pd.Timestamp(datetime.strptime(x, form)) for x in written]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_a_unit_is_found_for_a_whole_column(unit):
    number = MOMENT.value // dict(s=10**9, ms=10**6, us=1000, ns=1)[unit]
    for values in ([number], [str(number)], [f"{number}.0"], [float(number)]):
        assert times(values).wall[0] == MOMENT and times(values).in_utc


def test_what_is_not_certain_is_refused_and_can_be_named():
    with pytest.raises(
        BadInput, match="row 1, column t: found '3/4/2012'.*--time_format.*%d/%m/%Y"
    ):
        times(["3/4/2012", "5/6/2012"])
    assert times(["3/4/2012"], time_format="%d/%m/%Y").wall[0] == pd.Timestamp("2012-04-03")
    assert times(["3/3/2012"]).wall[0] == pd.Timestamp("2012-03-03")  # either way
    with pytest.raises(BadInput, match="row 3"):  # a month-first row in a day-first column
        times(["13/4/2012", "3/4/2012", "4/13/2012", "14/4/2012"], skip=True)
    with pytest.raises(BadInput, match="strptime"):
        times(["3/4/2012"], time_format="%Q")
    with pytest.raises(BadInput, match="--time_format 's' or '%Y%m%d%H'|'%Y%m%d%H' or 's'"):
        times(["2012040318", "2012110309"])  # an hour, or a second of 2033
    assert times(["20121103"]).wall[0] == pd.Timestamp("2012-11-03")
    assert times(["201211031234"]).wall[0] == pd.Timestamp("2012-11-03 12:34")


@pytest.mark.parametrize(
    "value",
    [
        "inf",
        "-1",
        "0",
        "nan",
        "",
        "2012",
        "2012-04",
        "99999999999999999999",
        "1e400",
        "20",
        "-62135596800000",
        "9999-12-31",
        "0201-01-01",
        "12/13/14",
        "2012-04-03 25:00",
        "\ud83d",
        [],
    ],
)
def test_no_value_becomes_another_century(value):
    with pytest.raises(BadInput, match="row 2, column t.*from 1990 to 2100"):
        times(["2012-04-03 18:00:09", value, "2012-04-03 18:00:09"])
    with pytest.raises(BadInput, match="row 2, column t"):
        times([1333476009, value, 1333476010])
    assert times([1333476009, value, 1333476010], skip=True).wall.notna().tolist() == [
        True,
        False,
        True,
    ]


def test_an_offset_keeps_the_wall_clock():
    t = times(["2012-04-03 09:42:49-04:00", "2012-11-13 09:42:49-05:00"])
    assert t.wall[0] == pd.Timestamp("2012-04-03 09:42:49") and not t.in_utc
    assert t.utc.tolist() == [
        pd.Timestamp("2012-04-03 13:42:49"),
        pd.Timestamp("2012-11-13 14:42:49"),
    ]
    zone = pd.Series(t.utc).dt.tz_localize("UTC").dt.tz_convert("America/New_York")
    df = pd.DataFrame(dict(t=zone, source_file="f", source_row=[1, 2]))
    same = convert_times(df, "t", r.BadRows())
    assert same.wall.tolist() == t.wall.tolist() and same.utc.tolist() == t.utc.tolist()
    assert times(["Tue, 03 Apr 2012 18:00:09 +0900"]).utc[0] == pd.Timestamp("2012-04-03 09:00:09")
    for utc in ("2012-04-03T18:00:09Z", "2012-04-03 18:00:09 UTC", "2012-04-03 18:00:09+00:00"):
        assert times([utc]).in_utc


def test_a_day_is_no_offset():
    t = times(["2012-04-03", "2012-05-13 10:00", "2012-04-03T18"])
    assert t.utc is None and [str(x) for x in t.wall] == [
        "2012-04-03 00:00:00",
        "2012-05-13 10:00:00",
        "2012-04-03 18:00:00",
    ]
    assert times(["2012-4-3 6:00 PM"]).wall[0] == pd.Timestamp("2012-04-03 18:00")


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.datetimes(pd.Timestamp("1990-01-02"), pd.Timestamp("2100-12-30")),
    st.sampled_from(["", "Z", " UTC", "+00:00", "-03:00", "+05:30", "-0330", "+09"]),
    st.sampled_from(["T", " "]),
    st.sampled_from(["minutes", "seconds", "milliseconds", "microseconds"]),
)
def test_iso_times_are_those_of_the_standard_library(moment, zone, between, detail):
    text = moment.isoformat(between, detail) + zone
    t = times([text])
    wanted = datetime.fromisoformat(text.replace(" UTC", "Z"))
    assert t.wall[0] == pd.Timestamp(wanted.replace(tzinfo=None))
    assert (t.utc is None) == (wanted.tzinfo is None)
    if wanted.tzinfo:
        assert t.utc[0].tz_localize("UTC") == pd.Timestamp(wanted)


def test_zones_are_not_mixed():
    with pytest.raises(BadInput, match="row 3.*without a zone"):
        times(["2012-04-03 18:00", "2012-04-03 18:00", "2012-04-03T18:00:09Z"])


def test_whole_numbers_stay_whole_where_some_are_missing(tmp_path):
    df = pd.DataFrame(dict(who=pd.array([1, None], "Int64"), old=[7.0, np.nan], t=[1, 2]))
    df.set_index("t").to_parquet(tmp_path / "x.parquet")
    got, bad = read(tmp_path / "x.parquet", ["who", "old", "t"], skip=True)
    assert convert_ids(got, "who", bad)[0] == "1" and convert_ids(got, "old", bad)[0] == "7"
    assert bad.to_frame().values.tolist() == [
        [str(tmp_path / "x.parquet"), 2, "who: expected an id"]
    ]
    (tmp_path / "x.json").write_text(json.dumps([dict(who=1), dict(who=None), dict(who=2)]))
    got, bad = read(tmp_path / "x.json", ["who"], skip=True)
    assert convert_ids(got, "who", bad).tolist() == ["1", "", "2"]


@pytest.mark.parametrize(
    "value", ["a\0b", "a\nb", "a\x1bb", "a\x85b", " ", "\ud83d", None, ["a"], {"a": 1}]
)
def test_an_id_is_a_plain_text(value):
    df = pd.DataFrame(
        dict(i=pd.Series(["a", value], dtype=object), source_file="f", source_row=[1, 2])
    )
    with pytest.raises(BadInput, match="f, row 2, column i"):
        convert_ids(df, "i", r.BadRows())


def test_rows_in_another_encoding_are_left_out_or_read(tmp_path):
    (tmp_path / "x.csv").write_bytes("who,where\n1,Café\n2,Bar\n3,Café\n".encode("cp1252"))
    df, bad = read(tmp_path / "x.csv", ["who", "where"], skip=True)
    assert df.source_row.tolist() == [3] and bad.to_frame().source_row.tolist() == [2, 4]
    assert read(tmp_path / "x.csv", ["where"], encoding="cp1252")[0]["where"][0] == "Café"
    (tmp_path / "x.csv").write_bytes(("who,where\n" + "1,Café\n2,Bar\n" * 10).encode("cp1252"))
    with pytest.raises(BadInput, match="encoding named, as cp1252; 10 lines are not"):
        read(tmp_path / "x.csv", ["who", "where"], skip=True)  # not left out, a third of a file
    for wrong in ("utf-99", "base64", "rot13", ""):
        if wrong:
            with pytest.raises(BadInput, match="column encoding"):
                read(tmp_path / "x.csv", ["where"], encoding=wrong)


def test_a_bad_row_says_how_many_are_like_it(tmp_path):
    "One line: the first row at fault, and the number of the others; of a streamed part, none."
    table = tmp_path / "a.csv"
    table.write_text("x\n1\n" + "two\n" * 1200)
    bad = r.BadRows()
    df = r.read_columns(table, ["x"], r.Reading(), bad)
    with pytest.raises(BadInput, match="row 3, column x: found 'two'.*; 1,199 more rows like it$"):
        convert_numbers(df, "x", bad)
    with pytest.raises(BadInput, match="expected a digit$"):
        bad.mark(df, df.x == "two", "x", "a digit", more_to_come=True)
    with pytest.raises(BadInput, match="expected a digit$"):
        bad.mark(df, df.source_row == 7, "x", "a digit")
