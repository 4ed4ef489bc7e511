"The pages of results: every number is there, every link leads somewhere, no real data are shown."

import html
import json
import posixpath
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pandas as pd
import pytest

root = Path(__file__).parent.parent
results = root / "papermill_runs" / "results"
executed = sorted(results.glob("executed/**/*.ipynb"))
movies = root.parent / "shared" / "data" / "movies"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    "Folder of the pages, as the site's builder reads them."
    from recnb.pages import write_pages

    folder = tmp_path_factory.mktemp("proc")
    write_pages(folder, root)
    return folder / "results"


@pytest.fixture(scope="module")
def texts(pages):
    return {
        p.relative_to(pages).as_posix(): p.read_text(encoding="utf-8")
        for p in sorted(pages.rglob("*.qmd"))
    }


def test_executed_copies_are_small_and_hold_no_folder_of_a_machine():
    assert executed
    for path in executed:
        text = path.read_text(encoding="utf-8")
        nbformat.validate(nbformat.reads(text, 4))
        assert len(text.encode()) < 300_000, path
        assert not re.search(r"(?<![\w.])(/root|/home|/work|/tmp|\.\./shared)\b", text), path
        assert (results / "manifests" / path.relative_to(results / "executed").parts[0]).is_dir()


def shown_by(path):
    "What the outputs of a notebook show, as one text."
    nb = json.loads(path.read_text(encoding="utf-8"))
    outputs = [o for c in nb["cells"] for o in c.get("outputs", [])]
    data = [
        o.get("text") or " ".join(o["data"].values()) for o in outputs if "image/png" not in str(o)
    ]
    return "\n".join("".join(x) for x in data)


def test_executed_copies_show_no_rows_of_real_data():
    texts = {p: shown_by(p) for p in executed}
    for path, text in texts.items():
        assert not re.search(r"\b4[01]\.\d{4,}|-7[34]\.\d{4,}", text), path  # a place in New York
        assert not re.search(r"POI id \d|will visit POI|Recent ratings, one a line", text), path


@pytest.mark.skipif(not movies.is_dir(), reason="SIREN's Movies are not here")
def test_executed_copies_name_no_title_of_the_real_data():
    from recnb.rating import reviews

    made = root / "papermill_runs" / "runs" / "movies-gpu" / "datasets" / "movies" / "reviews"
    if not (made / "interactions.parquet").exists():
        pytest.skip(f"{reviews.__name__} was not run on Movies here")
    titles = set(pd.read_parquet(made / "interactions.parquet", columns=["title"]).title.dropna())
    titles = [x for x in titles if len(x.split()) > 2 and len(x) > 14]
    text = "\n".join(shown_by(p) for p in executed)
    assert not [x for x in titles if x in text]


def targets(page, text):
    "The links of a page: the page they lead to, below results/, and the anchor."
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:href|src)="([^"]+)"', text)
    for link in map(html.unescape, found):
        if re.match(r"[a-z]+:", link):
            continue
        to, _, anchor = link.partition("#")
        to = posixpath.normpath(posixpath.join(posixpath.dirname(page), to)) if to else page
        yield re.sub(r"\.html$", ".qmd", to), anchor


def test_every_link_leads_to_a_page_and_every_anchor_is_there(pages, texts):
    for page, text in texts.items():
        for to, anchor in targets(page, text):
            if to.startswith("../"):  # the library, the guide
                if re.match(r"\.\./(poi|rating)/", to):
                    assert (root / "nbs" / to[3:]).with_suffix(".ipynb").exists(), (page, to)
                continue
            assert to in texts or (pages / to).exists(), (page, to)
            if anchor and to != "numbers.qmd":  # its anchors are filters
                assert f"{{#{anchor}}}" in texts[to], (page, to, anchor)


def test_every_number_and_every_manifest_has_its_page(pages, texts):
    from recnb.recorded import read_recorded

    lines, _ = read_recorded(root)
    data = (pages / "numbers-data.js").read_text(encoding="utf-8")
    data = json.loads(data.removeprefix("window.recnbNumbers = ").rstrip(";\n"))
    assert len(data["rows"]) == len(lines)
    for where in {x.where for x in lines}:
        page, _, anchor = data["pages"][where].partition("#")
        text = texts[page.replace(".html", ".qmd")]
        assert f"{{#{anchor}}}" in text if anchor else f"results/{where}" in text
    kept = [p.relative_to(results) for p in results.glob("manifests/**/*.json")]
    assert all(p.as_posix().removesuffix(".json") + ".qmd" in texts for p in kept)


