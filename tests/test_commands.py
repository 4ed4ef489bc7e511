"Every stage as a command: light help, and one clear line for what is not there."

import configparser
import dataclasses
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser

import nbformat
import pandas as pd
import pytest
from conftest import ROOT
from costs import costs_at_most
from every_stage import RUNS

from recnb import stages, studies
from recnb.artifacts import hash_file, hold_lock, write_json, write_jsonl
from recnb.poi import analyses, checkins, counters, trajectories

STAGES = [
    ".".join(path.relative_to(ROOT / "recnb").with_suffix("").parts)
    for path in sorted((ROOT / "recnb").rglob("*.py"))
    if "\nrun_as_command(run, __name__)" in path.read_text(encoding="utf-8")
]


def call(*args, cwd=ROOT):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


# prints, for each module, the help that it gives as a command and what that imports: in a copy of
# one process, since starting Python and pandas for each would be most of the work
HELPS = """
import json, os, runpy, sys
import pandas

for name in sys.argv[1:]:
    there, here = os.pipe()
    if pid := os.fork():
        os.close(here)
        said = open(there).read()
        print(json.dumps([name, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said]))
        continue
    os.dup2(here, 1)
    sys.argv[1:] = ["--help"]
    try:
        runpy.run_module("recnb." + name, run_name="__main__", alter_sys=True)
    finally:
        print("imported", *sys.modules, flush=True)
"""


@pytest.fixture(scope="module")
def helps():
    "Of each stage: its exit code, its help, and the modules that were imported for it."
    lines = call("-c", HELPS, *STAGES).stdout.splitlines()
    found = {
        name: (code, *said.split("\nimported ")) for name, code, said in map(json.loads, lines)
    }
    assert set(found) == set(STAGES)
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="copies a process")
@pytest.mark.parametrize("stage", STAGES)
def test_help_is_light(stage, helps):
    code, said, imported = helps[stage]
    assert code == 0 and ("--out" in said or "." not in stage)
    assert not {"torch", "transformers", "datasets"} & set(imported.split())


@pytest.mark.parametrize("stage", ["poi.sft", "rating.alignment", "studies"])
def test_help_comes_at_once(stage):
    "Those that do most do not take longer to say what they do."
    said = []
    assert costs_at_most(2.5, lambda: said.append(call("-m", f"recnb.{stage}", "--help")))
    assert said[0].returncode == 0 and "--out" in said[0].stdout


@pytest.mark.parametrize(
    "stage", ["trajectories", "profiles", "prompts", "sft", "evaluate", "counters"]
)
def test_a_folder_that_is_not_there(stage, tmp_path, copies):
    named = dict(profiles="checkins", sft="prompts", evaluate="prompts", trajectories="checkins")
    given = {named.get(stage, "trajectories"): str(tmp_path / "gone"), "out": str(tmp_path / "o")}
    if stage in ("sft", "evaluate"):
        given["model_checkpoint"] = "tiny-llama"
    assert "gone" in copies.refuse(f"recnb.poi.{stage}", given)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_a_command_is_its_parameters(run):
    "Whatever a parameter is, the command that a manifest shows gives it again."
    kinds = stages._kinds_of(run.Params)
    needed = {f.name for f in dataclasses.fields(run.Params) if stages._default(f) is ...}
    given = {name: (*kinds[name].choices, "x")[0] for name in needed}
    for name, kind in kinds.items():
        values = [*kind.choices] or dict(
            bool=[True, False],
            int=[i for i in (0, 1, 7) if all(i in r for r in kind.ranges)],
            float=[x for x in (0.25, 1, 1e-9) if all(x in r for r in kind.ranges)],
            str=["a b", "-x", "--out", "é'\""],
            list=[[], [kind.item and kind.item.plain(i) for i in (1, 2)]],
        )[kind.plain.__name__]
        for value in [*values, None] if kind.optional else values:
            p = stages.make_params(run.Params, given | {name: value})
            typed = shlex.split(stages.format_command("recnb.x", p))
            assert stages.parse_arguments(run.Params, typed[3:]) == p, (name, value)


