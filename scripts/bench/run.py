"""Run the benchmarks of every layer and write docs/benchmarks/speed.md: what `make bench` does.

    .venv/bin/python scripts/bench/run.py [--layers chunk_stepping update ...] [--again] [--no-run] [--smoke]

Each runs in a process of its own and leaves OUTPUT/LAYER.json; one that is there is not run again without --again, so a
call that was stopped goes on. The last line is JSON: by layer, whether its targets are met.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import ROOT, is_met
from page import TITLES, render

HERE = Path(__file__).resolve().parent
PAGE = ROOT / "docs" / "benchmarks" / "speed.md"
COMMENTS = ("<!-- comments -->\n", "<!-- end of comments -->\n")
"""What stands between them on the page is written by people, and stays."""


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--again", action="store_true", help="also what is there already")
    parser.add_argument("--no-run", action="store_true", help="write the page from what there is")
    parser.add_argument("--smoke", action="store_true", help="in the smallest sizes: whether they run, not how fast")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "bench")
    parser.add_argument("--page", type=Path, help="docs/benchmarks/speed.md, with --smoke OUTPUT/speed.md")
    arguments = parser.parse_args(words)
    output: Path = arguments.output
    page: Path = arguments.page or (output / "speed.md" if arguments.smoke else PAGE)
    output.mkdir(parents=True, exist_ok=True)
    failed = []
    for layer in () if arguments.no_run else arguments.layers:
        if arguments.again or not (output / f"{layer}.json").exists():
            began = time.monotonic()
            print(f"{layer} ...", file=sys.stderr, flush=True)
            worked = run(layer, output, smoke=arguments.smoke)
            failed += [] if worked else [layer]
            said = "done" if worked else f"failed, see {output / layer}.log"
            print(f"{layer}: {said}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    found = read(output)
    page.write_text(render(found, "make bench", comments_of(page)))
    print(json.dumps({layer: [is_met(claim) for claim in one["claims"]] for layer, one in found.items()}))
    return 1 if failed else 0


def run(layer: str, output: Path, *, smoke: bool) -> bool:
    """One benchmark in a process of its own; whether it worked."""
    command = [sys.executable, str(HERE / f"{layer}.py"), *(smallest(layer) if smoke else [])]
    paths = [str(ROOT), str(ROOT / "algos"), str(ROOT / "envs"), os.environ.get("PYTHONPATH", "")]
    # A checkout measures itself, whatever else is installed.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with (output / f"{layer}.log").open("w") as log:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return False
    # Whole or absent: a file that is there is not measured again.
    part = output / f".{layer}.json"
    part.write_text(json.dumps(json.loads(lines[-1]), indent=1) + "\n")
    part.replace(output / f"{layer}.json")
    return True


def smallest(layer: str) -> list[str]:
    """The arguments that a benchmark calls SMOKE."""
    import ast

    for node in ast.parse((HERE / f"{layer}.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SMOKE":
            found: list[str] = ast.literal_eval(node.value)
            return found
    raise RuntimeError(f"scripts/bench/{layer}.py has no SMOKE: the arguments of a run that takes seconds.")


def read(output: Path) -> dict[str, dict[str, Any]]:
    return {
        layer: json.loads((output / f"{layer}.json").read_text())
        for layer in TITLES
        if (output / f"{layer}.json").exists()
    }


def comments_of(page: Path) -> str:
    """The part of a page that people wrote, with its marks; empty marks where there is none."""
    begin, end = COMMENTS
    text = page.read_text() if page.exists() else ""
    kept = text.partition(begin)[2].partition(end)[0] if end in text else "\n"
    return f"{begin}{kept}{end}"


if __name__ == "__main__":
    sys.exit(main())
