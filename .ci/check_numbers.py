"""Every number in hand-written prose leads to what it was taken from.

Tables, answers and pictures are rendered from results, manifests and recipes. A number that a
person typed into a sentence is one of these, or a fault:

- no measurement: a formula, a year, a time of the clock, the number of a section or a row, the
  level of an interval, a single digit without a unit (a rating, an exit code, an id);
- beside its source: the code cells of the same notebook hold it, or print it;
- in a notebook, a count of four digits and more that a manifest or a published row states;
- an entry of .ci/numbers.yaml, which names the recorded or published row that rounds to it, or a
  file and the text in it that it comes from, or why it needs no source.

A dated entry of LOG.md holds more numbers than that; it names the commit at which they can be
read again. The counts of data/README.md are facts of a manifest, stand in a printed table, a
notebook of a reader or a test, or have an entry. Docstrings and comments of the library say
nothing that looks like a result (a percentage, a fraction of two places, so many times as much).
"""

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from collections import defaultdict
from functools import cache
from pathlib import Path
from statistics import mean, stdev

import yaml

ROOT = Path(__file__).parent.parent
PAGES = ("nbs/**/*.ipynb", "nbs/guide/**/*.md", "CONTRIBUTING.md", "data/README.md")
COUNTS = {  # page of counts → where they are counted, or printed, beside the facts of manifests
    "data/README.md": (
        *("papermill_runs/published/*", "tests/*.py"),
        *("nbs/poi/0*.ipynb", "nbs/rating/0[0-2]*.ipynb"),
    )
}
NOT_PROSE = (
    r"\A---\n.*?\n---\n",  # the head of a page
    r"```.*?```|<!--.*?-->|<[^>]+>",  # code, parts to be filled, tags
    r"`[^`\n]+`",
    r"\$\$.*?\$\$|\$[^$\n]*\$",  # formulas
    r"(?<=\])\([^)]*\)|https?://\S+",  # where links lead
    r"^\s*\d+\. ",  # numbers of a list
)
# not parts of names: Acc@1, SmolLM2-135M, MovieLens-100K, 4B, GPT-4
NUMBER = re.compile(r"(?<![\w@.,-])\d[\d,]*(?:\.\d+)?%?(?!\w|-[A-Za-z])|(?<![\w@.])\.\d+")
WORDS = dict(
    two=2, three=3, four=4, five=5, six=6, eight=8, ten=10, twelve=12, twenty=20, thirty=30
)
SPELLED = re.compile(rf"\b({'|'.join(WORDS)}) (minutes|hours|days)\b")
UNIT = r" ?%| ?(?:of|points?|times|seconds?|minutes?|hours?|days|[GM]i?B|ms|[mb]illion|seeds)\b"
NO_MEASUREMENT = re.compile(
    r"(?<!\d)\d{1,2}:\d\d(?::\d\d)?"
    rf"|(?<![\w.,])\d(?!\w|[.,]\d|{UNIT})"  # one digit: a rating, an exit code, an id, a step
    r"|\b(?:section|table|figure|row|step|rank|user|POI|level)s? \d[\d.]*(?:(?:, | and | to )\d+)*"
    r"|(?<![\w.,])(?:19|20)\d\d(?:-\d\d){0,2}(?![\w,]\d)"  # years and dates; a count has commas
    r"|\b(?:95|5) ?% (?:interval|level)",
    re.I,
)
RESULT = re.compile(  # what looks like one in a docstring or a comment
    r"(?<![\w.])(?!95%)\d[\d.]* ?%|(?<![\w.])(?:0?\.\d\d+|\d\.\d{3,})(?![\w.])"
    r"|\b(?:\d[\d.]*|two|three|four|five|six|eight|ten|twelve|twenty|fifty) times (?:as|more|less)"
    r"|\b(?:minutes|hours|points?) (?:less|more|better|worse|faster|slower)"
)
FULL_SIZE = dict(poi="paper.yaml", rating="paper-rating.yaml")
PLAN = re.compile(r"\b(?:comput|estimat|not (?:run|tried|timed))", re.I)  # says itself what it is
ENTRY = re.compile(r"^## (\d{4}-\d\d-\d\d.*)$", re.M)
COMMIT = re.compile(r"\b[0-9a-f]{7,40}\b")


def read_prose(path):
    "What a person wrote on a page, without code and links."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    for pattern in NOT_PROSE:
        text = re.sub(pattern, " ", text, flags=re.S | re.M)
    return " ".join(text.split())


def list_values(text):
    "The numbers of a text, each with the values that it may stand for: 20% is .2 as well."
    if spelled := SPELLED.fullmatch(text):
        yield {WORDS[spelled[1]]}
    plain = re.sub(r"(?<=\d)[,_](?=\d{3})", "", text)
    for found in re.findall(r"(?:\d+(?:\.\d+)?|\.\d+)(?: ?%)?", plain):
        value = float(found.rstrip("% "))
        yield {value, round(value / 100, 6)} if found.endswith("%") else {value}


