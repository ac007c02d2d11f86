"""Results and comparisons as Markdown, CSV and rows of JSON."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlvla.comparison import LEVEL, TRAINED, Change, Comparison, p_text, points, support_sentence, verdict
from rlvla.results import Result
from rlvla_algos.statistics import average_interval

Row = dict[str, Any]


def policy_names(folders: Sequence[Path]) -> list[str]:
    """Short names that tell policy folders apart, fit for file names: runs/ppo/policy is "ppo"."""
    names = []
    for folder in folders:
        parts = [part for part in folder.absolute().parts[1:] if part not in ("policy", "checkpoints")]
        names.append(re.sub(r"[^\w.=-]", "_", parts[-1]) if parts else "policy")
    return [name if names.count(name) == 1 else f"{name}-{i + 1}" for i, name in enumerate(names)]


# --- measurements


def measured_rows(by_policy: Mapping[str, Sequence[Result]]) -> list[Row]:
    """One row for each task of each suite of each policy, and one for the suite's average over tasks."""
    rows: list[Row] = []
    for name, results in by_policy.items():
        for result in results:
            measured = result.evaluation
            rates = [*measured.by_task.items()]
            tasks = [*rates, ("", _average(result))] if len(rates) > 1 else rates
            rows += [
                {
                    "policy": name,
                    "suite": result.label,
                    "task": task or "average over tasks",
                    "success": rate["success"],
                    "successes": rate["successes"],
                    "trials": rate["trials"],
                    "interval_low": rate["interval"][0],
                    "interval_high": rate["interval"][1],
                    "temperature": measured.temperature,
                    "max_episode_steps": measured.max_episode_steps,
                    "policy_sha256": result.policy_sha256,
                    "notes": "; ".join(measured.notes),
                }
                for task, rate in tasks
            ]
    return rows


def _average(result: Result) -> Row:
    measured = result.evaluation
    rates = measured.by_task.values()
    return {
        "success": sum(rate["success"] for rate in rates) / len(rates),
        "successes": measured.successes,
        "trials": measured.trials,
        "interval": average_interval([(rate["successes"], rate["trials"]) for rate in rates]),
    }


def measured_markdown(by_policy: Mapping[str, Sequence[Result]]) -> str:
    """Policies side by side: the suites' averages, then every task."""
    suites = [result.label for result in next(iter(by_policy.values()))]
    lines = ["# Success", "", "Average over the tasks of each suite, per cent.", ""]
    lines += _markdown(
        ["policy", *suites],
        [[name, *(f"{100 * _average(r)['success']:.1f}" for r in rs)] for name, rs in by_policy.items()],
    )
    lines += ["", "## Task by task", "", "Per cent [95% Wilson interval], successes of trials.", ""]
    rows = []
    for place, suite in enumerate(suites):
        for task in next(iter(by_policy.values()))[place].evaluation.by_task:
            cells = [_rate_cell(results[place], task) for results in by_policy.values()]
            rows.append([suite, task, *cells])
    lines += _markdown(["suite", "task", *by_policy], rows)
    some = next(iter(by_policy.values()))
    lines += ["", *(f"* {line}" for line in condition_lines(some))]
    notes = {f"{r.label}: {note}" for results in by_policy.values() for r in results for note in r.evaluation.notes}
    if notes:
        lines += ["", "What these numbers rest on:", "", *(f"* {note}" for note in sorted(notes))]
    return "\n".join(lines) + "\n"


def _rate_cell(result: Result, task: str) -> str:
    rate = result.evaluation.by_task[task]
    low, high = (100 * bound for bound in rate["interval"])
    return f"{100 * rate['success']:.1f} [{low:.1f}, {high:.1f}], {rate['successes']} of {rate['trials']}"


# --- comparisons


def compared_rows(comparison: Comparison) -> list[Row]:
    """Groups, suites and tasks, one row each, with every number."""
    rows = []
    for kind, changes in (("group", comparison.groups), ("suite", comparison.suites), ("task", comparison.tasks)):
        for change in changes:
            row: Row = {"kind": kind}
            for key, value in asdict(change).items():
                if key == "support":
                    row |= {f"support_{name}": number for name, number in value.items()}
                elif key.endswith("interval"):
                    row |= {f"{key}_low": value[0], f"{key}_high": value[1]}
                else:
                    row[key] = value
            rows.append(row | {"difference": change.difference, "shown": change.shown})
    return rows


