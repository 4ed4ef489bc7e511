"The results file under edits, races and kills; committed tables and what they rest on."

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recnb import tables
from recnb.artifacts import stage
from recnb.methods import read_methods
from recnb.recorded import choose_front_rows
from recnb.results import (
    Line,
    append_lines,
    hash_code,
    make_pair_lines,
    read_lines,
    record_run,
)
from recnb.stages import BadInput
from recnb.tables import check_tables, compare_methods, render_pages, to_markdown, write_tables

ROOT = Path(__file__).parents[1]
ENV = os.environ | dict(PYTHONPATH=str(ROOT))
PUBLISHED = ROOT / "papermill_runs/published"
LINE = dict(
    task="poi",
    dataset="made",
    split="test",
    model="",
    method="user_top",
    settings={},
    slice={},
    metric="Acc@1",
    against="",
    value=0.25,
    low=0.2,
    high=0.3,
    n=100,
    seed=None,
    source="measured",
    where="counters/manifest.json",
)


@dataclasses.dataclass
class Counting:
    out: str
    data: str = ""


@stage("poi.counters", Counting)
def counters(p, folder):
    (folder / "ranks.txt").write_text("1 2 3")


@pytest.fixture
def shop(tmp_path):
    "A run with one recorded number and one published one."
    run = tmp_path / "runs/toy"
    into = tmp_path / "results"
    papers = tmp_path / "published"
    counters(Counting(str(run / "counters"), data=str(tmp_path / "secret/place/city.csv")))
    append_lines(run / "results.jsonl", [LINE])
    append_lines(
        papers / "paper.jsonl",
        [
            LINE
            | dict(
                method="GenUP",
                value=0.2127,
                low=None,
                high=None,
                source="published",
                where="a table",
            )
        ],
    )
    record_run(run / "results.jsonl", into)
    write_tables(into, papers)
    return run, into, papers


def command(*args, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "recnb.tables", *map(str, args)],
        env=ENV,
        cwd=cwd,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "text, told",
    [
        ('{"task": ', ["row 2", "one JSON object"]),
        ("[1, 2]", ["row 2", "one JSON object"]),
        (
            json.dumps({k: v for k, v in LINE.items() if k != "n"} | dict(method="b")),
            ["row 2", "column n"],
        ),
        (json.dumps(LINE | dict(method="b", value="0.25")), ["row 2", "column value", "0.25"]),
        (json.dumps(LINE | dict(method="b", value=None)), ["row 2", "column value"]),
        (json.dumps(LINE | dict(method="b", low=0.26)), ["row 2", "column low"]),
        (json.dumps(LINE | dict(method="b", high=0.1)), ["row 2", "column high"]),
        (json.dumps(LINE | dict(method="b", n=1.5)), ["row 2", "column n"]),
        (json.dumps(LINE | dict(method="b", seed=True)), ["row 2", "column seed"]),
        (
            json.dumps(LINE | dict(method="b", source="invented")),
            ["row 2", "column source", "invented"],
        ),
        (json.dumps(LINE | dict(method="b", where="")), ["row 2", "column where"]),
        (json.dumps(LINE | dict(method="b", note="x")), ["row 2", "column note"]),
        (json.dumps(LINE | dict(method="b")).replace("0.25", "NaN"), ["row 2", "column value"]),
        (json.dumps(LINE), ["row 2", "once"]),
        (json.dumps(LINE | dict(method="b", users=4.5)), ["row 2", "column users"]),
        (
            json.dumps(LINE | dict(method="b", users_low=0.3, users_high=0.2)),
            ["row 2", "column users_high"],
        ),
    ],
)
def test_a_line_that_cannot_be_right_is_named(tmp_path, text, told):
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps(LINE) + "\n" + text + "\n")
    with pytest.raises(BadInput) as e:
        read_lines(file)
    assert all(t in str(e.value) for t in [str(file), *told]) and "\n" not in str(e.value)


def test_a_share_of_one_is_taken_however_its_bound_is_rounded(tmp_path):
    "9 of 9: an interval that ended at .9999999999999999 stopped a whole study."
    full = LINE | dict(value=1.0, low=0.7, high=0.9999999999999999, n=9)
    assert append_lines(tmp_path / "r.jsonl", [full]) == 1
    with pytest.raises(BadInput, match="column high"):
        append_lines(tmp_path / "r.jsonl", [full | dict(high=0.9999)])


