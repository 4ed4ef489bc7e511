"The guide: every page is filled, every link leads somewhere, every command could be typed."

import importlib
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from recnb.diagrams import PIPELINES, collect_curve, draw_pipeline
from recnb.guide import (
    FILLERS,
    GUIDE,
    METHODS,
    explain_terms,
    find_named_recipe,
    list_guide,
    list_recipe_files,
    read_book,
    read_chapter,
    tabulate_recipes,
    write_guide,
)
from recnb.recipes import read_recipe
from recnb.stages import BadInput, parse_arguments

root = Path(__file__).parent.parent
guide = root / "nbs/guide"
sources = sorted(guide.rglob("*.md"))
MADE = ("../results/", "../../results/")  # pages that the build of the site adds


@pytest.fixture(scope="module")
def book():
    return read_book(root)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    "Address → text of each page, as the site gets it."
    proc = tmp_path_factory.mktemp("proc")
    return {p.relative_to(proc).as_posix(): p.read_text() for p in write_guide(proc, root)}


def test_every_page_is_made_and_nothing_is_left_to_fill(pages):
    named = [p for part in list_guide() for p in part["contents"]]
    assert {p for p in named if p.endswith(".md")} == set(pages) and len(set(named)) == len(named)
    assert all((root / "nbs" / p).is_file() for p in named)
    assert not [p for p, text in pages.items() if "<!--" in text or "None" in text]


def test_every_method_of_the_tables_has_a_page(book):
    told = [m for name in METHODS for m in read_chapter(guide / f"{name}.md").head["methods"]]
    theirs = {m for m in book.facts if "made elsewhere" in m}  # of a reader, without a page
    assert sorted(told) == sorted(set(book.facts) - theirs)
    assert {read_chapter(guide / f"{n}.md").head["stage"] for n in METHODS} <= set(book.stages)


def list_links(text):
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    return re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", text)


@pytest.mark.parametrize("path", sources, ids=lambda p: p.relative_to(guide).as_posix())
def test_links_of_a_source_lead_somewhere(path):
    for link in list_links(path.read_text()):
        assert not re.match(r"https?:", link), f"{link}: a page of ours works without a network"
        assert link.startswith(MADE) or (path.parent / link.split("#")[0]).exists(), link


def test_links_of_made_parts_lead_somewhere(pages, book):
    anchors = {f"#{re.sub(r'[^a-z0-9-]', '', t.lower().replace(' ', '-'))}" for t in book.terms}
    for page, text in pages.items():
        for link in list_links(text):
            if link.startswith("repo:"):
                assert (root / link.removeprefix("repo:")).is_file(), (page, link)
            elif "glossary.md#" in link:
                assert "#" + link.split("#")[1] in anchors, (page, link)
            elif link.startswith("#"):
                assert f"\n## {link[1:]}\n" in text, (page, link)


def list_typed_commands():
    "The commands of all pages, one a line, continued lines joined."
    for path in sources:
        page = read_chapter(path)
        blocks = re.findall(r"```sh\n(.*?)```", page.text, re.S) + page.head.get("run", [])
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            yield path, line


def test_every_command_names_what_exists():
    count = 0
    for path, line in list_typed_commands():
        words = shlex.split(line, comments=True)
        given = dict(w.split("=", 1) for w in words if re.match(r"[A-Z]+=", w))
        for name in given.get("RECIPE", "").split() if find_named_recipe(line) else []:
            if name in ("mine", "own", "own-rating"):
                continue
            recipe = read_recipe(str(root / f"papermill_runs/recipes/{name}.yaml"), "folder")
            assert set(given.get("ONLY", "").split()) <= {*recipe.runs, *recipe.baselines}, (
                path,
                line,
            )
            count += 1
        if words[:2] == ["python", "-m"] and "--help" not in words:
            stage = importlib.import_module(words[2])
            parse_arguments(stage.Params, words[3:])
    assert count > 15


def test_files_that_comments_name_are_there():
    "In recipes, profiles and scripts, which no link checks."
    named = re.compile(r"(?<![\w/])(?:tests|nbs|\.ci|papermill_runs/(?!runs/))[\w/.-]*\.[a-z]+\b")
    files = [root / "Makefile", *(root / "papermill_runs").glob("*"), *(root / ".ci").glob("*")]
    files += [
        f
        for name in ("recipes", "profiles")
        for f in (root / f"papermill_runs/{name}").rglob("*.yaml")
    ]
    told = {(f.name, x) for f in files if f.is_file() for x in named.findall(f.read_text())}
    assert len(told) > 10 and [x for x in told if not (root / x[1]).exists()] == []


def test_pipelines_follow_the_stage_graph(book):
    for task, names in PIPELINES.items():
        stages = [book.stages[f"{task}.{n}"] for n in names.split()]
        assert stages == sorted(stages, key=lambda s: s.number)
        svg = draw_pipeline(stages)
        assert svg.count("<rect") == len(stages) and 'role="img" aria-label="' in svg
        widest = max(map(len, re.findall(r"<text[^>]*>([^<]*)<", svg)))
        assert widest <= 43, "a line of a box that a phone would cut"
        assert min(map(int, re.findall(r"[MH](\d+) ", svg))) >= 0


def test_recipes_are_all_there_with_their_numbers(book):
    table = tabulate_recipes(book)
    assert len(table) == len(list_recipe_files(root)) and table.columns[0] == "recipe"
    row = table[table.recipe.str.contains("movies-gpu")].iloc[0]
    recorded = [x for x in book.lines if x.where.startswith("manifests/movies-gpu/runs")]
    shown = {f"{x.value:.4f}" for x in recorded if x.metric == "MAE" and not x.slice}
    assert re.search(r"MAE (\S+):", row["recorded here"])[1] in shown
    assert "0.7603" in row["printed"]


def test_terms_are_explained_once_and_never_in_code():
    text = "# POI\n\n`POI` [POI](a) | POI, POIs\n\n```\nPOI\n```\n"
    said = explain_terms(text, {"POI": "A place. More."}, "g.md")
    assert said.count("g.md#poi") == 1 and said.startswith("# POI\n\n`POI` [POI](a) | [POI](g.md")


def test_a_page_without_a_head_and_an_unknown_part_are_refused(tmp_path, book):
    (tmp_path / "a.md").write_text("# no head\n")
    with pytest.raises(BadInput, match="a head between"):
        read_chapter(tmp_path / "a.md")
    used = {m for p in sources for m in re.findall(r"<!-- (\w+)", p.read_text())}
    assert used <= set(FILLERS) and len(GUIDE) == len(set(GUIDE))


def test_what_a_ranker_makes_of_a_model_is_no_point_of_its_curve(book):
    ours = [x for x in book.lines if x.where.startswith("manifests/nyc-gpu/runs/none/")]
    own = next(x for x in ours if x.metric == "Acc@1" and not x.slice)
    blend = replace(own, method="LightGBM ranker + LLM4POI*", value=0.9)
    results = book.root / "papermill_runs/results"
    points = collect_curve([blend, *book.lines], results)
    assert points.equals(collect_curve(book.lines, results)) and len(points) >= 6
