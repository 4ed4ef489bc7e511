"Reading check-ins: what a good file gives, and the one line that a broken one gets."

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from recnb.poi import checkins as c
from recnb.poi import sources
from recnb.records import BadRows
from recnb.stages import BadInput

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("RECNB_DATA") or ROOT / "../shared/data")
HEAD = "user_id,POI_id,POI_catid,POI_catname,latitude,longitude,UTC_time,local_time,trajectory_id\n"
nyc_data = pytest.mark.skipif(
    not (DATA / "nyc/NYC_test.csv.gz").exists(),
    reason=f"the NYC files are not in {DATA}; RECNB_DATA names another place",
)


def line(
    user=1, poi="p1", cat="c1", name="Bar", lat="40.7", lon="-74.0", day=3, hour=18, traj="1_0"
):
    utc, local = f"2012-04-{day:02} {hour:02}:00:09", f"2012-04-{day:02} {hour - 4:02}:00:09"
    return f"{user},{poi},{cat},{name},{lat},{lon},{utc}+00:00,{local},{traj}\n"


def city(folder, **change):
    "A folder with three small GETNext files; `change` replaces the bytes of one."
    folder.mkdir(exist_ok=True)
    text = dict(
        train=HEAD
        + line(poi="p2")
        + line(2, day=4)
        + line(10, "p3", "c2", '"Café, quiet"', traj="10_0"),
        val=HEAD + line(day=5),
        test=HEAD + line(day=6) + line(99, "p9", day=7),
    )
    for part, t in text.items():
        (folder / f"NYC_{part}.csv").write_bytes(change.get(part, t.encode()))
    return folder


def run(out, **kw):
    return c.run({k: str(v) if isinstance(v, Path) else v for k, v in kw.items()}, out=str(out))


def cli(module, *args, **env):
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | env,
    )


def test_getnext_ids_are_ranks_of_train(tmp_path):
    a = run(tmp_path / "out", dataset="nyc", data=city(tmp_path / "d"))
    t = pd.read_parquet(a / "checkins.parquet")
    assert t.user_id.tolist() == [0, 1, 2, 0, 0, -1]  # 1, 2, 10 as numbers
    assert t.poi_id.tolist() == [1, 0, 2, 0, 0, -1]
    assert t.category.tolist()[2] == "Café, quiet" and t.source_row.tolist() == [2, 3, 4, 2, 2, 3]
    assert t.split.tolist() == ["train"] * 3 + ["validation", "test", "test"]
    assert t.utc_time[0] == pd.Timestamp("2012-04-03 18:00:09", tz="UTC") and t.local_time[
        0
    ] == pd.Timestamp("2012-04-03 14:00:09")
    assert pd.read_parquet(a / "users.parquet").source_id.tolist() == ["1", "2", "10"]
    assert (
        json.loads((a / "meta.json").read_text())["id_bound"] == 4
    )  # as published for NYC: the largest id and 2


def test_files_by_name_and_gzip(tmp_path):
    d = city(tmp_path / "d")
    (d / "first.csv.gz").write_bytes(gzip.compress((d / "NYC_train.csv").read_bytes()))
    (d / "NYC_train.csv").unlink()
    a = run(tmp_path / "out", dataset="nyc", data=d, train_file="first.csv.gz")
    assert a.facts["train"] == 3