def test_intervals_over_users_are_optional_and_the_table_says_which(tmp_path):
    file = tmp_path / "r.jsonl"
    both = dict(users=40, users_low=0.15, users_high=0.35)
    append_lines(file, [LINE, LINE | dict(method="new") | both])
    assert ["users" in json.loads(x) for x in file.read_text().splitlines()] == [True, False]
    table = compare_methods(read_lines(file), "made")
    shown = tables.present_table(table)
    assert shown["over users"].tolist() == ["0.1500 to 0.3500", "–"]
    assert shown["95% interval"].tolist() == ["0.2000 to 0.3000"] * 2
    texts = [tables.write_value(row) for row in table.to_dict("records")]
    assert texts == ["0.2500 (0.1500 to 0.3500)", "0.2500 [0.2000 to 0.3000]"]


def test_a_row_below_the_stated_power_says_so(tmp_path):
    model = LINE | dict(model="small", method="GenUP", n=900)
    cases = {
        "enough": {},
        "asked-few": dict(n=120),
        "stopped-soon": dict(settings={"grpo.max_steps": 4}),
        "told-little": dict(settings=dict(train_rows=500)),
        "form": dict(settings={"warm_start.train_rows": 64}),
        "counter": dict(model="", n=32),
        "printed": dict(source="published", n=32),
    }
    lines = [Line(**model | dict(method=name) | change) for name, change in cases.items()]
    lines.append(Line(**model | dict(method="enough", slice=dict(length="short"), n=20)))
    table = compare_methods(lines, "made").set_index("method")
    short = dict.fromkeys(("stopped-soon", "told-little"), "short training")
    weak = {"asked-few": "pipe check"} | short
    assert table.weak[table.weak != ""].to_dict() == weak
    shown = tables.present_table(table.reset_index()).set_index("method").kind
    assert shown[list(weak)].to_dict() == weak and shown["enough"] == "measured"
    assert compare_methods(lines, "made", family="length").weak[0] == ""
    front = set(choose_front_rows(lines, "made", "poi", "Acc@1", {})[0].method)
    assert "enough" in front and not front & set(weak)


def test_tests_over_users_decide():
    "McNemar's p is small, that over users is not: Holm's correction takes the latter."
    pair = dict(difference=0.02, low=0.001, high=0.039, p=0.04, n=900)
    pair |= dict(users=40, users_low=-0.01, users_high=0.05, users_p=0.2)
    named = {k: LINE[k] for k in ("dataset", "method", "where")} | dict(against="user_bin3")
    lines = [Line(**x) for x in make_pair_lines(pair, **named)]
    shown = tables.tabulate_tests(tables.lines_to_frame(lines)).iloc[0]
    assert shown["p, Holm"] == shown["p, users"] == "0.2000" != shown["p, instances"]
    assert shown["difference"] == "0.0200 (-0.0100 to 0.0500)"


def test_the_check_sees_a_page_that_is_older_than_its_notebook(shop):
    run, into, papers = shop
    file = next(into.rglob("poi.counters.json"))
    made = json.loads(file.read_text())
    for code, n in ((hash_code("poi.counters"), 0), ("0" * 64, 1)):
        file.write_text(json.dumps(made | dict(facts=dict(code=code))))
        assert len([x for x in check_tables(into, papers) if "older than" in x]) == n


def test_the_same_number_is_replaced_and_order_does_not_matter(tmp_path):
    lines = [LINE | dict(method=m, metric=k) for m in "cab" for k in ("MRR", "Acc@1")]
    append_lines(tmp_path / "a.jsonl", lines)
    for x in reversed(lines):
        append_lines(tmp_path / "b.jsonl", [x | dict(value=0.21)])
        append_lines(tmp_path / "b.jsonl", [x])
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes() and len(
        read_lines(tmp_path / "a.jsonl")
    ) == 6


def test_a_bad_line_leaves_the_file_as_it_was(tmp_path):
    append_lines(tmp_path / "r.jsonl", [LINE])
    before = (tmp_path / "r.jsonl").read_bytes()
    with pytest.raises(BadInput):
        append_lines(tmp_path / "r.jsonl", [LINE | dict(method="b"), LINE | dict(value="x")])
    assert (tmp_path / "r.jsonl").read_bytes() == before and sorted(os.listdir(tmp_path)) == [
        ".r.jsonl.lock",
        "r.jsonl",
    ]


WRITER = """
import json, sys
from recnb.results import append_lines
line, me = json.loads(sys.argv[2]), sys.argv[3]
for i in range(int(sys.argv[4])): append_lines(sys.argv[1], [line | dict(method=f'{me}{i:03d}')])
"""


def writer(file, name, n):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(file), json.dumps(LINE), name, str(n)], env=ENV
    )


