"Rules for the notebooks that no test of their content would notice."

import ast
import json
import re
import sys
from pathlib import Path

root, faults = Path(__file__).parent.parent, []
order, cells = {}, []
for nb in sorted((root / "nbs").rglob("*.ipynb")):
    if ".ipynb_checkpoints" in nb.parts:
        continue
    book, name = json.loads(nb.read_text()), nb.relative_to(root).as_posix()
    code = ["".join(c["source"]) for c in book["cells"] if c["cell_type"] == "code"]
    tagged = sum("parameters" in c["metadata"].get("tags", []) for c in book["cells"])
    if "/studies/" in name and tagged != 1:
        faults.append(f"{name}: {tagged} cells tagged parameters, expected exactly one")
    exp = re.search(r"#\|\s*default_exp\s+(\S+)", "\n".join(code))
    if exp:
        order[exp[1]] = (nb, code)
    for i, c in enumerate(code, 1):
        lines = sum(1 for l in c.splitlines() if l.strip() and not l.startswith("#|"))
        cells.append(lines)
        if lines > 50:
            faults.append(f"{name}: code cell {i} has {lines} lines, at most 50")

rank = {m: (m.split(".")[0] if "." in m else "", nb.name) for m, (nb, _) in order.items()}
for module, (nb, code) in order.items():
    for cell in code:
        if not re.search(r"^#\|\s*exports?\b", cell, re.M):
            continue
        tree = ast.parse(re.sub(r"^[%!].*$", "pass", cell, flags=re.M))
        names = [
            f"{n.module}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module
        ]
        names += [
            f"{n.module}.{a.name}"
            for n in ast.walk(tree)
            if isinstance(n, ast.ImportFrom) and n.module
            for a in n.names
        ]
        names += [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
        for used in {n.removeprefix("recnb.") for n in names if n.startswith("recnb.")} & set(
            order
        ):
            (mine, number), (its, other) = rank[module], rank[used]
            if its not in ("", mine) or (its == mine and other >= number) or (mine == "" and its):
                faults.append(
                    f"{nb.relative_to(root)}: recnb.{module} imports recnb.{used}, which comes later in the reading order"
                )

cells.sort()
median, p90 = cells[len(cells) // 2], cells[int(0.9 * len(cells))]
print(
    f"{len(cells)} code cells: median {median} lines, nine of ten under {p90 + 1}, longest {cells[-1]}"
)
if median > 5 or p90 > 18:
    faults.append("cells have grown: the median must be at most 5 lines and nine of ten at most 18")
print(*faults, sep="\n")
sys.exit(bool(faults))