good = (HEAD + line()).encode()
broken = dict(
    missing_column=(
        good.replace(b",latitude", b",lat"),
        "row 1: expected a column named latitude",
        "there are user_id, POI_id",
    ),
    latitude=(
        (HEAD + line() + line(lat="1000")).encode(),
        "row 3, column latitude: found '1000'",
        "from -90 to 90",
    ),
    no_latitude=((HEAD + line(lat="")).encode(), "row 2, column latitude: found ''", "a number"),
    time=(
        good.replace(b"14:00:09", b"25:00:09"),
        "row 2, column local_time: found '2012-04-03 25:00:09'",
        "a time such as",
    ),
    empty=(b"", "the file is empty", ""),
    header_only=(HEAD.encode(), "at least one row", ""),
    latin1=(good.replace(b"Bar", "Café".encode("latin-1")), "row 2: found", "expected utf-8 text"),
    no_user=((HEAD + line() + line("")).encode(), "row 3, column user_id", "a user id"),
    no_poi=((HEAD + line(poi=" ")).encode(), "row 2, column POI_id", "a POI id"),
    ragged=((HEAD + line() + line(name="Bar, open late") * 2).encode(), "row 3", "as many fields"),
    repeated=(
        (HEAD + line() + line(day=4) + line()).encode(),
        "row 4: expected no row twice, as row 2 is",
        "--duplicates drop",
    ),
)


@pytest.mark.parametrize("name", broken)
def test_broken_file_gets_one_line(tmp_path, name):
    content, *said = broken[name]
    with pytest.raises(BadInput) as e:
        run(tmp_path / "out", dataset="nyc", data=city(tmp_path / "d", test=content))
    text = str(e.value)
    assert "NYC_test.csv" in text and all(s in text for s in said) and "\n" not in text, text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["latitude", "time", "empty"])
def test_command_ends_with_2(tmp_path, name):
    p = cli(
        "recnb.poi.checkins",
        "--dataset",
        "nyc",
        "--data",
        city(tmp_path / "d", test=broken[name][0]),
        "--out",
        tmp_path / "out",
    )
    assert (
        p.returncode == 2
        and p.stderr.count("\n") == 1
        and "NYC_test.csv" in p.stderr
        and not p.stdout
    )


def test_cut_gzip_names_the_file(tmp_path):
    d = city(tmp_path / "d")
    whole = gzip.compress(
        (HEAD + "".join(line(u, f"p{u}", day=1 + u % 28) for u in range(1, 2000))).encode()
    )
    for name, content in dict(
        cut=whole[:-200], broken=whole[:500] + bytes(100) + whole[600:], other=b"no gzip at all"
    ).items():
        (d / f"{name}.csv.gz").write_bytes(content)
        with pytest.raises(BadInput) as e:
            run(tmp_path / "out", dataset="nyc", data=d, test_file=f"{name}.csv.gz")
        assert f"{name}.csv.gz" in str(e.value)


def test_poi_that_the_train_index_lacks(tmp_path):
    d = city(tmp_path / "d")
    (d / "getnext_train_poi2idx.csv").write_text("item,idx\np1,0\np2,1\n")
    with pytest.raises(
        BadInput,
        match="NYC_train.csv, row 4, column poi: found 'p3', "
        "expected a POI that getnext_train_poi2idx.csv knows",
    ):
        run(tmp_path / "out", dataset="nyc", data=d)


@pytest.mark.parametrize(
    "kw, said",
    [
        (dict(dataset="nyx"), "nyc"),
        (dict(dataset="nyc"), "--data"),
        (dict(dataset="nyc", data="no/such/folder"), "a folder that exists"),
        (dict(dataset="made", num_user=3), "did you mean 'num_users'"),
        (dict(dataset="made", num_users="many"), "int"),
        (
            dict(dataset="table", data="nothing.csv", columns="user=a,poi=b,time=c"),
            "a file that exists",
        ),
        (dict(dataset="made", num_users=2, num_days=2, num_pois=5), "--min_poi_freq"),
    ],
)
def test_wrong_parameters(tmp_path, kw, said):
    with pytest.raises(BadInput) as e:
        run(tmp_path / "out", **kw)
    assert said in str(e.value)


def test_duplicates_dropped_into_the_ledger_when_asked(tmp_path):
    a = run(
        tmp_path / "out",
        dataset="nyc",
        data=city(tmp_path / "d", test=broken["repeated"][0]),
        duplicates="drop",
    )
    assert (
        pd.read_parquet(a / "dropped.parquet").astype(str).values.tolist()
        == [["NYC_test.csv", "4", "repeats an earlier row"]]
        and a.facts["test"] == 2
    )


