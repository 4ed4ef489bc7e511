"The front page and the site: nothing stale, no dead link, every notebook in its place."

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

root = Path(__file__).parent.parent
nbs = root / "nbs"
notebooks = sorted(
    p
    for p in nbs.rglob("*.ipynb")
    if not any(s.startswith((".", "_")) for s in p.relative_to(nbs).parts)
)


def cells(nb, kind):
    return [
        "".join(c["source"])
        for c in json.loads(nb.read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == kind
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    "index.ipynb, executed in a copy of its folder."
    from recnb.readme import run_page

    copy = tmp_path_factory.mktemp("repo")
    (copy / "nbs").mkdir()
    (copy / "papermill_runs").symlink_to(root / "papermill_runs")
    (copy / "nbs" / "index.ipynb").write_bytes((nbs / "index.ipynb").read_bytes())
    return run_page(copy / "nbs" / "index.ipynb"), copy


def test_readme_is_what_the_notebook_says(page):
    from recnb.readme import convert_to_readme

    assert convert_to_readme(page[0]) == (root / "README.md").read_text(encoding="utf-8"), (
        "README.md is stale: make prepare"
    )


def test_pictures_are_those_of_the_results(page):
    made = {p.name: p.read_bytes() for p in (page[1] / "nbs" / "images").iterdir()}
    assert made and all((nbs / "images" / n).read_bytes() == b for n, b in made.items()), (
        "nbs/images is stale: make prepare"
    )


def test_links_of_readme():
    text = (root / "README.md").read_text(encoding="utf-8")
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    links = [link for link in found if not re.match(r"[a-z]+:", link)]
    assert len(links) > 10

    def heads(page):
        return {
            re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
            for h in re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
        }

    for page, _, head in (link.partition("#") for link in links):
        assert (root / page).exists() and (
            not head or head in heads(root / (page or "README.md"))
        ), (page, head)


def test_every_notebook_is_in_the_sidebar_in_reading_order():
    def pages(contents):
        return [p for c in contents for p in ([c] if isinstance(c, str) else pages(c["contents"]))]

    listed = pages(
        yaml.safe_load((nbs / "sidebar.yml").read_text())["website"]["sidebar"]["contents"]
    )
    there = [p.relative_to(nbs).as_posix() for p in notebooks]
    assert sorted(listed) == sorted(there)
    for folder in {Path(p).parent for p in listed}:
        numbered = [p for p in listed if Path(p).parent == folder and Path(p).name[:2].isdigit()]
        assert numbered == sorted(numbered)


@pytest.mark.parametrize("nb", notebooks, ids=lambda p: p.relative_to(nbs).as_posix())
def test_site_can_show_it(nb):
    "The site reads title and summary in the first cell, and runs the imports of the library."
    assert re.fullmatch(r"# \S.*\n\n?> \S[^\n]*\n?", cells(nb, "markdown")[0]), (
        'first cell: "# Title", "> summary" on one line, and nothing else'
    )
    code = cells(nb, "code")
    if not any("#| default_exp" in c for c in code):
        return
    for c in code:
        if re.search(r"^#\|\s*(export|eval:\s*false)", c, re.M):
            continue
        tree = ast.parse(re.sub(r"^[%!].*$", "pass", c, flags=re.M))
        imports = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
        if not imports:
            continue
        assert all(n in imports for n in tree.body), (
            f"imports in a cell of their own, in {c[:80]!r}"
        )
        for m in (
            m
            for n in imports
            for m in ([n.module] if isinstance(n, ast.ImportFrom) else [a.name for a in n.names])
            if m
        ):
            assert importlib.util.find_spec(m.split(".")[0]), (
                f"{m}: a module that only the notebook makes, in {c[:80]!r}"
            )


BY_HAND = [p for p in notebooks if p.parent.name == "benchmarks"]  # explore: test_explore.py
SMALLEST = {  # page → parameters with which it ends at once
    "checkins": dict(users=60),
    "ratings": dict(users=60),
    "sft": dict(model_checkpoint="tiny-llama"),
    "ranking": dict(model_checkpoint="tiny-llama", catalogue=60),
    "grpo": dict(model_checkpoint="tiny-llama", prompt_tokens=40, completion_tokens=8, group=2),
    "answer_only": dict(warm=dict(train_rows=8, batch_size=4), rows=2, max_new_tokens=16),
}


@pytest.mark.parametrize("nb", BY_HAND, ids=lambda p: p.relative_to(nbs).as_posix())
def test_notebooks_for_a_person_run_without_one(nb, tmp_path, monkeypatch, copies):
    from recnb.notebooks import execute_notebook

    for name, value in copies.forks.items():  # kernels begin as in a study
        monkeypatch.setenv(name, value)
    execute_notebook(nb, tmp_path / nb.name, SMALLEST[nb.stem])
    outputs = [
        o
        for c in json.loads((tmp_path / nb.name).read_text())["cells"]
        for o in c.get("outputs", [])
    ]
    assert outputs and not any(o["output_type"] == "error" for o in outputs)