def test_studies_that_end_together_lose_no_line(tmp_path):
    workers = [writer(tmp_path / "r.jsonl", name, 15) for name in "ab"]
    assert [w.wait() for w in workers] == [0, 0]
    assert len(read_lines(tmp_path / "r.jsonl")) == 30


def test_a_kill_while_appending_leaves_a_readable_file(tmp_path):
    file = tmp_path / "r.jsonl"
    w = writer(file, "a", 5000)
    while not file.exists():
        time.sleep(0.02)
    time.sleep(0.3)
    w.send_signal(signal.SIGKILL)
    w.wait()
    n = len(read_lines(file))
    assert n and append_lines(file, [LINE]) == n + 1


def test_recording_keeps_the_manifest_without_the_machine(shop):
    run, into, papers = shop
    assert check_tables(into, papers) == []
    where = read_lines(into / "results.jsonl")[0].where
    text = (into / where).read_text()
    assert where == "manifests/toy/counters/poi.counters.json" and json.loads(text)[
        "parameters"
    ] == dict(out="counters", data="city.csv")
    assert str(run.parents[1]) not in text and "secret" not in text


def test_recording_some_rows_keeps_the_others(shop):
    run, into, _ = shop
    counters(Counting(str(run / "second")))
    (run / "results.jsonl").unlink()
    append_lines(run / "results.jsonl", [LINE | dict(method="b", where="second")])
    assert record_run(run / "results.jsonl", into) == 2
    (run / "results.jsonl").unlink()
    append_lines(run / "results.jsonl", [LINE | dict(method="c", where="second")])
    assert record_run(run / "results.jsonl", into) == 2  # the same place says something else now
    assert {x.method for x in read_lines(into / "results.jsonl")} == {LINE["method"], "c"}


def test_recording_and_rendering_again_change_no_byte(shop):
    run, into, papers = shop

    def bytes_():
        return {p: p.read_bytes() for p in into.rglob("*") if p.is_file()}

    before = bytes_()
    record_run(run / "results.jsonl", into)
    write_tables(into, papers)
    assert bytes_() == before
    for env in (
        dict(PYTHONHASHSEED="1", LC_ALL="C", TZ="Asia/Tokyo"),
        dict(PYTHONHASHSEED="2", LC_ALL="de_DE.UTF-8"),
    ):
        subprocess.run(
            [sys.executable, "-m", "recnb.tables", "--results", into, "--published", papers],
            env=ENV | env,
            check=True,
            capture_output=True,
        )
        assert bytes_() == before


@pytest.mark.parametrize("fault", ["gone", "changed", "elsewhere"])
def test_a_number_without_its_run_is_refused(shop, fault):
    run, into, papers = shop
    if fault == "gone":
        (run / "counters/manifest.json").unlink()
    if fault == "changed":
        (run / "counters/ranks.txt").write_text("1 1 1")
    if fault == "elsewhere":
        append_lines(
            run / "results.jsonl", [LINE | dict(method="magic", where="magic/manifest.json")]
        )
    before = (into / "results.jsonl").read_bytes()
    record = str(run / "results.jsonl")
    with pytest.raises(BadInput) as said:
        tables.run(tables.Params(record=record, results=str(into), published=str(papers)))
    assert "\n" not in str(said.value)
    assert (into / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize("fault", ["edited", "lost", "extra", "manifest", "number"])
def test_the_check_sees_what_is_stale(shop, fault):
    run, into, papers = shop
    table = into / "tables/poi-made.md"
    if fault == "edited":
        table.write_text(table.read_text().replace("0.2500", "0.9500"))
    if fault == "lost":
        table.unlink()
    if fault == "extra":
        (into / "tables/poi-mars.md").write_text("x")
    if fault == "manifest":
        next(into.rglob("poi.counters.json")).unlink()
    if fault == "number":
        append_lines(
            papers / "paper.jsonl",
            [
                LINE
                | dict(
                    method="GenUP",
                    value=0.9,
                    low=None,
                    high=None,
                    source="published",
                    where="a table",
                )
            ],
        )
    asked = tables.Params(results=str(into), published=str(papers))
    check = dataclasses.replace(asked, check=True)
    with pytest.raises(BadInput) as said:
        tables.run(check)
    assert "\n" not in str(said.value)
    if fault == "edited":  # as a command it does the same
        r = command("--check", "--results", into, "--published", papers)
        assert r.returncode == 2 and r.stderr.count("\n") == 1
    if fault != "manifest":
        tables.run(asked)
        tables.run(check)


def test_help_is_quick_and_importing_pulls_in_no_torch():
    r = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "recnb.tables", "--help"],
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0 and not any(
        f" {m}\n" in r.stderr for m in ("torch", "matplotlib", "transformers")
    )
    assert "did you mean" in command("--resluts", "x").stderr


