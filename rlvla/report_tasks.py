"""Task by task: success before and after, what else the suite measured, and what its numbers rest on."""

from collections.abc import Mapping
from html import escape
from typing import Any

from rlvla.report_page import html_p_value, html_section, html_table
from rlvla.run_folder import Record, RunFolder, interval_in, list_in, number_in
from rlvla.svg import percent


def tasks_section(run: RunFolder) -> str:
    """Empty for a suite of one task that measures success alone and has nothing to say about it."""
    phases = {name: run.evaluations[name] for name in ("before", "after", "eval") if name in run.evaluations}
    if not phases:
        return ""
    last = list(phases.values())[-1]
    names = list(_mapping(last, "by_task"))
    measured = sorted(_mapping(last, "metrics"))
    notes = [escape(str(note)) for note in list_in(last, "notes")]
    if len(names) < 2 and not measured and not notes:
        return ""
    head = ["", *(f"{phase}, 95% interval" for phase in phases), *(["points", "p"] if "after" in phases else [])]
    rows = [[escape(name), *(_rate(phase, name) for phase in phases.values()), *_change(run, name)] for name in names]
    table = html_table(rows, head, "numbers")
    if measured:
        beside = [
            [escape(metric), escape(task), *(_metric(phase, task, metric) for phase in phases.values())]
            for metric in measured
            for task in names
        ]
        table += html_table(beside, ["also measured", "task", *phases], "numbers")
    said = "".join(f"<li>{note}</li>" for note in notes)
    return html_section("Task by task", table + (f"<ul>{said}</ul>" if said else ""))


def _mapping(record: Record, key: str) -> Mapping[str, Any]:
    found = record.get(key)
    return found if isinstance(found, Mapping) else {}


def _rate(evaluation: Record, task: str) -> str:
    rate = _mapping(_mapping(evaluation, "by_task"), task)
    success, interval = number_in(rate, "success"), interval_in(rate)
    if success is None:
        return "–"
    spread = f" ({percent(interval[0])} to {percent(interval[1])})" if interval else ""
    counts = "/".join(escape(str(rate.get(key, "?"))) for key in ("successes", "trials"))
    return f"{percent(success)}{spread}, {counts}"


def _change(run: RunFolder, task: str) -> list[str]:
    if "after" not in run.evaluations:
        return []
    change = _mapping(_mapping(run.comparison, "by_task"), task) or run.comparison
    difference, p = number_in(change, "difference"), number_in(change, "p_value")
    return ["–" if difference is None else f"{100 * difference:+.1f}", "–" if p is None else html_p_value(p)]


def _metric(evaluation: Record, task: str, metric: str) -> str:
    value = number_in(_mapping(_mapping(evaluation, "metrics_by_task"), task), metric)
    return "–" if value is None else f"{value:.3f}"
