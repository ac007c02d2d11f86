"""Run a command and print the most memory that it and all its descendants held at once. Linux only.

    .venv/bin/python scripts/measure_memory.py make train

Sums the proportional set size (PSS), in which a page shared by n processes counts 1/n to each, once a second. The
last line on stdout is one JSON object; the exit status is the command's.
"""

import json
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    process = subprocess.Popen(sys.argv[1:])
    peak, count = 0, 0
    while process.poll() is None:
        family = descendants(process.pid)
        total = sum(map(pss_kb, family))
        if total > peak:
            peak, count = total, len(family)
        time.sleep(1.0)
    print(json.dumps({"command": " ".join(sys.argv[1:]), "peak_mb": peak // 1024, "processes": count}))
    sys.exit(process.returncode)


def descendants(root: int) -> list[int]:
    """A process and all below it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in brackets, may hold anything; the parent comes second after it.
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += children.get(pid, [])
    return found


def name_of(pid: int) -> str:
    """What a process calls itself; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0]
    except OSError:
        return ""


def inheriting(variable: str) -> list[int]:
    """Processes whose environment has ``NAME=value``: what a command started, even if its parents are gone."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if variable.encode() in environment.read_bytes().split(b"\0"):
                found.append(int(environment.parent.name))
        except OSError:
            continue
    return found


def pss_kb(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")), 0)


if __name__ == "__main__":
    main()
