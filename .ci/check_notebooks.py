"Rules for notebooks and names that neither ruff nor a test of their content would notice."

import ast
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
LONGEST_CELL, LONGEST_FUNCTION = 60, 50  # lines
MEDIAN, NINE_OF_TEN = 8, 25  # lines of a cell
ONE_WORD = 0.05  # share of public functions whose name is one word
EVERYWHERE = {"run", "Params"}  # what every stage has


def read_notebooks():
    "Path, cells and the code of each notebook."
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
            yield path, cells, code


def parse_cell(code):
    "The syntax tree of a cell, without its magics."
    return ast.parse(re.sub(r"^[%!].*$", "pass", code, flags=re.M))


def count_lines(code):
    "Lines that hold something, directives apart."
    return sum(1 for line in code.splitlines() if line.strip() and not line.startswith("#|"))


def is_exported(code):
    return re.search(r"^#\|\s*exports?\b", code, re.M)


def check_sizes(notebooks):
    "No cell and no function is too long, and most cells are short."
    sizes = []
    for path, _, code in notebooks:
        for i, cell in enumerate(code, 1):
            sizes.append(count_lines(cell))
            if sizes[-1] > LONGEST_CELL:
                yield f"{path}: code cell {i} has {sizes[-1]} lines, at most {LONGEST_CELL}"
            for node in ast.walk(parse_cell(cell)):
                if isinstance(node, ast.FunctionDef):
                    lines = count_lines(ast.unparse(node))
                    if lines > LONGEST_FUNCTION:
                        yield f"{path}: {node.name} has {lines} lines, at most {LONGEST_FUNCTION}"
    sizes.sort()
    median, tenth = sizes[len(sizes) // 2], sizes[int(0.9 * len(sizes))]
    print(f"{len(sizes)} code cells: median {median}, nine of ten ≤ {tenth}, longest {sizes[-1]}")
    if median > MEDIAN or tenth > NINE_OF_TEN:
        yield f"cells have grown: the median is at most {MEDIAN}, nine of ten at most {NINE_OF_TEN}"


def check_parameters(notebooks):
    "A study has exactly one cell of parameters."
    for path, cells, _ in notebooks:
        tagged = sum("parameters" in c["metadata"].get("tags", []) for c in cells)
        if "studies" in path.parts and tagged != 1:
            yield f"{path}: {tagged} cells tagged parameters, expected exactly one"


def list_imports(cell):
    "The modules of recnb that a cell imports, wherever it does."
    for node in ast.walk(parse_cell(cell)):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def check_order(modules):
    "A module imports from the floor, or from a smaller number in its own folder."
    place = {m: (m.rpartition(".")[0], path.name) for m, (path, _) in modules.items()}
    for module, (path, code) in modules.items():
        folder, number = place[module]
        for cell in filter(is_exported, code):
            for used in {m.removeprefix("recnb.") for m in list_imports(cell)} & modules.keys():
                its, other = place[used]
                later = its == folder and other >= number
                if later or its not in ("", folder):
                    yield f"{path}: imports recnb.{used}, which comes later in the reading order"


def check_names(modules):
    "A public name has one owner, and most functions say what they do in more than one word."
    owners, words = defaultdict(list), []
    for module, (_, code) in modules.items():
        for cell in filter(is_exported, code):
            for node in parse_cell(cell).body:
                if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    continue
                if node.name.startswith("_") or node.name in EVERYWHERE:
                    continue
                owners[node.name].append(module)
                if isinstance(node, ast.FunctionDef):
                    words.append("_" in node.name)
    for name, found in sorted(owners.items()):
        if len(found) > 1:
            yield f"{name} is defined in {' and '.join(sorted(found))}: one name, one owner"
    share = 1 - sum(words) / len(words)
    print(f"{len(words)} public functions, {share:.0%} with a name of one word")
    if share > ONE_WORD:
        yield f"names of one word: {share:.0%}, at most {ONE_WORD:.0%}"


def main():
    notebooks, modules = list(read_notebooks()), {}
    for path, _, code in notebooks:
        exported = re.search(r"#\|\s*default_exp\s+(\S+)", "\n".join(code))
        if exported:
            modules[exported[1]] = (path, code)
    faults = [*check_sizes(notebooks), *check_parameters(notebooks)]
    faults += [*check_order(modules), *check_names(modules)]
    print(*(fault.replace(f"{ROOT}/", "") for fault in faults), sep="\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
