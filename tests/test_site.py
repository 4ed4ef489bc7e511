"The site: built once, then every page checked, in the files and in a browser."

import functools
import json
import re
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from chromium import Chromium, find_chromium

from recnb.definitions import convert_notebook
from recnb.faults import read_pages
from recnb.site import build_site
from recnb.stages import list_stages

ROOT = Path(__file__).parent.parent
CONTRAST = (Path(__file__).parent / "contrast.js").read_text()
LEFT_OUT = (".git", ".venv", "_docs", "_proc")


@pytest.fixture(scope="session")
def site(common):
    "The folder of the pages, and their faults."

    def make(folder):
        for entry in ROOT.iterdir():
            if entry.name not in LEFT_OUT:
                (folder / entry.name).symlink_to(entry)
        (folder / "faults.json").write_text(json.dumps(build_site(folder)))

    made = common("site", make)
    return made / "_docs", json.loads((made / "faults.json").read_text())


@pytest.fixture(scope="module")
def pages(site):
    "Place → what the page holds."
    return read_pages(site[0])


def test_no_page_has_a_fault(site):
    "Links and anchors, requests, alternative texts, headings and sizes, of all pages."
    assert not site[1]


def test_nothing_leads_to_where_the_repository_is_not_yet(pages):
    for place, page in pages.items():
        away = [x for x in page.links if re.match(r"https://(github\.com/recnb|recnb\.git)", x)]
        assert not away, place


def test_parameters_of_every_stage_are_a_table(pages, site):
    for stage in list_stages():
        place = f"{stage.task}/{stage.number:02d}_{stage.name.split('.')[1]}.html"
        text = (site[0] / place).read_text(encoding="utf-8")
        boxes = re.findall(r'<div class="parameters">.*?</table>', text, re.S)  # one a dataclass
        assert any(all(f"<code>{x}</code>" in box for x in stage.needed) for box in boxes), place
        assert not re.search(r"VAR_POSITIONAL|VAR_KEYWORD", text), place


def test_formulas_are_mathml(site):
    text = (site[0] / "rating/07_alignment.html").read_text(encoding="utf-8")
    formulas = re.findall(r"<math .*?</math>", text, re.S)
    assert len(formulas) > 10 and not any("\\" in x for x in formulas)
    assert "katex" not in text and r"\(" not in text


def test_public_names_lead_to_their_pages(pages):
    assert "../00_stages.html#badinput" in pages["rating/07_alignment.html"].links


def test_hidden_cells_stay_hidden():
    cells = [
        dict(cell_type="markdown", metadata={}, source="# A\n\n> b"),
        dict(cell_type="code", metadata={}, outputs=[], source="#| hide\nsecret = 1"),
        dict(cell_type="code", metadata={}, outputs=[], source="#| export\nx = 1"),
        dict(cell_type="code", metadata={}, outputs=[], source="#| eval: false\n%pip x\nx"),
    ]
    kept = [c["source"] for c in convert_notebook(dict(cells=cells))[0]["cells"]]
    assert "title: A" in kept[0] and "code-fold" in kept[1] and kept[2] == "x" and len(kept) == 3


@pytest.fixture(scope="module")
def browser():
    if not find_chromium():
        pytest.skip("needs Chromium")
    window = Chromium(find_chromium())
    yield window
    window.close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *words):
        pass