def compared_markdown(comparison: Comparison, before: Sequence[Result], after: Sequence[Result]) -> str:
    """The paper's Table 11 for two policies, then tasks, and what the trials can carry."""
    suites = sorted(comparison.suites, key=lambda s: s.group != TRAINED)
    lines = ["# Before and after", ""]
    lines += [f"* **{g.suite}** ({_count(g)}): {verdict(g)}." for g in comparison.groups]
    lines += ["", *_markdown(["", *(f"{s.suite} ({s.group})" for s in suites)], stage_rows(suites)), ""]
    lines += [METHOD, "", "## Task by task", ""]
    rows = [
        [
            t.suite,
            t.task,
            *(f"{100 * rate:.1f} [{100 * low:.1f}, {100 * high:.1f}]" for rate, (low, high) in _sides(t)),
            f"{points(t.difference)} [{points(t.interval[0])}, {points(t.interval[1])}]",
            f"{t.gained} / {t.kept} / {t.lost}",
            p_text(t.p_value),
            p_text(t.p_holm),
            str(t.trials),
        ]
        for t in comparison.tasks
    ]
    head = ["suite", "task", "before, %", "after, %", "points", "gained / kept / lost", "p", "p, Holm", "trials"]
    lines += _markdown(head, rows)
    unsupported = [
        f"* {c.suite}{f', {c.task}' if c.task else ''}: {support_sentence(c)}"
        for c in (*comparison.groups, *comparison.suites, *comparison.tasks)
        if support_sentence(c)
    ]
    if unsupported:
        lines += ["", "## What the trials cannot show", "", POWER_NOTE, "", *unsupported]
    lines += ["", "## How it was measured", ""]
    lines += [
        f"* {side}: {rs[0].policy}, SHA-256 {rs[0].policy_sha256}"
        for side, rs in (("Before", before), ("After", after))
    ]
    lines += [f"* {line}" for line in condition_lines(before)]
    if comparison.notes:
        lines += ["", "What these numbers rest on:", "", *(f"* {note}" for note in comparison.notes)]
    return "\n".join(lines) + "\n"


METHOD = (
    "Success in per cent, the mean over a suite's tasks. Both policies played the same initial states with the same "
    "noise. Intervals of rates are Wilson's, those of a change are Newcombe's for a task and a paired bootstrap over "
    "initial states, with the tasks held fixed, for an average; all 95%. p is McNemar's exact one, two-sided, "
    "Holm-adjusted within each family: all tasks, all suites, the two groups."
)
POWER_NOTE = (
    f"At a level of {LEVEL} for each family and a power of 80%. How many trials a change would take is counted as if "
    "the change that was seen were the true one; that is a plan, not a result. No change shown does not mean no change."
)


def stage_rows(suites: Sequence[Change]) -> list[list[str]]:
    """Before, after and the change of each suite: rows as in Table 11."""
    return [
        ["before", *(f"{100 * s.before:.1f}" for s in suites)],
        ["after", *(f"{100 * s.after:.1f}" for s in suites)],
        ["points", *(points(s.difference) for s in suites)],
        ["95% interval", *(f"{points(s.interval[0])} to {points(s.interval[1])}" for s in suites)],
        ["p, Holm", *(p_text(s.p_holm) for s in suites)],
        ["tasks, trials", *(f"{s.num_tasks}, {s.trials}" for s in suites)],
    ]


def _sides(change: Change) -> list[tuple[float, tuple[float, float]]]:
    return [(change.before, change.before_interval), (change.after, change.after_interval)]


def _count(change: Change) -> str:
    return f"{change.num_tasks} task{'s' if change.num_tasks > 1 else ''}, {change.trials} episodes"


def condition_lines(results: Sequence[Result]) -> list[str]:
    """How it was measured, a line for the settings and one for each suite."""
    settings = ", ".join(f"{key} {value}" for key, value in results[0].identity["settings"].items())
    lines = [f"Settings: {settings}."]
    for result in results:
        suite, measured = result.identity["suite"], result.evaluation
        version = ", ".join(f"{name} {number}" for name, number in suite["version"].items())
        lines.append(
            f"{result.label}: {suite['config']['name']} {suite['config']['task']}, version {version}; chunks of "
            f"{measured.chunk_size}, at most {measured.max_episode_steps} steps"
            + (f", {measured.variant}" if measured.variant else "")
            + (f"; stand-in assets: {len(measured.notes)}" if measured.notes else "")
        )
    return lines


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def csv_text(rows: Sequence[Row]) -> str:
    """Rows with the same keys, as CSV with a heading."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
