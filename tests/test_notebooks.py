"""Every study notebook runs from top to bottom in a fresh clone, and leaves it clean.

Kernels start in the notebook's folder, as in JupyterLab. Each study's own parameters are a row of
a smoke recipe: what that made is taken up, and what is missing is made.
"""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from unittest import mock

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from processes import WARM

from recnb.launch import fork_processes
from recnb.notebooks import configure_kernel
from recnb.recipes import read_recipe
from recnb.steps import list_steps, notebook_parameters

STUDIES = sorted(p.stem for p in (ROOT / "nbs/studies").glob("*.ipynb"))
OPENED = [name for name in STUDIES if "benchmark" not in name]  # their pages have a test each


def run_git(clone, *words):
    return subprocess.run(["git", *words], cwd=clone, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    "What git has of this tree, and what it would take, as a repository of its own."
    clone = tmp_path_factory.mktemp("clone")
    listed = run_git(ROOT, "ls-files", "-z", "-co", "--exclude-standard").stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            (clone / name).write_bytes((ROOT / name).read_bytes())
    run_git(clone, "init", "-q")
    run_git(clone, "add", "-A")
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    run_git(clone, *who, "commit", "-qm", "all")
    return clone


def set_parameters(book):
    "What the parameters cell of a notebook says."
    cell = next(c for c in book.cells if "parameters" in c.metadata.get("tags", []))
    values = {}
    exec(cell.source, values)
    return values


@pytest.mark.parametrize("recipe", ["smoke", "smoke-rating"])
def test_a_study_by_hand_is_a_row_of_the_smoke_recipe(recipe):
    "So that a reader who opens it goes on from what `make study` made."
    r, seen = read_recipe(recipe), set()
    for step in list_steps(r):
        if step.notebook in seen:
            continue
        seen.add(step.notebook)
        own = set_parameters(nbformat.read(ROOT / step.source, 4))
        out = f"papermill_runs/runs/{recipe}"
        told = notebook_parameters(r, out, step.notebook, **step.given)
        assert {k: own[k] for k in told} == told, step.path
        assert not any(v for k, v in own.items() if k not in told and k != "__builtins__")


LOST = ("cities/beta", "cross", "runs/alpha-none")  # of what smoke made, for the studies to make


@pytest.fixture(scope="module")
def executed(clone, smoke):
    "Name of a study → its executed copy, and the seconds that it took where it was opened."
    runs = clone / "papermill_runs/runs"
    for task, name in (("poi", "smoke"), ("rating", "smoke-rating")):
        shutil.copytree(smoke(task), runs / name, ignore=shutil.ignore_patterns("logs"))
    for place in LOST:
        shutil.rmtree(runs / "smoke" / place)

    def run(name):
        source = clone / f"nbs/studies/{name}.ipynb"
        book = nbformat.read(source, 4)
        settings = dict(timeout=300, kernel_name="python3", config=configure_kernel())
        settings.update(allow_errors=name.startswith("audit"))
        resources = dict(metadata=dict(path=str(source.parent)))
        start = time.monotonic()
        NotebookClient(book, resources=resources, **settings).execute(env={**os.environ})
        return book, time.monotonic() - start

    first = [name for name in OPENED if not name.startswith("results")]
    last = [name for name in OPENED if name not in first]
    kernels = {"PYTHONPATH": str(clone), "OMP_NUM_THREADS": "1"}
    with mock.patch.dict(os.environ, kernels), contextlib.chdir(clone):
        with fork_processes(WARM.split()):  # as a study begins them
            return {name: run(name) for name in first + last}


def list_errors(book):
    outputs = [o for c in book.cells if c.cell_type == "code" for o in c.outputs]
    return [o for o in outputs if o.output_type == "error"]


@pytest.mark.parametrize("name", OPENED)
def test_a_study_runs_from_top_to_bottom_in_a_fresh_clone(name, executed):
    book, seconds = executed[name]
    assert seconds < 120
    if name.startswith("audit"):
        error = list_errors(book)[0]
        assert error.ename == "BadInput" and len(error.traceback) == 1
        assert "\n" not in error.traceback[0] and "data/README.md" in error.traceback[0]
    else:
        assert not list_errors(book)
        assert [c for c in book.cells if c.cell_type == "code"][-1].outputs


def test_runs_land_in_one_folder(executed, clone):
    made = {p.name for p in (clone / "papermill_runs/runs").iterdir()}
    assert {"smoke", "smoke-rating"} <= made
    assert not (clone / "nbs/studies/papermill_runs").exists()
    assert run_git(clone, "status", "--porcelain").stdout == ""


def test_what_was_made_is_taken_up_and_what_was_lost_is_made(executed, clone, smoke):
    for task, name in (("poi", "smoke"), ("rating", "smoke-rating")):
        before, after = smoke(task), clone / "papermill_runs/runs" / name
        stages = [p.relative_to(before) for p in before.rglob("manifest.json")]
        assert len(stages) > 12
        for stage in stages:
            old, new = ((run / stage).read_bytes() for run in (before, after))
            lost = any(stage.is_relative_to(place) for place in LOST)
            assert (old == new) is not lost, stage


def open_contents_manager(clone, monkeypatch):
    "Jupyter's contents manager, set up as `make lab` does."
    from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager
    from traitlets.config.loader import PyFileConfigLoader

    config = PyFileConfigLoader("jupyter_server_config.py", path=str(clone / ".jupyter"))
    return AsyncLargeFileManager(root_dir=str(clone), config=config.load_config())


def test_what_was_run_and_saved_leaves_the_tree_clean(executed, clone, monkeypatch):
    manager = open_contents_manager(clone, monkeypatch)

    async def save(path):
        model = await manager.get(path, content=True)
        book, _ = executed.get(Path(path).stem, (model["content"], None))
        if len(book.cells) != len(model["content"].cells):  # papermill put its parameters in
            book = model["content"]
        for i, cell in enumerate(c for c in book.cells if c.cell_type == "code"):
            cell.execution_count = i + 1
        book.metadata["language_info"] = dict(name="python", version="3.12.0")
        await manager.save(dict(type="notebook", format="json", content=book), path)

    async def save_all():
        for file in sorted((clone / "nbs").rglob("*.ipynb")):
            await save(file.relative_to(clone).as_posix())

    asyncio.run(save_all())
    assert run_git(clone, "status", "--porcelain").stdout == ""
    kept = clone / "papermill_runs/runs/lab/nbs/studies/results_poi.ipynb"
    assert any(c.get("outputs") for c in json.loads(kept.read_text(encoding="utf-8"))["cells"])


def test_an_edit_is_saved_without_what_the_run_left(executed, clone, monkeypatch):
    manager = open_contents_manager(clone, monkeypatch)
    path = "nbs/studies/results_poi.ipynb"
    book = nbformat.from_dict(json.loads(json.dumps(executed["results_poi"][0])))
    code = [c for c in book.cells if c.cell_type == "code"]
    code[0].source += "\n# mine"
    asyncio.run(manager.save(dict(type="notebook", format="json", content=book), path))
    changed = run_git(clone, "diff", "-U0").stdout.splitlines()
    added = "".join(line for line in changed if line[0] == "+" and line[:3] != "+++")
    assert added.count("# mine") == 1
    assert not any(word in added for word in ("output_type", "execution_count", "language_info"))
    run_git(clone, "checkout", "-q", path)


def read_page(url):
    "The text of a page; the server names its address before it listens."
    end = time.monotonic() + 20
    while True:
        try:
            with urllib.request.urlopen(url) as answer:
                return answer.read().decode()
        except urllib.error.URLError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)