FAULTY = """
from __future__ import annotations
import gzip, json, time, zipfile
from dataclasses import dataclass
from recnb.artifacts import stage, write_json
from recnb.stages import Source, run_as_command

@dataclass
class Params:
    "Fail in a given way."
    out: str  # folder to write
    how: str = ""  # the way
    data: Source = ""  # a file

def fail(how, folder, data):
    if how == "bug": return {}["a"]
    if how == "our bug": return open(folder / "never written.json")
    if how == "value": return int("x")
    if how == "json": return json.load(open(data))
    if how == "zip": return zipfile.ZipFile(data)
    if how == "gzip": return gzip.open(data).read()
    if how == "text": return open(data, encoding="utf-8").read()
    if how == "full": return open("/dev/full", "w", buffering=1).write("x\\n")
    if how == "memory": return bytearray(1 << 60)
    if how == "wait": time.sleep(60)

@stage("toy.faulty", Params)
def run(p, folder):
    write_json(1, folder / "some work.json")
    fail(p.how, folder, p.data)

run_as_command(run, __name__)
"""


@pytest.fixture
def faulty(tmp_path):
    (tmp_path / "faulty.py").write_text(FAULTY)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}

    def start(*flags, env=env, out="o", **kw):
        command = [sys.executable, "-m", "faulty", "--out", out, *flags]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(command, cwd=tmp_path, env=env, **(pipes | kw))

    return start


@pytest.mark.parametrize(
    "how, said",
    [
        ("json", "expected JSON"),
        ("zip", "expected a whole zip file"),
        ("gzip", "expected a whole gzip file"),
        ("text", "expected text in UTF-8"),
        ("full", "No space left on device; the work so far is kept in o.partial"),
        ("memory", "not enough memory"),
    ],
)
def test_what_a_user_can_mend_is_one_line(faulty, tmp_path, how, said):
    (tmp_path / "data").write_bytes(b"\xe9" if how == "text" else b"{'a': 1}")
    p = faulty("--how", how, "--data", "data")
    _, err = p.communicate(timeout=60)
    assert p.returncode == 2 and err.count("\n") == 1 and said in err, err
    assert how not in ("json", "zip", "gzip", "text") or "--data data" in err


@pytest.mark.parametrize("how", ["bug", "our bug", "value"])
def test_a_fault_of_the_program_keeps_its_traceback(faulty, how):
    p = faulty("--how", how)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 1 and "Traceback" in err and "in fail" in err


@pytest.mark.parametrize(
    "out, said",
    [
        ("/proc/nowhere/o", "/proc/nowhere: No such file"),
        ("file/o", "file: File exists"),
        ("x" * 300, "File name too long"),
        ("file", "file: expected a new folder"),
        ("mine", "mine: expected a new folder"),
    ],
    ids=["system", "below a file", "long", "file", "somebody's folder"],
)
def test_a_place_where_nothing_can_be_written(faulty, tmp_path, out, said):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("mine")
    p = faulty(out=out)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 2 and err.count("\n") == 1 and said in err, err
    for file in ("file", "mine/thesis.tex"):
        assert (tmp_path / file).read_text() == "mine"


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping_keeps_the_work(faulty, tmp_path, sent, code):
    # a shell that runs this in the background has its children ignore Ctrl-C
    p = faulty("--how", "wait", preexec_fn=lambda: signal.signal(sent, signal.SIG_DFL))
    end = time.monotonic() + 60
    while not (tmp_path / "o.partial/some work.json").exists() and time.monotonic() < end:
        time.sleep(0.02)
    p.send_signal(sent)
    _, err = p.communicate(timeout=60)
    assert p.returncode == code and err.count("\n") == 1
    assert "kept in o.partial: the same command goes on from there" in err


def test_nobody_listens(faulty, tmp_path):
    with open("/dev/full", "w") as full:
        p = faulty(stdout=full)
        _, err = p.communicate(timeout=60)
    assert p.returncode == 1 and err.count("\n") == 1 and "No space left" in err
    read, write = os.pipe()
    os.close(read)
    p = faulty(stdout=write, stderr=write, out="unheard")
    os.close(write)
    assert p.wait(60) == 1 and (tmp_path / "unheard/manifest.json").exists()


