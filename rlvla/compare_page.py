"""compare.html: the comparison of two policies on one page that needs nothing else, in the shape of Table 11."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rlvla.compare_tables import METHOD, POWER_NOTE, condition_lines, stage_rows
from rlvla.comparison import TRAINED, Change, Comparison, points, support_sentence, verdict
from rlvla.report_evidence import KINDS, MAX_VIDEO_BYTES, html_video
from rlvla.report_page import PAGE_CSS, SCRIPT, html_missing, html_p_value, html_section, html_table
from rlvla.results import Result
from rlvla.svg import CHART_CSS, IntervalRow, interval_chart, outcome_grid, percent

CSS = """
.table11 th,.table11 td{text-align:right;white-space:nowrap;padding:4px 14px 4px 0}
.table11 th[scope=row]{text-align:left}
.table11 tr.stage td{font-size:17px} .table11 .best{font-weight:700} .table11 .change td{color:var(--muted)}
.table11 .sure{color:var(--ink);font-weight:600}
.table11 th.span{text-align:center;border-bottom:1px solid var(--faint)}
.notes li{margin-bottom:4px} .notes{font-size:14px} main{max-width:1100px}
.verdicts p.verdict{font-size:20px;margin:12px 0} .slim{max-width:520px} .rates th,.rates td{padding-right:14px}
.rates th:first-child,.rates th:nth-child(2),.rates td:nth-child(2){text-align:left}
"""


MANY = 6
"""More rows than so many are folded away at first."""


def render(comparison: Comparison, before: Sequence[Result], after: Sequence[Result]) -> str:
    """The whole page."""
    names = f"{before[0].policy} · {after[0].policy}"
    sections = [
        _header(comparison, before, after),
        _stages(comparison),
        _rests_on(comparison, before),
        _tasks(comparison),
        _support(comparison),
        _states(comparison, before, after),
        _films(before, after),
        _conditions(before, after),
    ]
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; media-src data:; script-src 'sha256-{script}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(names)} · rlvla compare</title><style>{PAGE_CSS}{CHART_CSS}{CSS}</style></head>"
        f"<body><main>{''.join(sections)}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _header(comparison: Comparison, before: Sequence[Result], after: Sequence[Result]) -> str:
    names = f"before <b>{escape(before[0].policy)}</b> · after <b>{escape(after[0].policy)}</b>"
    lines = [
        f'<p class="verdict {_tone(group)}">{group.suite.capitalize()}: {escape(verdict(group))}'
        f"<small>{_scope(group)}</small></p>"
        for group in comparison.groups
    ]
    return f'<header class="verdicts"><h1>Before and after</h1><p class=names>{names}</p>{"".join(lines)}</header>\n'


def _scope(group: Change) -> str:
    tasks = "1 task" if group.num_tasks == 1 else f"{group.num_tasks} tasks"
    return f"{tasks}, {group.trials} pairs of episodes: {group.gained} gained, {group.kept} kept, {group.lost} lost"


def _tone(change: Change) -> str:
    return ("better" if change.gained > change.lost else "worse") if change.shown else "flat"


def _stages(comparison: Comparison) -> str:
    """Table 11: a column a suite, the suites trained on first."""
    suites = sorted(comparison.suites, key=lambda suite: suite.group != TRAINED)
    groups = dict.fromkeys(suite.group for suite in suites)
    spans = "".join(
        f'<th class="span" scope="colgroup" colspan="{sum(s.group == g for s in suites)}">{escape(g)}</th>'
        for g in groups
    )
    heads = "".join(f'<th scope="col">{escape(suite.suite)}</th>' for suite in suites)
    lines = [f"<tr><th></th>{spans}</tr>", f"<tr><th></th>{heads}</tr>"]
    for name, *cells in stage_rows(suites):
        row = "stage" if name in ("before", "after") else "change"
        classes = [
            "best" if _is_best(name, suite) else "sure" if suite.shown and row == "change" else "" for suite in suites
        ]
        shown = "".join(f'<td class="{c}">{escape(cell)}</td>' for c, cell in zip(classes, cells, strict=True))
        lines.append(f'<tr class="{row}"><th scope="row">{name}</th>{shown}</tr>')
    table = f'<div class="scroll"><table class="table11">{"".join(lines)}</table></div>'
    bars = [
        IntervalRow(label=f"{suite.suite}, {side}", value=rate, interval=interval, tint=tint)
        for suite in suites
        for side, rate, interval, tint in (
            ("before", suite.before, suite.before_interval, 1),
            ("after", suite.after, suite.after_interval, 0),
        )
    ]
    described = "; ".join(f"{bar.label} {percent(bar.value)}" for bar in bars)
    chart = interval_chart(title="Success with 95% intervals", description=described, rows=bars, width=520)
    body = f'{table}<br><figure class="slim">{chart}</figure>'
    return html_section("Suite by suite", body, f"{escape(METHOD)} Bold: the higher rate where a change is shown.")


def _is_best(row: str, suite: Change) -> bool:
    return suite.shown and row == ("after" if suite.gained > suite.lost else "before")


def _rests_on(comparison: Comparison, before: Sequence[Result]) -> str:
    stand_ins = {r.label for r in before if r.evaluation.notes}
    if not comparison.notes:
        return ""
    lead = f"Not the published conditions: {', '.join(sorted(stand_ins))}." if stand_ins else ""
    items = "".join(f"<li>{escape(note)}</li>" for note in comparison.notes)
    return html_section("What these numbers rest on", f'<ul class="notes">{items}</ul>', escape(lead))


def _tasks(comparison: Comparison) -> str:
    head = ["", "task", "before", "after", "points, 95% interval", "gained, kept, lost", "p", "p, Holm", "trials"]
    rows, last = [], ""
    for task in comparison.tasks:
        change = f"{points(task.difference)} ({points(task.interval[0])} to {points(task.interval[1])})"
        rows.append(
            [
                escape(task.suite) if task.suite != last else "",
                escape(task.task),
                *(
                    f"{100 * rate:.1f}% ({100 * low:.0f} to {100 * high:.0f})"
                    for rate, (low, high) in ((task.before, task.before_interval), (task.after, task.after_interval))
                ),
                f"<b>{change}</b>" if task.shown else change,
                f"{task.gained}, {task.kept}, {task.lost}",
                html_p_value(task.p_value),
                html_p_value(task.p_holm),
                str(task.trials),
            ]
        )
        last = task.suite
    return html_section("Task by task", html_table(rows, head, "numbers rates"), "Bold: a change is shown.")


def _support(comparison: Comparison) -> str:
    averages, tasks = (
        [(c, sentence) for c in changes if (sentence := support_sentence(c))]
        for changes in ([*comparison.groups, *comparison.suites], comparison.tasks)
    )
    if not averages and not tasks:
        return html_section("What the trials cannot show", "<p>Every change is shown by the trials that were made.</p>")
    body = html_table(([escape(c.suite), escape(said)] for c, said in averages), css="settings") if averages else ""
    if tasks:
        table = html_table(([escape(c.suite), escape(c.task), escape(said)] for c, said in tasks), css="settings")
        opened = " open" if len(tasks) <= MANY else ""
        body += f"<details{opened}><summary>{len(tasks)} of {len(comparison.tasks)} tasks</summary>{table}</details>"
    return html_section("What the trials cannot show", body, escape(POWER_NOTE))


def _states(comparison: Comparison, before: Sequence[Result], after: Sequence[Result]) -> str:
    figures = []
    for suite, b, a in zip(comparison.suites, before, after, strict=True):
        episodes = list(zip(b.evaluation.outcomes, a.evaluation.outcomes, b.evaluation.initial_states, strict=True))
        order = list(KINDS)
        cells = [
            (KINDS[x, y][1], KINDS[x, y][2], f"initial state {state}: {KINDS[x, y][0]}")
            for x, y, state in sorted(episodes, key=lambda episode: order.index(episode[:2]))
        ]
        counts = f"{suite.gained} gained, {suite.kept} kept, {suite.lost} lost, {suite.never} never solved"
        grid = outcome_grid(title=f"{suite.suite}, every episode", description=counts, cells=cells)
        figures.append(f"<figure><h3>{escape(suite.suite)}</h3>{grid}<figcaption>{counts}</figcaption></figure>")
    key = "".join(
        f'<span class="tint-{tint}"><i class="{"full" if filled else "hollow"}"></i>{name}</span>'
        for name, tint, filled in KINDS.values()
    )
    lead = "One square an episode. Only those that changed decide the test."
    return html_section(
        "Gained, kept, lost", f'<p class="key">{key}</p><div class="grid two">{"".join(figures)}</div>', lead
    )


def _films(before: Sequence[Result], after: Sequence[Result]) -> str:
    """The same episodes side by side: fixed ones, and the first gained and lost ones."""
    figures, left_out, spent = [], 0, 0
    for b, a in zip(before, after, strict=True):
        sides = [{film["state"]: film for film in result.films if film["file"]} for result in (b, a)]
        for state in dict.fromkeys(state for side in sides for state in side):
            files = [Path(side[state]["file"]) if state in side else None for side in sides]
            sizes = [file.stat().st_size if file is not None and file.is_file() else 0 for file in files]
            if not any(sizes) or spent + sum(sizes) > MAX_VIDEO_BYTES:
                left_out += 1
                continue
            spent += sum(sizes)
            shown = "".join(
                html_video(file, phase, str(state), bool(side[state]["success"]))
                if file is not None and size
                else f'<div class="film none">no video {phase}</div>'
                for file, size, phase, side in zip(files, sizes, ("before", "after"), sides, strict=True)
            )
            film: Mapping[str, Any] = next(side[state] for side in sides if state in side)
            kind = KINDS[_outcome(b, state), _outcome(a, state)][0]
            caption = f"{b.label}, state {state}, <b>{kind}</b>: “{escape(str(film['instruction']))}”"
            figures.append(
                f'<figure class="pair"><div class="films">{shown}</div>'
                f'<figcaption>{caption} <button type="button" hidden>play</button></figcaption></figure>'
            )
    if not figures:
        return html_section("Videos", html_missing("Nothing is here to show: eval.videos=0, or the suites draw none."))
    note = html_missing(f"{left_out} more are not here, or would make the page too large.") if left_out else ""
    lead = (
        "The first episodes of every task, and the first of a suite that was gained and that was lost. Same initial "
        "state, same noise."
    )
    return html_section("Videos", f'<div class="grid four">{"".join(figures)}</div>{note}', lead)


def _outcome(result: Result, state: int) -> int:
    """Of the first visit, which is the one that is filmed."""
    return result.evaluation.outcomes[result.evaluation.initial_states.index(state)]


def _conditions(before: Sequence[Result], after: Sequence[Result]) -> str:
    rows = [
        (escape(side), f"{escape(results[0].policy)}<br><code>SHA-256 {escape(results[0].policy_sha256)}</code>")
        for side, results in (("before", before), ("after", after))
    ]
    lines = "".join(f"<li>{escape(line)}</li>" for line in condition_lines(before))
    software = "; ".join(f"{key} {value}" for key, value in after[0].versions.items())
    return html_section(
        "How it was measured",
        f'{html_table(rows, css="settings")}<ul class="notes">{lines}</ul><p class="facts">{escape(software)}</p>',
    )