@pytest.fixture(scope="module")
def lab(clone):
    "Function of a path: the answer of a JupyterLab that `make lab` would start."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "recnb.lab", "--no-browser", f"--port={port}"]
    command += ["--IdentityProvider.token=t", "--ServerApp.port_retries=20"]
    environment = {**os.environ, "PYTHONPATH": str(clone)}
    options = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=clone / "nbs", env=environment, **options) as process:
        try:
            found = next(line for line in process.stderr if "http://" in line and "token=" in line)
            first = found[found.index("http://") :].strip()
            server = "/".join(first.split("/")[:3])

            def ask(path):
                url = first.replace("token=...", "token=t")
                return first, read_page(url if path is None else f"{server}/{path}?token=t")

            yield ask
        finally:
            process.terminate()


def test_the_lab_opens_at_the_root_with_a_start_page(lab):
    first, page = lab(None)
    assert "/lab/tree/README.md" in first and "<html" in page.lower()
    there = {x["name"] for x in json.loads(lab("api/contents")[1])["content"]}
    assert {"nbs", "papermill_runs", "data", "README.md", "LOG.md"} <= there
    folder = json.loads(lab("api/contents/papermill_runs")[1])["content"]
    assert {"recipes", "results", "published"} <= {x["name"] for x in folder}


def test_nothing_pops_up(lab):
    settings = json.loads(lab("lab/api/settings")[1])["settings"]
    schema = {s["id"]: s["schema"].get("properties") for s in settings}
    news = schema["@jupyterlab/apputils-extension:notification"]
    assert news["fetchNews"]["default"] == "false" and not news["checkForUpdates"]["default"]
    assert schema["@jupyterlab/notebook-extension:tracker"]["autoStartDefaultKernel"]["default"]
