"""docs/benchmarks/speed.md from what the benchmarks wrote."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from measuring import is_met

TITLES = {
    "chunk_stepping": "Stepping a chunk",
    "rollout": "Rollout",
    "data_path": "The way of an image",
    "policy_inference": "Deciding",
    "update": "Update",
    "gae_and_loss": "GAE and loss",
    "checkpoint": "Checkpoint",
    "evaluation": "Evaluation",
    "end_to_end": "End to end",
}
"""Every benchmark, in the order of the page: files of scripts/bench."""

HEAD = """# Measured: speed, layer by layer

<!-- Written by scripts/bench/run.py (make bench). -->

Every benchmark has its reference in the same run: the loops take turns, a ratio is formed of each pair of turns, and
what is printed is the median with the quartiles in brackets. So other jobs on the machine hit both sides of a ratio;
they slow every rate down. What stands alone was counted, not timed.
"""

ELSEWHERE = """## Minutes to +20 points

They are not measured by `make bench`: a recipe takes longer than all of this together. `scripts/bench_recipe.py` runs
recipes over seeds and reports points, steps and minutes: [PushCube](push_cube.md), [SimplerEnv](simpler_env_cpu.md).
"""


def render(found: Mapping[str, Mapping[str, Any]], command: str, comments: str = "") -> str:
    """The page.

    Args:
        found: by layer, what each benchmark printed.
        command: that ran them.
        comments: a section of prose about the numbers, kept from the page before.
    """
    known = {layer: found[layer] for layer in TITLES if layer in found}
    parts = [HEAD, f"```\n{command}\n```\n", machine(known), targets(known), comments, *map(section, known.values())]
    absent = [f"`{layer}`" for layer in TITLES if layer not in found]
    if absent:
        parts.append(f"Not measured so far: {', '.join(absent)}.\n")
    return "\n".join(part for part in [*parts, ELSEWHERE] if part)


def machine(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Where and beside what: loads are of the whole machine, the benchmark included."""
    lines = []
    for about in dict.fromkeys(_machine(one) for one in found.values()):
        of = [one for one in found.values() if _machine(one) == about]
        loads = [one["machine"][when] for one in of for when in ("load_before", "load_after")]
        dates = sorted(one["machine"]["date"] for one in of)
        minutes = sum(one["seconds"] for one in of) / 60
        lines.append(
            f"{about}; {dates[0]} to {dates[-1]}, {minutes:.1f} minutes in all. Load averages before and after a "
            f"benchmark were {min(loads):.1f} to {max(loads):.1f}.\n"
        )
    return "\n".join(lines)


def _machine(one: Mapping[str, Any]) -> str:
    there, packages = one["machine"], one["versions"]
    named = ", ".join(
        f"{name} {packages[name]}" for name in ("torch", "ray", "mani_skill", "numpy") if name in packages
    )
    return (
        f"{there['cpu']}, {there['memory_gb']:.0f} GB, Python {packages['python']}, {named}, "
        f"rlvla {packages.get('git_commit', 'unknown')}"
    )


def targets(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Every claim that has a target."""
    rows = [
        (TITLES[layer], claim["name"], target_of(claim), spread_of(claim), "yes" if is_met(claim) else "**no**")
        for layer, one in found.items()
        for claim in one["claims"]
        if is_met(claim) is not None
    ]
    if not rows:
        return ""
    return "## Targets\n\n" + table(("layer", "", "target", "measured", "met"), rows)


def section(one: Mapping[str, Any]) -> str:
    layer = one["layer"]
    lines = [f"## {TITLES[layer]}\n", f"`{one['command']}`: {one['about']}.\n"]
    rows = [(row["name"], row["unit"], spread_of(row)) for row in one["rows"]]
    lines.append(table(("", "unit", "median [quartiles]"), rows))
    claims = [(claim["name"], spread_of(claim)) for claim in one["claims"]]
    lines.append(table(("ratio or count", "median [quartiles]"), claims))
    lines += [f"* {note}" for note in one["notes"]]
    return "\n".join([*lines, ""] if one["notes"] else lines)


def target_of(claim: Mapping[str, Any]) -> str:
    words = {"least": "at least", "most": "at most", "exactly": "exactly"}
    return next(f"{word} {number(claim[key])}" for key, word in words.items() if key in claim)


def spread_of(one: Mapping[str, Any]) -> str:
    """Median and quartiles; the number alone where there is one."""
    if one["n"] == 1:
        return number(one["median"])
    return f"{number(one['median'])} [{number(one['low'])}, {number(one['high'])}]"


def number(value: float) -> str:
    """
    >>> number(1234.5), number(12.345), number(1.0), number(0.012345)
    ('1234', '12.3', '1', '0.0123')
    """
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(_lines(head, rows)) + "\n"


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for cells in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(cells)} |"
