"Every stage as a command: light help, and one clear line for what is not there."

import dataclasses
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from every_stage import RUNS

from recnb import stages

STAGES = [
    ".".join(path.relative_to(ROOT / "recnb").with_suffix("").parts)
    for path in sorted((ROOT / "recnb").rglob("*.py"))
    if "\nrun_as_command(run, __name__)" in path.read_text(encoding="utf-8")
]


def call(*args, cwd=ROOT):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("stage", STAGES)
def test_help_is_light(stage):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    r = call("-X", "importtime", "-m", f"recnb.{stage}", "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert r.returncode == 0 and ("--out" in r.stdout or stage == "tables")
    # processor time: the wall clock of a busy machine says nothing
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5
    imported = {line.split("|")[-1].strip() for line in r.stderr.splitlines()}
    assert not {"torch", "transformers", "datasets"} & imported


@pytest.mark.parametrize(
    "stage", ["trajectories", "profiles", "prompts", "sft", "evaluate", "counters"]
)
def test_a_folder_that_is_not_there(stage, tmp_path):
    named = {
        "profiles": "--checkins",
        "sft": "--prompts",
        "evaluate": "--prompts",
        "trajectories": "--checkins",
    }.get(stage, "--trajectories")
    more = ["--model_checkpoint", "tiny-llama"] if stage in ("sft", "evaluate") else []
    r = call(
        "-m",
        f"recnb.poi.{stage}",
        named,
        str(tmp_path / "gone"),
        "--out",
        str(tmp_path / "o"),
        *more,
    )
    assert (
        r.returncode == 2
        and r.stderr.strip().count("\n") == 0
        and "gone" in r.stderr
        and not (tmp_path / "o").exists()
    )


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
        r = call(
            "-m",
            "recnb.studies",
            "--recipe",
            str(tmp_path / "r.yaml"),
            "--out",
            str(tmp_path / "o"),
        )
        assert r.returncode == 2 and said in r.stderr and r.stderr.strip().count("\n") == 0, (
            r.stderr
        )
    assert call("-m", "recnb.studies", "--recipe", "nyc").returncode == 2
