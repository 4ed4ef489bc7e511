"Shared by all tests: where real data may lie, and a quiet, offline environment."

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("RECNB_DATA", ROOT / "../shared/data"))


@pytest.fixture(scope="session")
def data():
    "The folder with the real files; tests that need it are skipped without."
    if not DATA.exists():
        pytest.skip(f"needs the real data in {DATA} (set RECNB_DATA)")
    return DATA


@pytest.fixture(scope="session")
def common(tmp_path_factory):
    "Function of a name and a maker: a folder that all workers share, made by the first to ask."
    base = tmp_path_factory.getbasetemp()
    base = base.parent if base.name.startswith("popen-") else base  # of several workers

    def find(name, make):
        folder, made = base / name, base / f"{name}.made"
        with open(base / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return find


@pytest.fixture(scope="session")
def new_york(data, common):
    "The folder of the real check-ins and trajectories, to be read and not written."
    from recnb.poi import checkins, trajectories

    if not (data / "nyc").exists():
        pytest.skip(f"needs the New York check-ins in {data}")

    def make(folder):
        c = checkins.run(dataset="nyc", data=str(data / "nyc"), out=f"{folder}/checkins")
        trajectories.run(checkins=c, out=f"{folder}/trajectories")

    return common("new_york", make)


@pytest.fixture(scope="session")
def movies(data, common):
    "The folder of SIREN's Movies, as the stage `rating.reviews` reads them."
    from recnb.rating import reviews

    given = dict(dataset="movies", data=str(data / "movies"))
    return common("movies", lambda folder: reviews.run(given, out=f"{folder}/reviews"))


def is_newer(file, sources):
    "Whether a file is there and as new as all of these."
    return file.exists() and file.stat().st_mtime >= max(p.stat().st_mtime for p in sources)


@pytest.fixture(scope="session")
def smoke():
    """The folder of a task's smoke run, which many tests look at: `smoke("poi")`.

    `make test` makes both before; a test that is run by itself makes what is missing or old.
    """

    def find(task):
        name = dict(poi="smoke", rating="smoke-rating")[task]
        out = ROOT / "papermill_runs/runs" / name
        recipe = ROOT / f"papermill_runs/recipes/{name}.yaml"
        sources = [recipe, *(ROOT / "recnb").rglob("*.py"), *(ROOT / "nbs/studies").glob("*.ipynb")]
        out.mkdir(parents=True, exist_ok=True)
        with open(out.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of two workers one makes it
            if not is_newer(out / "table.txt", sources):
                command = [sys.executable, "-m", "recnb.studies", "--recipe", name]
                env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
                both = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                made = subprocess.run([*command, "--at_once", "2"], cwd=ROOT, env=env, **both)
                assert made.returncode == 0, made.stdout
                (out / "table.txt").touch()
        return out

    return find


@pytest.fixture(scope="session")
def copies():
    "Starts stages in processes that have imported everything already."
    from processes import open_copies

    yield from open_copies()


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; set RECNB_SLOW=1 to run")


LONGEST = [f"test_{name}.py" for name in "study notebooks site contributing gpu keys".split()]


def pytest_collection_modifyitems(items):
    "The longest files first: no worker then waits for another at the end."
    items.sort(key=lambda item: item.path.name not in LONGEST)