def test_three_hundred_damaged_files(tmp_path):
    "Whatever happens to a file, it is read or refused in one line that names it."
    text = (HEAD + "".join(line(u, f"p{u}", day=1 + u % 28) for u in range(1, 30))).encode()
    rng = random.Random(0)
    refused = 0
    for i in range(300):
        data = bytearray(text)
        for _ in range(rng.randint(1, 4)):
            at, how = rng.randrange(len(data)), rng.randrange(5)
            if how == 0:
                data[at] = rng.randrange(256)
            elif how == 1:
                del data[at : at + rng.randint(1, 40)]
            elif how == 2:
                data[at:at] = rng.choice(
                    [b",", b"\n", b'"', b"\x00", b"\xff", b"nan", b"1e999", b"\r"]
                )
            elif how == 3:
                data = data[:at] or data
            else:
                data[at:at] = data[at : at + 80]
        packed = i % 3 == 0
        f = tmp_path / ("x.csv.gz" if packed else "x.csv")
        f.write_bytes(
            gzip.compress(bytes(data), 1)[: None if i % 6 else -rng.randint(1, 30)]
            if packed
            else bytes(data)
        )
        try:
            sources.read_getnext_file(f, "test", BadRows())
        except BadInput as e:
            refused += 1
            assert str(f) in str(e) and "\n" not in str(e)
    assert refused > 150


def test_own_table_in_csv_and_parquet(tmp_path):
    t = pd.DataFrame(
        dict(
            who=["ann", "bob"] * 10,
            where=[f"place {i % 3}" for i in range(20)],
            when=[f"2024-01-{1 + i // 2:02}T10:{i:02}:00+01:00" for i in range(20)],
        )
    )
    t.to_csv(tmp_path / "t.csv", index=False)
    t.assign(when=pd.to_datetime(t.when)).to_parquet(tmp_path / "t.parquet")
    made = [
        run(
            tmp_path / f.replace(".", "_"),
            dataset="table",
            data=tmp_path / f,
            columns=["user=who", "poi=where", "time=when"],
            min_poi_freq=0,
            min_user_freq=0,
            isolation_minutes=1e9,
        )
        for f in ("t.csv", "t.parquet")
    ]
    a, b = (
        pd.read_parquet(m / "checkins.parquet").drop(columns=["source_file", "source_row"])
        for m in made
    )
    pd.testing.assert_frame_equal(a, b)
    assert a.utc_time[0] == pd.Timestamp(
        "2024-01-01 09:00", tz="UTC"
    ) and a.split.value_counts().tolist() == [16, 2, 2]


def test_tsmc_and_its_protocol(tmp_path):
    begin = pd.Timestamp("2012-04-03")
    rows = [
        f"{u}\tv{i % 2}\tc{i % 2}\tCaf\xe9\t35.7\t139.6\t540\t"
        f"{begin + pd.Timedelta(hours=i + u):%a %b %d %H:%M:%S +0000 %Y}"
        for u in (1, 2)
        for i in range(12)
    ]
    rows += [
        "1\tv0\tc0\tCafé\t35.7\t139.6\t540\tTue May 01 00:00:00 +0000 2012",
        "3\tv0\tc0\tx\t35.7\t139.6\t540\tTue Apr 03 00:00:00 +0000 2012",
        "1\tv7\tc0\tx\t35.7\t139.6\t540\tTue Apr 03 00:00:00 +0000 2012",
    ]
    (tmp_path / "dataset_TSMC2014_TKY.txt").write_bytes("\n".join(rows).encode("latin-1") + b"\n")
    a = run(tmp_path / "out", dataset="tky", data=tmp_path)
    t = pd.read_parquet(a / "checkins.parquet")
    assert (
        a.facts["checkins"] == 24
        and t.user_id.min() == 1
        and t.category[0] == "Café"
        and t.local_time[0] == pd.Timestamp("2012-04-03 10:00")
    )
    left = pd.read_parquet(a / "dropped.parquet").set_index("row").reason
    assert (
        left[27].startswith("POI with")
        and left[26].startswith("user with")
        and left[25].startswith("no other")
    )


