"Shared by all tests: where real data may lie, and a quiet, offline environment."

import os
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


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; set RECNB_SLOW=1 to run")


def pytest_collection_modifyitems(items):
    "The longest tests first: of two workers none then waits for the other at the end."
    items.sort(key=lambda item: item.path.name not in ("test_study.py", "test_contributing.py"))
