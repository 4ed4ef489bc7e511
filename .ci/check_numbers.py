"""Every number in hand-written prose leads to what it was taken from.

Tables, answers and pictures are rendered from results, manifests and recipes. A number that a
person typed into a sentence stands in .ci/numbers.yaml with the file and the text that it comes
from, or with the reason why it needs none (a year, a definition). A dated entry of LOG.md holds
more numbers than that; it names the commit at which they can be read again. The counts of
data/README.md are in a manifest, a printed table, a notebook of a reader or a test, or have an
entry.
"""

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import yaml

ROOT = Path(__file__).parent.parent
PAGES = ("nbs/index.ipynb", "nbs/guide/**/*.md", "CONTRIBUTING.md", "data/README.md")
COUNTS = {  # page of counts → where they are counted, or printed
    "data/README.md": (
        *("papermill_runs/results/manifests/**/*.json", "papermill_runs/published/*"),
        *("nbs/poi/0*.ipynb", "nbs/rating/0[0-2]*.ipynb", "tests/*.py"),
    )
}
NOT_PROSE = (
    r"\A---\n.*?\n---\n",  # the head of a page
    r"```.*?```|<!--.*?-->|<[^>]+>",  # code, parts to be filled, tags
    r"`[^`\n]+`",
    r"(?<=\])\([^)]*\)|https?://\S+",  # where links lead
    r"^\s*\d+\. ",  # numbers of a list
)
# not parts of names: Acc@1, SmolLM2-135M, MovieLens-100K, 4B, GPT-4
NUMBER = re.compile(r"(?<![\w@.,-])\d[\d,]*(?:\.\d+)?%?(?!\w|-[A-Za-z])|(?<![\w@.])\.\d+")
SPELLED = re.compile(
    r"\b(two|three|four|five|six|eight|ten|twelve|twenty|thirty) (minutes|hours|days)\b"
)
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
    plain = re.sub(r"(?<=\d)[,_](?=\d{3})", "", text)
    for found in re.findall(r"(?:\d+(?:\.\d+)?|\.\d+)(?: ?%)?", plain):
        value = float(found.rstrip("% "))
        yield {value, round(value / 100, 6)} if found.endswith("%") else {value}


def check_source(said, file, needle):
    "Why a number does not come from where its entry says; empty where it does."
    source = ROOT / file
    if not source.is_file():
        return f"{file} is not there"
    if needle not in source.read_text(encoding="utf-8"):
        return f"{file} does not say {needle!r}"
    known = set().union(*list_values(needle))
    same = all(values & known for values in list_values(said))
    return "" if same else f"{needle!r} in {file} is another number"


def list_counts(page):
    "The numbers that a page of counts may say without an entry."
    files = [file for pattern in COUNTS.get(page, ()) for file in ROOT.glob(pattern)]
    return {v for f in files for vs in list_values(f.read_text(encoding="utf-8")) for v in vs}


def check_page(page, prose, entries, known=frozenset()):
    "The numbers of a page that nothing stands behind, and entries of numbers that are gone."
    covered = set()
    for said, *source in entries:
        places = [m.start() for m in re.finditer(re.escape(said), prose)]
        if not places:
            yield f"{page}: {said!r} is in .ci/numbers.yaml, and not on the page"
        for start in places:
            covered |= set(range(start, start + len(said)))
        if len(source) == 2 and (fault := check_source(said, *source)):
            yield f"{page}: {said!r}: {fault}"
    for found in (*NUMBER.finditer(prose), *SPELLED.finditer(prose)):
        counted = any(known & values for values in list_values(found[0]))
        if found.start() not in covered and not counted:
            near = prose[max(0, found.start() - 40) : found.end() + 20]
            yield f"{page}: {found[0]} in “{near}” has no source in .ci/numbers.yaml"


def list_results():
    "What a recipe may expect of a task: whole headline numbers, means and spreads, differences."
    files = [*ROOT.glob("papermill_runs/published/*.jsonl")]
    files += [*ROOT.glob("papermill_runs/results/*.jsonl")]
    out, seeds = defaultdict(set), defaultdict(list)
    for file in files:
        for x in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            if x["value"] is None or x["slice"]:
                continue
            if x["metric"].endswith("difference"):
                ends = (x["value"], x.get("users_low"), x.get("users_high"))
                out[x["task"]] |= {abs(v) for v in ends if v is not None}
            elif x["metric"] in ("Acc@1", "Acc@5", "MAE", "RMSE"):
                row = (
                    x["task"],
                    x["dataset"],
                    x["method"],
                    x["model"],
                    x["metric"],
                    str(x["settings"]),
                )
                seeds[row].append(x["value"])
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
    faults = [f"{page}: in .ci/numbers.yaml, and no page" for page in known.keys() - pages.keys()]
    for page, prose in pages.items():
        faults += check_page(page, prose, known.get(page, []), list_counts(page))
    results = list_results()
    for path in sorted(ROOT.glob("papermill_runs/recipes/*.yaml")):
        r = yaml.safe_load(path.read_text(encoding="utf-8"))
        said = (r.get("about") or {}).get("expect") or ""
        faults += check_expectation(path.name, said, results.get(r["task"], []))
    return faults + [*check_log((ROOT / "LOG.md").read_text(encoding="utf-8"), find_commits())]


if __name__ == "__main__":
    found = check_all()
    print(*found, sep="\n")
    sys.exit(bool(found))