@cache
def read_lines():
    "Every recorded and every published line."
    files = [*ROOT.glob("papermill_runs/published/*.jsonl")]
    files += [*ROOT.glob("papermill_runs/results/*.jsonl")]
    texts = (file.read_text(encoding="utf-8") for file in files)
    return [json.loads(line) for text in texts for line in text.splitlines()]


def check_rows(said, row):
    "Why no number of the rows that an entry describes rounds to one that is said; empty if all do."
    wanted = {"slice": {}, "against": ""} | row
    found = [x for x in read_lines() if all(x[k] == v for k, v in wanted.items())]
    if not found:
        return f"no recorded or published row has {row}"
    fields = ("value", "low", "high", "users_low", "users_high", "n")
    known = [abs(x[k]) for x in found for k in fields if x.get(k) is not None]
    points = "point" in said  # hundredths
    for number in re.findall(r"\d[\d,]*(?:\.\d+)?(?: ?%)?|\.\d+", said):
        hundredths = points or "%" in number
        value = float(number.rstrip("% ").replace(",", "")) / (100 if hundredths else 1)
        places = len(number.rstrip("% ").partition(".")[2]) + (2 if hundredths else 0)
        if not any(abs(value - v) <= 0.5001 * 10**-places for v in known):
            return f"no row with {row} has a number that rounds to {number}"
    return ""


def check_text(said, file, needle=None):
    "Why a number does not come from where its entry says; empty where it does, or needs no source."
    if needle is None:
        return ""
    source = ROOT / file
    if not source.is_file():
        return f"{file} is not there"
    if needle not in source.read_text(encoding="utf-8"):
        return f"{file} does not say {needle!r}"
    known = set().union(*list_values(needle))
    same = all(values & known for values in list_values(said))
    return "" if same else f"{needle!r} in {file} is another number"


@cache
def list_facts():
    "The numbers that manifests state, and how many instances published rows have."
    manifests = ROOT.glob("papermill_runs/results/manifests/**/*.json")
    facts = [json.loads(file.read_text(encoding="utf-8"))["facts"] for file in manifests]
    facts += [{"n": x["n"]} for x in read_lines() if x["source"] == "published" and x["n"]]
    return {v for vs in list_values(json.dumps(facts)) for v in vs}


def list_beside(path):
    "The numbers that the code of a notebook holds, or prints."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    texts = ["".join(cell["source"]) for cell in code]
    for shown in (out for cell in code for out in cell["outputs"]):
        made = [
            shown.get("text", ""),
            *(v for k, v in shown.get("data", {}).items() if "text" in k),
        ]
        texts += ["".join(text) for text in made]
    return {v for vs in list_values("\n".join(texts)) for v in vs}


def list_counts(page):
    "The numbers that a page may say without an entry."
    files = [file for pattern in COUNTS.get(page, ()) for file in ROOT.glob(pattern)]
    if page.endswith(".ipynb") and page != "nbs/index.ipynb":
        return list_beside(ROOT / page) | {v for v in list_facts() if v >= 1000 and v == int(v)}
    known = {v for f in files for vs in list_values(f.read_text(encoding="utf-8")) for v in vs}
    return known | list_facts() if files else set()


def check_page(page, prose, entries, known=frozenset()):
    "The numbers of a page that nothing stands behind, and entries of numbers that are gone."
    covered = set()
    for said, *source in entries:
        places = [m.start() for m in re.finditer(re.escape(said), prose)]
        if not places:
            yield f"{page}: {said!r} is in .ci/numbers.yaml, and not on the page"
        for start in places:
            covered |= set(range(start, start + len(said)))
        rows = source and isinstance(source[0], dict)
        if fault := check_rows(said, *source) if rows else check_text(said, *source):
            yield f"{page}: {said!r}: {fault}"
    covered |= {i for m in NO_MEASUREMENT.finditer(prose) for i in range(*m.span())}
    for found in (*NUMBER.finditer(prose), *SPELLED.finditer(prose)):
        counted = any(known & values for values in list_values(found[0]))
        if found.start() not in covered and not counted:
            near = prose[max(0, found.start() - 40) : found.end() + 20]
            yield f"{page}: {found[0]} in “{near}” has no source in .ci/numbers.yaml"


def list_results():
    "What a recipe may expect of a task: whole headline numbers, means and spreads, differences."
    out, seeds = defaultdict(set), defaultdict(list)
    for x in read_lines():
        if x["value"] is None or x["slice"]:
            continue
        if x["metric"].endswith("difference"):
            ends = (x["value"], x.get("users_low"), x.get("users_high"))
            out[x["task"]] |= {abs(v) for v in ends if v is not None}
        elif x["metric"] in ("Acc@1", "Acc@5", "MAE", "RMSE"):
            named = ("task", "dataset", "method", "model", "metric", "settings")
            seeds[tuple(str(x[name]) for name in named)].append(x["value"])
    for file in ROOT.glob("papermill_runs/results/manifests/**/*.json"):
        made = json.loads(file.read_text(encoding="utf-8"))
        chosen = [v for k, v in made["facts"].items() if k == "validation Acc@1"]
        out[made["stage"].partition(".")[0]] |= set(chosen)
    for (task, *_), values in seeds.items():
        out[task] |= {*values, mean(values), *([stdev(values)] if len(values) > 1 else [])}
    return out