def test_a_locale_of_ascii(faulty, tmp_path):
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "LC_ALL": "C"}
    (tmp_path / "mine é.json").write_text("1")
    more = dict(PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii")
    p = faulty("--how", "json", "--data", "mine é.json", env=env | more, out="ü", encoding="utf-8")
    said, err = p.communicate(timeout=60)
    assert p.returncode == 0, err
    made = json.loads((tmp_path / "ü/manifest.json").read_text(encoding="utf-8"))
    assert made["parameters"]["data"] == "mine é.json"


def test_recipes_that_do_not_fit(tmp_path):
    good = (ROOT / "papermill_runs/recipes/smoke.yaml").read_text()
    for old, new, said in [
        ("max_steps", "max_stepps", "did you mean 'max_steps'"),
        ("city: alpha", "city: alfa", "did you mean 'alpha'"),
        ("task: poi", "tusk: poi", "did you mean 'task'"),
        ("warmup_steps: 1", "warmup_steps: many", "'many', expected int"),
        ("cross: [alpha-full/beta]", "cross: [alpha-full]", "run/city"),
    ]:
        (tmp_path / "r.yaml").write_text(good.replace(old, new))
        with pytest.raises(stages.BadInput) as refusal:
            studies.run(studies.Params([str(tmp_path / "r.yaml")], out=str(tmp_path / "o")))
        assert said in str(refusal.value) and "\n" not in str(refusal.value)
    r = call("-m", "recnb.studies", "--recipe", "nyc")
    assert r.returncode == 2 and r.stderr.strip().count("\n") == 0, r.stderr


def test_recnb_lists_what_there_is():
    r = call("-X", "importtime", "-m", "recnb", "--help")
    assert r.returncode == 0 and costs_at_most(1, lambda: call("-m", "recnb", "--help"))
    imported = {line.split("|")[-1].strip() for line in r.stderr.splitlines()}
    assert not {"torch", "pandas", "pyarrow", "papermill"} & imported
    listed = re.findall(r"^((?:poi|rating)\.\w+) ", r.stdout, re.M)
    assert listed == [s.name for s in stages.list_stages()]
    assert set(listed) == {s for s in STAGES if s.startswith(("poi.", "rating."))}
    assert call("-m", "recnb").stdout == r.stdout


def test_recnb_is_a_script_of_the_environment():
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    name, where = ini["DEFAULT"]["console_scripts"].split("=", 1)
    module, function = where.split(":")
    assert name == "recnb" and callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize(
    "typed, said",
    [
        ("stuty", "did you mean 'study'"),
        ("poi.stf", "did you mean 'poi.sft'"),
        ("status nowhere", "expected a recipe that was run"),
        ("report nowhere", "expected a recipe that was run"),
        ("study --recipe quik", "did you mean 'quick'"),
        ("poi.counters --trajectory x", "did you mean 'trajectories'"),
    ],
)
def test_a_word_that_recnb_does_not_know(typed, said):
    r = call("-m", "recnb", *typed.split())
    assert r.returncode == 2 and said in r.stderr and r.stderr.strip().count("\n") == 0


def test_stages_that_read_each_other_are_those_of_the_code():
    "The graph is read from the source; the annotations of the imported classes say the same."
    for s in stages.list_stages():
        fields = {f.name: f for f in dataclasses.fields(RUNS[s.name].Params)}
        hints = RUNS[s.name].Params.__annotations__
        marked = {n for n in fields if re.search(r"\b(Folder|Trained)\b", str(hints.get(n, "")))}
        assert marked <= s.reads.keys() <= fields.keys()
        assert set(s.needed) == {n for n, f in fields.items() if stages._default(f) is ...}


def test_each_stage_says_what_comes_next(tmp_path):
    "A pipeline can be walked by typing what the last command said."
    small = "--num_users 10 --num_pois 24 --num_days 24 --out run/checkins"
    command = f"python -m recnb.poi.checkins --dataset made {small}"
    walked = []
    while ".sft " not in command:
        r = call(*shlex.split(command)[1:], cwd=tmp_path)
        assert r.returncode == 0, r.stderr
        walked.append(command.split()[2].split(".")[-1])
        assert f"run/{walked[-1]} (poi.{walked[-1]}, " in r.stdout and "\nwrote " in r.stdout
        command = re.search("^next: (.*)$", r.stdout, re.M)[1]
        if walked[-1] == "checkins":
            dropped = pd.read_parquet(tmp_path / "run/checkins/dropped.parquet")
            assert f"\ndropped {len(dropped)} rows: " in r.stdout
    assert walked == ["checkins", "trajectories", "profiles", "prompts"]
    r = call(
        "-m",
        "recnb",
        "poi.counters",
        *"--trajectories run/trajectories --out c".split(),
        cwd=tmp_path,
    )
    score = re.search(
        r"^Acc@1 of user_top: ([\d.]+) \(95% interval ([\d.]+) to ([\d.]+)", r.stdout, re.M
    )
    assert float(score[2]) <= float(score[1]) <= float(score[3]) and "no stage reads" in r.stdout


RECIPE = """
task: poi
title: a toy <city>
cities: {a: {checkins: {dataset: made}}}
baselines: {trees: {city: a, ranker: {}}}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A run of which the city is made, the trees are at work and the table is missing."
    out = tmp_path_factory.mktemp("runs") / "toy"
    here = out / "cities/a"
    small = dict(num_users=10, num_pois=24, num_days=24)
    c = checkins.run(small, dataset="made", out=str(here / "checkins"))
    t = trajectories.run(checkins=c, out=str(here / "trajectories"))
    k = counters.run(trajectories=t, out=str(here / "counters"))
    rows, instances = trajectories.load_trajectories(t.path)
    counted = counters.PREDICTIONS.with_name("user_top.parquet").read(k)
    labels = dict(
        method="user_top", dataset="a", where="cities/a/counters/manifest.json", settings={}
    )
    write_jsonl(analyses.make_lines(counted, instances, rows, **labels), out / "results.jsonl")
    (out.parent / "toy.yaml").write_text(RECIPE)
    write_json(dict(recipe=str(out.parent / "toy.yaml"), data=None, only=[]), out / "config.json")
    book = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# A city\n<script>1</script>")]
    )
    nbformat.write(book, here / "data_poi.ipynb")
    files = {
        f"{n}/manifest.json": hash_file(here / n / "manifest.json")
        for n in ("checkins", "counters")
    }
    write_json(dict(values={}, files=files), here / "data_poi.made.json")
    (out / "baselines/trees").mkdir(parents=True)
    nbformat.write(book, out / "baselines/trees/baseline_poi.running.ipynb")
    (out / "logs").mkdir()
    (out / "logs/1.log").write_text("recnb| trees/baseline_poi: tree 7 of 9\n")
    return out


def test_status_of_a_run(finished):
    said = call("-m", "recnb", "status", str(finished)).stdout
    assert said.startswith("toy, not running: 1 done, 1 stopped, 1 waiting\n")
    with hold_lock(finished.parent / ".toy.lock"):
        said = call("-m", "recnb", "status", str(finished)).stdout
    assert said.startswith("toy, running: 1 done, 1 running, 1 waiting\n")
    lines = {line.split("  ")[0]: line for line in said.split("\n")}
    assert "checkins, counters" in lines["cities.a"] and "tree 7 of 9" in lines["baselines.trees"]
    assert f"open {finished}/baselines/trees/baseline_poi.running.ipynb" in said


class Links(HTMLParser):
    "What a page leads to or loads, and its scripts."

    def __init__(self, text):
        super().__init__()
        self.found, self.heads = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.heads += [tag] * (tag in ("h1", "script"))
        self.found += [value for name, value in attrs if name in ("href", "src")]


def test_the_report_of_a_run(finished):
    r = call("-m", "recnb", "report", str(finished))
    assert r.returncode == 0 and r.stdout.strip() == f"open {finished}/report/index.html", r.stderr
    pages = sorted((finished / "report").rglob("*.html"))
    assert len(pages) == 6  # the first, three stages, two notebooks
    for page in pages:
        links = Links(page.read_text(encoding="utf-8"))
        assert links.heads == ["h1"], page  # one title, and no script from a notebook
        for link in links.found:
            local = not re.match(r"\w+:|//", link) or link.startswith("data:")
            assert local and (link.startswith(("#", "data:")) or (page.parent / link).exists()), (
                link
            )
    first = (finished / "report/index.html").read_text(encoding="utf-8")
    assert (
        "a toy &lt;city&gt;" in first and '<a href="cities/a/counters.html">user_top</a>' in first
    )
    assert "tree 7 of 9" in first and "url(" not in (finished / "report/style.css").read_text()


def test_papermill_by_hand(tmp_path):
    "A misspelt parameter ends the notebook, with the nearest name."
    check = "from recnb.stages import check_injected_parameters\n\ncheck_injected_parameters()"
    cells = [nbformat.v4.new_code_cell(s) for s in ("run = 'a'\nlaunch = {}", check, "launch")]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "study.ipynb")
    start = ("-m", "papermill", str(tmp_path / "study.ipynb"), str(tmp_path / "out.ipynb"))
    r = call(*start, "-p", "rum", "b")
    assert r.returncode == 1
    assert "found 'rum', expected a parameter of this notebook; did you mean 'run'?" in r.stderr