def test_made_city_is_the_same_everywhere(tmp_path):
    "Same bytes whatever the hash seed, the zone and the language."
    for name, env in dict(
        a=dict(PYTHONHASHSEED="1", TZ="Asia/Tokyo", LC_ALL="C"),
        b=dict(PYTHONHASHSEED="2", TZ="America/New_York", LC_ALL="C.UTF-8"),
    ).items():
        assert (
            cli(
                "recnb.poi.checkins",
                "--dataset",
                "made",
                "--num_users",
                20,
                "--num_pois",
                60,
                "--num_days",
                40,
                "--out",
                tmp_path / name,
                **env,
            ).returncode
            == 0
        )
    files = [f.name for f in (tmp_path / "a").glob("[!.m]*")] + ["meta.json"]
    assert len(files) == 5 and all(
        (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files
    )
    assert json.loads((tmp_path / "a/meta.json").read_text())["synthetic"] is True


def test_help_is_light():
    p = cli("recnb.poi.checkins", "--help")
    assert p.returncode == 0 and "--min_poi_freq" in p.stdout and "made city" in p.stdout
    heavy = {"torch", "sklearn", "datasets", "transformers"}
    code = f"import sys, recnb.poi.trajectories; assert not {heavy} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@nyc_data
def test_nyc_counts(tmp_path):
    a = run(tmp_path / "out", dataset="nyc", data=DATA / "nyc")
    assert (
        a.facts["train"],
        a.facts["validation"],
        a.facts["test"],
        a.facts["users"],
        a.facts["pois"],
    ) == (83246, 10339, 10374, 1047, 4980)
    t = pd.read_parquet(a / "checkins.parquet")
    known = json.loads((DATA / "nyc/train_user2idx.json").read_text())
    assert dict(pd.read_parquet(a / "users.parquet")[["source_id", "user_id"]].values) == known
    index = (
        pd.read_csv(DATA / "nyc/getnext_train_poi2idx.csv", dtype=dict(item=str))
        .set_index("item")
        .idx
    )
    pois = pd.read_parquet(a / "pois.parquet").set_index("source_id").poi_id
    assert (pois.sort_index() == index.sort_index()).all() and json.loads(
        (a / "meta.json").read_text()
    )["id_bound"] == 4981
    assert (
        t.local_time.notna().all()
        and np.isin(t.category_id[t.split == "train"], np.arange(400)).all()
    )


@pytest.mark.skipif(
    not (DATA / "ca/CA_union.parquet").exists(),
    reason=f"the CA files are not in {DATA}; RECNB_DATA names another place",
)
def test_ca_parquet_as_own_table(tmp_path):
    a = run(
        tmp_path / "out",
        dataset="ca",
        data=DATA / "ca/CA_union.parquet",
        columns=["user=user_id", "poi=POI_id", "time=time", "category=catname"],
        duplicates="drop",
    )
    t = pd.read_parquet(a / "checkins.parquet")
    assert (
        len(t) > 100_000
        and t.user_id[t.split == "train"].min() == 1
        and not t.category.str.contains("url").any()
    )


def write_table(file, **change):
    "A table of a small town in which eight people go about; `change` replaces columns."
    n = 240
    hours = pd.Timestamp("2012-04-03 09:42:49") + pd.to_timedelta(np.arange(n) * 5, unit="h")
    df = pd.DataFrame(
        dict(
            who=np.arange(n) % 4,
            venue=[f"v{i % 6}" for i in range(n)],
            when=hours.strftime("%Y-%m-%d %H:%M:%S"),
            kind="Bar",
        )
    ).assign(**change)
    df.to_csv(file, index=False)
    return df


COLUMNS = ["user=who", "poi=venue", "time=when", "category=kind"]


def run_table(tmp_path, name="out", file="t.csv", **kw):
    return run(tmp_path / name, dataset="table", data=tmp_path / file, columns=COLUMNS, **kw)


def test_all_isolated_names_the_parameter(tmp_path):
    days = pd.Timestamp("2012-04-01") + pd.to_timedelta(np.arange(240) // 4 * 2, unit="D")
    write_table(tmp_path / "t.csv", when=days.strftime("%Y-%m-%d %H:%M:%S"))
    with pytest.raises(BadInput, match="--isolation_minutes"):
        run_table(tmp_path)


def test_a_line_break_in_quotes_leaves_row_numbers_right(tmp_path):
    text = write_table(tmp_path / "t.csv", kind=["Deli\nBodega"] * 9 + ["Bar"] * 231)
    whole = (tmp_path / "t.csv").read_text()
    (tmp_path / "t.csv").write_text(whole.replace(text.when[20], "never"))
    with pytest.raises(BadInput, match=f"row {2 + 20 + 9}, column when: found 'never'"):
        run_table(tmp_path)
    a = run_table(tmp_path, skip_bad_rows=True)
    left = pd.read_parquet(a / "dropped.parquet")
    assert left[left.reason.str.startswith("when: ")].row.tolist() == [31]
    rows = pd.read_parquet(a / "checkins.parquet")
    assert 31 not in set(rows.source_row) and rows.source_row.max() == 2 + 239 + 9


def test_an_offset_keeps_the_wall_clock_and_utc_alone_is_said(tmp_path, capsys):
    text = write_table(tmp_path / "t.csv").when
    plain = run_table(tmp_path, "plain")
    write_table(tmp_path / "t.csv", when=text + "-04:00")
    zoned = run_table(tmp_path, "zoned")
    a, b = (pd.read_parquet(x / "checkins.parquet") for x in (plain, zoned))
    assert a.local_time.tolist() == b.local_time.tolist() and a.utc_time.isna().all()
    assert b.utc_time[0] == pd.Timestamp("2012-04-03 13:42:49Z")
    assert json.loads((zoned / "meta.json").read_text())["local_time"] == "local"
    write_table(tmp_path / "t.csv", when=text + "Z")
    capsys.readouterr()
    utc = run_table(tmp_path, "utc")
    assert "utc_offset" in capsys.readouterr().err
    assert json.loads((utc / "meta.json").read_text())["local_time"] == "utc"


def test_an_index_of_parquet_is_a_column(tmp_path):
    df = write_table(tmp_path / "t.csv")
    df.set_index("who").to_parquet(tmp_path / "t.parquet")
    a, b = (run_table(tmp_path, n, f"t.{n}").facts for n in ("csv", "parquet"))
    assert a == b


def test_day_first_dates_are_those_of_iso(tmp_path):
    text = pd.to_datetime(write_table(tmp_path / "t.csv").when)
    iso = run_table(tmp_path, "iso")
    for form in ("%d/%m/%Y %H:%M:%S", "%d.%m.%Y %H:%M:%S", "%m/%d/%Y %I:%M:%S %p"):
        write_table(tmp_path / "t.csv", when=text.dt.strftime(form))
        other = run_table(tmp_path, form.replace("/", "_"))
        assert other.manifest["outputs"] == iso.manifest["outputs"]


def test_what_a_filter_takes_is_said(tmp_path, capsys):
    write_table(tmp_path / "t.csv", venue=[f"v{i % 6 if i < 60 else i}" for i in range(240)])
    run_table(tmp_path)
    said = capsys.readouterr().err
    assert "180 × POI with at most 9 check-ins (--min_poi_freq)" in said


GOWALLA = "5\t2012-04-{:02}T{:02}:42:49Z\t40.713\t-73.987\t{}\n"


def test_gowalla_passes_over_and_leaves_out(tmp_path):
    spots = "id,spot_categories\n" + "".join(f"{i},\"[{{'name': 'Bar'}}]\"\n" for i in range(3))
    (tmp_path / "gowalla_spots_subset1.csv").write_text(spots)
    rows = [GOWALLA.format(1 + i // 20, i % 20, i % 3) for i in range(60)]
    rows[4:4] = ["5\t2012-04-03T10:00:00Z\t322.2\t-439.9\t77\n"]  # at a spot without a category
    file = tmp_path / "loc-gowalla_totalCheckins.txt"
    file.write_text("".join(rows))
    a = run(tmp_path / "a", dataset="gowalla", data=tmp_path)
    assert (a.facts["checkins"], a.facts["passed_over"]) == (60, 1)
    file.write_text("".join(rows).replace("439.9\t77", "439.9\t1"))
    with pytest.raises(BadInput, match="row 5, column latitude: found '322.2'"):
        run(tmp_path / "b", dataset="gowalla", data=tmp_path)
    b = run(tmp_path / "b", dataset="gowalla", data=tmp_path, skip_bad_rows=True)
    left = pd.read_parquet(b / "dropped.parquet")
    assert b.facts["checkins"] == 60 and left.row.tolist() == [5]
    with pytest.raises(BadInput, match="at least one"):
        box = dict(bounding_box=[0, 0, 1, 1], skip_bad_rows=True)
        run(tmp_path / "c", dataset="gowalla", data=tmp_path, **box)


def test_tsmc_in_utf8_is_noticed_and_can_be_named(tmp_path):
    rows = [
        f"{u}\tv{i % 2}\tc{i % 2}\tCafé\t35.7\t139.6\t540\t"
        f"{pd.Timestamp('2012-04-03') + pd.Timedelta(hours=i):%a %b %d %H:%M:%S +0000 %Y}\n"
        for u in (1, 2)
        for i in range(12)
    ]
    (tmp_path / "dataset_TSMC2014_TKY.txt").write_text("".join(rows), encoding="utf-8")
    with pytest.raises(BadInput, match="row 1, column category.*--encoding utf-8"):
        run(tmp_path / "out", dataset="tky", data=tmp_path)
    a = run(tmp_path / "out", dataset="tky", data=tmp_path, encoding="utf-8")
    assert set(pd.read_parquet(a / "checkins.parquet").category) == {"Café"}


def test_one_bad_row_of_tist_does_not_end_the_world(tmp_path):
    (tmp_path / "dataset_TIST2015_Cities.txt").write_text(
        "Moscow\t55.75\t37.6\tRU\tRussia\tcap\nSao Paulo\t-23.5\t-46.6\tBR\tBrazil\tcap\n"
    )
    (tmp_path / "dataset_TIST2015_POIs.txt").write_text(
        "v1\t55.7\t37.5\tMetro\tRU\nv1\t55.7\t37.5\tMetro\tRU\nv2\tx\t-46.7\tBar\tBR\n"
    )
    rows = [f"1\tv1\tTue Apr 03 {h:02}:00:06 +0000 2012\t240\n" for h in range(20)]
    rows[3:3] = ["1\tv9\tTue Apr 03 18:00:06 +0000 2012\t240\n", "1\tv1\n"]
    (tmp_path / "dataset_TIST2015_Checkins.txt").write_text("".join(rows))
    with pytest.raises(BadInput, match="POIs.txt, row 3, column latitude"):
        run(tmp_path / "out", dataset="moscow", data=tmp_path)
    a = run(tmp_path / "out", dataset="moscow", data=tmp_path, skip_bad_rows=True)
    left = pd.read_parquet(a / "dropped.parquet")
    assert a.facts["checkins"] == 20
    assert sorted(zip(left.file.str[17:-4], left.row)) == [
        ("Checkins", 4),
        ("Checkins", 5),
        ("POIs", 2),
        ("POIs", 3),
    ]