def check_expectation(recipe, text, values):
    "Decimals in what a recipe expects that no printed or recorded number rounds to."
    for found in re.findall(r"(?<![\w@.])\d?\.\d{2,}(?!\w)", text):
        half = 0.5001 * 10 ** -len(found.partition(".")[2])
        if not any(abs(float(found) - v) <= half for v in values):
            yield f"{recipe}: it expects {found}, which is neither printed nor recorded"


def list_costs(recipe):
    "Seconds and minutes, GiB and GB of a recipe's recorded stages, rounded."
    for file in ROOT.glob(f"papermill_runs/results/manifests/{recipe}/**/*.json"):
        made = json.loads(file.read_text(encoding="utf-8"))
        seconds, memory = made["wall_time_s"], made["facts"].get("memory_mib", 0)
        yield from (round(seconds), round(seconds / 60), round(seconds / 60, 1))
        yield from (round(memory / 1024), round(memory * 1.048576 / 1000))


def check_head(path, results, entries):
    "Numbers of a recipe's head that neither its settings, published ones nor a run of it have."
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    about, page = recipe.pop("about", {}), f"papermill_runs/recipes/{path.name}"
    yield from check_expectation(path.name, about.pop("expect", ""), results[recipe["task"]])
    full = ROOT / "papermill_runs/recipes" / FULL_SIZE.get(recipe["task"], path.name)
    published = full.read_text(encoding="utf-8") if full.name != path.name else ""
    own = {v for vs in list_values(json.dumps(recipe)) for v in vs} | {*list_costs(path.stem)}
    more = {v for vs in list_values(published) for v in vs} | {v for v in list_facts() if v >= 1000}
    words = {name: " ".join(x.split()) for name, x in about.items() if isinstance(x, str)}
    for name, said in words.items():
        parts = re.split(r"; |(?<=[a-z)])\. ", re.sub(r"`[^`]+`", " ", said))
        prose = "; ".join(part for part in parts if not PLAN.search(part))
        here = [entry for entry in entries if entry[0] in prose]
        yield from check_page(page, prose, here, own if name in ("machine", "gpu") else own | more)
    known = " ".join(words.values())
    yield from (f"{page}: {e[0]!r} is not in its head" for e in entries if e[0] not in known)


def read_comments(path):
    "Docstrings and comments of a module, each with its line; names of code apart."
    text = path.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], re.sub(r"`[^`]+`", " ", token.string)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
            if said := ast.get_docstring(node, clean=False):
                yield getattr(node, "lineno", 1), re.sub(r"`[^`]+`", " ", said)


def check_comments(module, comments):
    "What looks like a result in docstrings and comments, where nobody would look for its source."
    for line, said in comments:
        for found in RESULT.finditer(said):
            yield f"{module}:{line}: {found[0]!r} in “{said.strip()}” looks like a result"


def check_log(text, is_commit):
    "Dated entries of the log that name no commit, or one that is not there."
    for title in ENTRY.findall(text):
        commits = COMMIT.findall(title.partition(" ")[2])
        if not commits:
            yield f"LOG.md: {title!r} names no commit at which its numbers can be read again"
        for commit in commits:
            if not is_commit(commit):
                yield f"LOG.md: {title!r}: no commit {commit}"


def find_commits():
    "Whether a name is a commit; True for all where the history is not at hand."
    command = ["git", "-C", str(ROOT), "rev-parse", "--is-shallow-repository"]
    known = subprocess.run(command, capture_output=True, text=True)
    if known.stdout.strip() != "false":
        return lambda name: True

    def is_commit(name):
        command = ["git", "-C", str(ROOT), "cat-file", "-e", f"{name}^{{commit}}"]
        return subprocess.run(command, capture_output=True).returncode == 0

    return is_commit


def check_all():
    "All faults."
    known = yaml.safe_load((ROOT / ".ci/numbers.yaml").read_text(encoding="utf-8"))
    paths = sorted(p for pattern in PAGES for p in ROOT.glob(pattern))
    pages = {p.relative_to(ROOT).as_posix(): read_prose(p) for p in paths}
    recipes = sorted(ROOT.glob("papermill_runs/recipes/*.yaml"))
    named = {*pages, *(p.relative_to(ROOT).as_posix() for p in recipes)}
    faults = [f"{page}: in .ci/numbers.yaml, and no page" for page in known.keys() - named]
    for page, prose in pages.items():
        faults += check_page(page, prose, known.get(page, []), list_counts(page))
    for path in sorted(ROOT.glob("recnb/**/*.py")):
        faults += check_comments(path.relative_to(ROOT).as_posix(), read_comments(path))
    results = list_results()
    for path in recipes:
        entries = known.get(path.relative_to(ROOT).as_posix(), [])
        faults += check_head(path, results, entries)
    return faults + [*check_log((ROOT / "LOG.md").read_text(encoding="utf-8"), find_commits())]


if __name__ == "__main__":
    found = check_all()
    print(*found, sep="\n")
    sys.exit(bool(found))