@pytest.fixture(scope="module")
def address(site):
    "Of a server of the pages."
    handler = functools.partial(_Quiet, directory=str(site[0]))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def choose(pages):
    "Every page, but of manifests, executed studies and files of the repository some of each."
    kinds = {}
    for place in pages:
        kind = re.match(r"results/(manifests|studies)/|files/", place)
        kinds.setdefault(kind[0] if kind else place, []).append(place)
    return [place for places in kinds.values() for place in places[:: len(places) // 6 + 1]]


TURN = """(async (wanted) => {
    const still = "<style>* { transition: none !important }</style>";
    document.head.insertAdjacentHTML("beforeend", still);
    document.querySelector(".quarto-color-scheme-toggle").click();
    localStorage.clear();
    const dark = () => document.documentElement.classList.contains("quarto-dark");
    for (let i = 0; i < 150 && dark() !== wanted; i++) {
        await new Promise((done) => setTimeout(done, 20));
        dispatchEvent(new Event("load")); // the page looks again which of its styles are there
    }
    return dark() === wanted;
})(%s)"""
# the text of another page in the place of this one's, as if it had been opened
SHOW = """(async (address) => {
    const text = await (await fetch(address)).text();
    history.replaceState(null, "", address);
    const page = new DOMParser().parseFromString(text, "text/html");
    document.body.replaceWith(document.adoptNode(page.body));
    await Promise.all([...document.images].map((image) => image.decode().catch(() => {})));
    dispatchEvent(new Event("load"));
})(%s)"""


def read_frame(file):
    "Styles and scripts of a page: what two pages have in common that differ in their text alone."
    text = file.read_text(encoding="utf-8")
    found = re.findall(r"<link\b[^>]*>|<style\b.*?</style>|<script\b.*?</script>", text, re.S)
    return re.sub(r"(?<=[\"'])(\.{1,2}/)+", "", "".join(found))


def list_faults(browser, place, scheme):
    "Texts that cannot be read on the page that is shown, and whether it is too wide."
    wide = browser.evaluate("document.documentElement.scrollWidth")
    faults = [f"{wide} px wide"] if wide > 390 else []
    return [f"{place}, {scheme}: {x}" for x in faults + browser.evaluate(CONTRAST)]


def test_a_browser_asks_nobody_else_and_can_read_it(browser, address, pages, site):
    """No request leaves the site; no page is wider than a phone; contrast is AA, light and dark.

    Of pages with the same styles and scripts one is opened, which takes the texts of the others.
    """
    faults, alike = [], {}
    for place in choose(pages):
        alike.setdefault(read_frame(site[0] / place), []).append(place)
    browser.resize(390)
    browser.prefer("light")
    for first, *others in alike.values():
        browser.open(address + first)
        faults += list_faults(browser, first, "light")
        for scheme in ("dark", "light"):
            assert browser.evaluate(TURN % json.dumps(scheme == "dark")), first
            faults += list_faults(browser, first, "dark") if scheme == "dark" else []
            for place in others:
                browser.evaluate(SHOW % json.dumps(address + place))
                faults += list_faults(browser, place, scheme)
    left = {x for x in browser.requests if not x.startswith((address, "data:", "about:"))}
    assert not left and not faults, "\n".join([*left, *faults[:40]])


SEARCH = """fetch("search.json").then((r) => r.json())
    .then((x) => new Fuse(x).search(%s).map((hit) => hit.item.href))"""


@pytest.mark.parametrize(
    "query, first, among",
    [
        (
            "GETNext",
            r"guide/methods/getnext\.html$|poi/15_getnext\.html$",
            r"poi/15_getnext\.html$",
        ),
        ("recipes", r"recipes\.html$", r"12_recipes\.html$"),
        (
            "learning_rate",
            r"#parameter-learning_rate$",
            r"poi/08_sft\.html#parameter-learning_rate$",
        ),
        ("BadInput", r"00_stages\.html#badinput$", r"."),
        ("checkins", r".", r"poi/02_checkins\.html$"),
    ],
)
def test_search_finds(browser, address, query, first, among):
    browser.open(address + "index.html")
    hits = browser.evaluate(SEARCH % json.dumps(query))
    assert re.search(first, hits[0]) and any(re.search(among, x) for x in hits[:8]), hits


def test_search_box_leads_to_a_page(browser, address):
    browser.resize(1280)
    browser.open(address + "index.html")
    browser.evaluate(
        "(() => { const box = document.querySelector('.smalldocs-search input');"
        " box.focus(); box.value = 'STHGCN'; box.dispatchEvent(new Event('input')); })()"
    )
    shown = """(async () => {
        const count = () => document.querySelectorAll("a.search-result").length;
        for (let i = 0; i < 150 && !count(); i++)
            await new Promise((done) => setTimeout(done, 20));
        return count();
    })()"""
    assert browser.evaluate(shown) > 0