def test_what_comes_from_outside_cannot_break_a_table():
    import pandas as pd

    text = to_markdown(pd.DataFrame(dict(method=["a|b\nc"], value=[0.5]), dtype=object))
    assert len(text.splitlines()) == 3 and "a\\|b c" in text


def test_an_empty_group_is_shown_as_empty():
    nothing = dict(value=None, low=None, high=None, n=0, slice=dict(slice="never seen"))
    line = Line(**LINE | nothing)
    assert "| – | – | – | 0 |" in to_markdown(
        tables.present_table(compare_methods([line], "made", family="slice"))
    )


def test_the_published_numbers_are_all_there():
    lines = read_lines(PUBLISHED)
    assert all(x.source == "published" and x.where for x in lines)
    genup = [x for x in lines if x.method == "GenUP" and "edition" not in x.settings]

    def count(name):
        return sum(name in x.settings | x.slice for x in genup)

    names = ("activity", "length", "trained_on", "profile")
    assert sum(not x.settings and not x.slice for x in genup) == 15
    assert [count(name) for name in names] == [45, 45, 27, 4]
    assert {x.method for x in lines if x.task == "poi"} == {
        "GenUP",
        "LLM4POI*",
        "LLM4POI",
        "GETNext",
        "STHGCN",
        "LLM-Mob",
        "LLM-ZS",
        "AgentMove",
    }
    siren = {
        (x.dataset, x.settings.get("loss")): x.value
        for x in lines
        if x.method == "SIREN" and x.metric == "MAE" and set(x.settings) <= {"loss"}
    }
    assert siren["movies", None] == siren["movies", "HA"] == 0.7603
    assert (siren["books", None], siren["books", "HA"]) == (0.3510, 0.3503)
    assert {x.method for x in lines if x.task == "rating"} == {
        "SIREN",
        "EXP3RT",
        "LLM4Rate",
        "biased_mf",
        "answer-only SFT",
        "GRPO, reasoning written",
    }
    facts = read_methods(PUBLISHED)
    assert {x.method for x in lines} <= facts.keys()


def test_the_committed_tables_are_what_the_committed_numbers_give():
    assert check_tables(ROOT / "papermill_runs/results", PUBLISHED) == []
    for name, text in render_pages(ROOT / "papermill_runs/results", PUBLISHED).items():
        assert ("\n## From\n" in text) == (
            "-" in name
        )  # an overview has no sources, the pages of datasets do


def test_pictures_are_drawn_with_and_without_intervals(tmp_path):
    lines = [Line(**LINE | dict(slice=dict(length=g))) for g in ("short", "long")]
    printed = dict(method="GenUP", low=None, high=None, source="published")
    lines.append(Line(**LINE | dict(slice=dict(length="short")) | printed))
    tables.plot_groups(compare_methods(lines, "made", family="length")).savefig(tmp_path / "a.png")
    tables.plot_loss([dict(step=1, loss=2.0), dict(step=2), dict(eval=1)]).savefig(
        tmp_path / "b.png"
    )
    assert (tmp_path / "a.png").stat().st_size > 5000 < (tmp_path / "b.png").stat().st_size


def test_recorded_from_elsewhere_with_all_that_was_read(tmp_path, monkeypatch):
    "A run started in one folder is recorded from another, with the manifests of what it read."
    from recnb.poi import checkins, counters, trajectories
    from recnb.stages import make_params

    here = tmp_path / "clone"
    here.mkdir()
    monkeypatch.chdir(here)
    run = Path("papermill_runs/runs/toy")
    C = checkins.run(
        make_params(
            checkins.Params,
            dict(
                dataset="made",
                num_users=12,
                num_pois=20,
                num_days=30,
                seed=1,
                out=str(run / "checkins"),
            ),
        )
    )
    T = trajectories.run(
        make_params(trajectories.Params, dict(checkins=C.path, out=str(run / "trajectories")))
    )
    counters.run(make_params(counters.Params, dict(trajectories=T.path, out=str(run / "counters"))))
    append_lines(run / "results.jsonl", [LINE])
    monkeypatch.chdir(tmp_path)
    record_run(here / run / "results.jsonl", tmp_path / "results")
    assert sorted(f.stem for f in (tmp_path / "results/manifests").rglob("*.json")) == [
        "poi.checkins",
        "poi.counters",
        "poi.trajectories",
    ]