def test_every_table_of_the_repository_is_on_a_page(texts):
    for file in sorted((results / "tables").glob("*.md")):
        rows = file.read_text(encoding="utf-8").count("\n|")
        parts = [t for p, t in texts.items() if re.match(rf"tables/{file.stem}(-[a-z]|\.qmd)", p)]
        parts = parts if "-" in file.stem else [texts[f"tables/{file.stem}.qmd"]]
        heads = sum(t.count("<thead>") for t in parts)
        assert sum(t.count("<tr>") for t in parts) == rows - heads, (
            file
        )  # all but the line of marks


def test_pages_are_light_and_readable(texts):
    for page, text in texts.items():
        assert len(text.encode()) < 400_000, page
        body = re.sub(r"(?s)<pre.*?</pre>|````.*?````|```.*?```", "", text.split("---", 2)[2])
        levels = [1] + [len(m) for m in re.findall(r"^(#+) ", body, re.M)]
        assert all(b <= a + 1 and b > 1 for a, b in zip(levels, levels[1:])), (page, levels)
        assert all(re.search(r'alt="[^"]{6,}"', x) for x in re.findall(r"<img[^>]*>", body)), page
        assert all(len(x) > 5 for x in re.findall(r"!\[([^\]]*)\]", body)), page
        away = re.findall(r'(?:\]\(|(?:src|href)=")(https?://[^)"]+)', body)
        known = ("https://github.com/", "https://openreview.net/")
        assert all(x.startswith(known) for x in away), page


def test_audits_give_a_verdict_on_every_claim(texts):
    genup, siren = texts["audit-genup.qmd"], texts["audit-siren.qmd"]
    assert genup.count("**Of ") >= 15 and siren.count("**Verdict**") >= 6
    assert genup.count("papermill nbs/studies") == 1 and "make study RECIPE=movies" in siren


# The script of the table, in a browser.

chromium = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def ask(pages, texts):
    "The rows and the words of the table of numbers at an address."
    if not chromium:
        pytest.skip("no Chromium here")
    body = texts["numbers.qmd"].split("---", 2)[2]
    (pages / "plain.html").write_text(
        f"<!doctype html><html><body>{body}</body></html>", encoding="utf-8"
    )

    def asked(address):
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000"]
        url = f"file://{pages}/plain.html{address}"
        run = subprocess.run(
            [chromium, *options, "--dump-dom", url], capture_output=True, timeout=60
        )
        text = run.stdout.decode()
        rows = re.findall(r"<tr>(.*?)</tr>", text.partition("<tbody>")[2], re.S)
        cells = [[re.sub("<[^>]*>", "", c) for c in re.findall(r"<td.*?</td>", r)] for r in rows]
        return cells, re.search(r'id="count"[^>]*>([^<]*)<', text)[1], text

    return asked


def test_the_table_of_numbers_filters_and_sorts(ask):
    rows, said, text = ask("#dataset=nyc&metric=Acc@1&about=whole&kind=measured&sort=value&down=1")
    values = [float(r[1]) for r in rows]
    assert len(rows) > 10 and values == sorted(values, reverse=True)
    assert {r[4] for r in rows} == {"New York"} and {r[6] for r in rows} == {"measured"}
    assert said.startswith(f"{len(rows)} of ") and 'aria-sort="descending"' in text
    assert text.count("<select") == 8 and re.search(r"<th[^>]*><button", text)  # by keyboard too


def test_the_table_of_numbers_leads_from_a_manifest_to_its_numbers(ask, texts):
    page = "manifests/nyc-baselines/baselines/ranker-no-time/ranker/poi.ranker.qmd"
    address = re.search(r"numbers\.html(#from=[\w-]+)", texts[page])[1]
    rows, said, _ = ask(address)
    assert {r[0] for r in rows} == {"LightGBM ranker"} and said.startswith(f"{len(rows)} of ")


def test_the_page_of_numbers_is_readable_without_the_script(texts):
    rows = re.findall(r"<tr><td>.*", texts["numbers.qmd"])
    assert len(rows) > 60 and all('<a href="' in row for row in rows)
