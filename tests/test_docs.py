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
    from recnb.readme import execute

    copy = tmp_path_factory.mktemp("repo")
    (copy / "nbs").mkdir()
    (copy / "papermill_runs").symlink_to(root / "papermill_runs")
    (copy / "nbs" / "index.ipynb").write_bytes((nbs / "index.ipynb").read_bytes())
    return execute(copy / "nbs" / "index.ipynb"), copy


def test_readme_is_what_the_notebook_says(page):
    from recnb.readme import as_readme

    assert as_readme(page[0]) == (root / "README.md").read_text(encoding="utf-8"), (
        "README.md is stale: make prepare"
    )


def test_pictures_are_those_of_the_results(page):
    made = {p.name: p.read_bytes() for p in (page[1] / "nbs" / "images").iterdir()}
    assert made and all((nbs / "images" / n).read_bytes() == b for n, b in made.items()), (
        "nbs/images is stale: make prepare"
    )


def test_links_of_readme():
    text = (root / "README.md").read_text(encoding="utf-8")
    links = [l for l in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", l)]
    assert len(links) > 10

    def heads(page):
        return {
            re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
            for h in re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
        }

    for page, _, head in (l.partition("#") for l in links):
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
    "The site takes title and summary from the first cell, drops what else is in it, and runs the import cells of library notebooks."
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
                f"{m}: a module that only the notebook makes; importlib.import_module, in {c[:80]!r}"
            )


def test_explore_runs_without_a_person(tmp_path):
    from recnb.studies import execute

    execute(
        nbs / "explore" / "city.ipynb",
        tmp_path / "city.ipynb",
        dict(
            run=str(tmp_path / "run"),
            checkins=dict(dataset="made", users=12, pois=40, days=40, seed=1),
        ),
    )
    assert "The stages" in (tmp_path / "city.ipynb").read_text()
