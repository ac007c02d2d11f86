"""Did the policy become better? Evaluations, learning curve, state by state, videos."""

import base64
from collections import Counter
from html import escape
from pathlib import Path

from rlvla.report_page import (
    SIGNIFICANCE,
    html_figure,
    html_missing,
    html_p_value,
    html_section,
    html_table,
)
from rlvla.run_folder import Record, RunFolder, interval_in, list_in, number_in, rate_interval
from rlvla.svg import (
    Cell,
    IntervalRow,
    Series,
    interval_chart,
    line_chart,
    outcome_grid,
    percent,
)

MAX_VIDEO_BYTES = 32 * 2**20
"""Of all embedded videos together; a page of more than some 40 MB opens slowly on a phone."""


def success_section(run: RunFolder) -> str:
    others = [n for n in run.evaluations if n not in EVALUATIONS and not n.startswith("iteration-")]
    rows = []
    for name, (label, tint) in {**EVALUATIONS, **{name: (name, 0) for name in others}}.items():
        evaluation = run.evaluations.get(name, {})
        success = number_in(evaluation, "success")
        if success is not None:
            detail = f"{evaluation.get('successes', '?')} of {evaluation.get('trials', '?')}"
            interval = interval_in(evaluation)
            rows.append(IntervalRow(label=label, value=success, interval=interval, detail=detail, tint=tint))
    if not rows:
        return html_section("Success", html_missing("No evaluation was written: evaluations/ is empty."))
    described = "; ".join(f"{row.label} {percent(row.value)}" for row in rows)
    chart = interval_chart(title="Success with 95% Wilson intervals", description=described, rows=rows)
    notes = [*_conditions(run), *_probe(run)]
    absent = [label.lower() for name, (label, _) in EVALUATIONS.items() if name not in run.evaluations]
    if run.trains and absent:
        notes.append(f"Not measured: {'; '.join(absent)}.")
    text = "".join(f"<p>{note}</p>" for note in notes)
    return html_section("Success", f'<div class="split"><figure>{chart}</figure><div class="prose">{text}</div></div>')


EVALUATIONS = {
    "before": ("Before", 1),
    "after": ("After", 0),
    "before-shuffled": ("Before, eyes swapped", 3),
    "after-shuffled": ("After, eyes swapped", 3),
}
"""Name -> label, tint."""


def _conditions(run: RunFolder) -> list[str]:
    """How success was measured: it depends on this."""
    one: Record = run.evaluations.get("after") or run.evaluations.get("before") or {}
    words = {
        "temperature": "temperature {}",
        "sampler": "the {} sampler",
        "max_episode_steps": "at most {} steps",
    }
    measured = [text.format(escape(str(one[key]))) for key, text in words.items() if key in one]
    return [f"Bars are 95% Wilson intervals. Measured with {', '.join(measured)}."] if measured else []


def _probe(run: RunFolder) -> list[str]:
    """Does the policy look? One sentence per phase, and one that says what the probe is."""
    sentences = []
    for phase in ("before", "after"):
        found = run.probe.get(phase)
        probe: Record = found if isinstance(found, dict) else {}
        own, shuffled, p = (number_in(probe, key) for key in ("own", "shuffled", "p_value"))
        if own is None or shuffled is None or p is None:
            continue
        looks = p < SIGNIFICANCE and shuffled < own
        claim = "the policy looks" if looks else "the policy may be blind, nothing shows that it uses its eyes"
        sentences.append(
            f"<b>{phase.capitalize()} training {claim}</b>: {percent(own)} with its own images, "
            f"{percent(shuffled)} with swapped ones (p = {html_p_value(p)})."
        )
    probe_is = "Eyes swapped: every episode is shown another one's images. A blind policy loses nothing by it."
    return [*sentences, probe_is] if sentences else []


def learning_curve_section(run: RunFolder) -> str:
    if not run.trains:
        return ""
    if not run.iterations:
        return html_section("Learning curve", html_missing("No iteration was completed."))
    charts = []
    for key, label in (("env_steps", "environment steps"), ("minutes", "minutes")):
        series = [_rollout_series(run, key), _evaluation_series(run, key)]
        first, last = (number_in(run.iterations[i], "rollout/success") for i in (0, -1))
        ends = [percent(rate) if rate is not None else "unknown" for rate in (first, last)]
        chart = line_chart(
            title=f"Success against {label}",
            description=f"Rollouts go from {ends[0]} to {ends[1]} in {len(run.iterations)} iterations.",
            series=[s for s in series if s.x],
            x_label=label,
            y_format=percent,
            y_range=(0.0, 1.0),
        )
        charts.append(html_figure(f"Success against {label}", chart))
    return html_section(
        "Learning curve",
        f'<div class="grid two">{"".join(charts)}</div>',
        "Rollouts act with exploration noise; evaluations without it and at their own temperature, so the "
        "two need not agree. Bands and bars are 95% Wilson intervals.",
    )


def _rollout_series(run: RunFolder, key: str) -> Series:
    rows = [row for row in run.iterations if number_in(row, key) is not None]
    success = [number_in(row, "rollout/success") for row in rows]
    return Series(
        name="rollouts",
        x=[number_in(row, key) or 0.0 for row in rows],
        y=success,
        interval=[rate_interval(y, number_in(row, "rollout/episodes")) for y, row in zip(success, rows, strict=True)],
        tint=0,
    )


def _evaluation_series(run: RunFolder, key: str) -> Series:
    points = [p for p in run.evaluation_points if number_in(p, key) is not None]
    points = [p for p in points if not str(p.get("name", "")).endswith("-shuffled")]
    rates = [number_in(p, "success") for p in points]
    known = [interval_in(run.evaluations.get(str(p.get("name")), {})) for p in points]
    trials = [number_in(p, "trials") for p in points]
    return Series(
        name="evaluations",
        x=[number_in(p, key) or 0.0 for p in points],
        y=rates,
        interval=[i or rate_interval(y, n) for i, y, n in zip(known, rates, trials, strict=True)],
        mark="point",
        tint=2,
    )


def pairs_section(run: RunFolder) -> str:
    """What became of each initial state."""
    counts = [number_in(run.comparison, key) for key in ("gained", "lost", "kept", "trials")]
    if not run.trains:
        return ""
    if None in counts:
        return html_section("State by state", html_missing("No comparison.json: before and after were not compared."))
    gained, lost, kept, trials = (int(count or 0) for count in counts)
    never = trials - gained - lost - kept
    rows = [
        ("solved before", f"<b>{kept}</b> kept", f"<b>{lost}</b> lost", str(kept + lost)),
        ("failed before", f"<b>{gained}</b> gained", f"<b>{never}</b> never solved", str(gained + never)),
        ("", str(kept + gained), str(lost + never), str(trials)),
    ]
    table = html_table(rows, ("", "solved after", "failed after", ""), "pairs")
    cells = _outcome_cells(run)
    if not cells:
        return html_section("State by state", table)
    grid = outcome_grid(
        title="Every initial state, before and after",
        description=f"{kept} kept, {gained} gained, {lost} lost, {never} never solved.",
        cells=cells,
    )
    key = "".join(
        f'<span class="tint-{tint}"><i class="{"full" if filled else "hollow"}"></i>{name}</span>'
        for name, tint, filled in KINDS.values()
    )
    note = f'<p class="key">{key}</p>'
    return html_section(
        "State by state",
        f'<div class="split"><div>{table}</div><figure>{grid}{note}</figure></div>',
        "The same initial states before and after. Only those that changed decide the test.",
    )


KINDS = {
    (1, 1): ("kept", 1, True),
    (0, 1): ("gained", 0, True),
    (1, 0): ("lost", 2, True),
    (0, 0): ("never solved", 3, False),
}
"""(solved before, solved after) -> name, tint, filled."""


def _outcome_cells(run: RunFolder) -> list[Cell]:
    outcomes: list[dict[str, int]] = []
    for phase in ("before", "after"):
        record = run.evaluations.get(phase, {})
        pairs = zip(list_in(record, "initial_states"), list_in(record, "outcomes"), strict=False)
        solved_by: dict[str, int] = {}
        visits = Counter[str]()
        for state, solved in pairs:
            # A state comes back with every noise seed.
            visits[str(state)] += 1
            visit = visits[str(state)]
            solved_by[f"{state}, visit {visit}" if visit > 1 else str(state)] = int(bool(solved))
        outcomes.append(solved_by)
    before, after = outcomes
    kinds = [((before[state], after[state]), state) for state in before if state in after]
    order = list(KINDS)
    cells = []
    for kind, state in sorted(kinds, key=lambda pair: order.index(pair[0])):
        name, tint, filled = KINDS[kind]
        cells.append((tint, filled, f"initial state {state}: {name}"))
    return cells


def videos_section(run: RunFolder) -> str:
    """Before and after side by side, by initial state."""
    by_state: dict[str, dict[str, str]] = {}
    instruction: dict[str, str] = {}
    filmed = {file.name for file in (run.path / "videos").glob("*.mp4")}
    left_out, spent = 0, 0
    for entry in run.videos:
        # Only the last part of the name: an index must not reach outside its folder.
        file = run.path / "videos" / Path(str(entry.get("file"))).name
        size = file.stat().st_size if file.name in filmed else 0
        state, phase = str(entry.get("initial_state")), str(entry.get("phase"))
        instruction[state] = str(entry.get("instruction", ""))
        if not size or spent + size > MAX_VIDEO_BYTES:
            left_out += 1
            by_state.setdefault(state, {})
            continue
        spent += size
        by_state.setdefault(state, {})[phase] = html_video(file, phase, state, bool(entry.get("success")))
    if not by_state:
        return html_section("Videos", html_missing("No videos were filmed."))
    phases = [p for p in ("before", "after") if any(p in shown for shown in by_state.values())]
    phases += sorted({p for shown in by_state.values() for p in shown} - set(phases))
    pairs = []
    for state, shown in by_state.items():
        films = "".join(shown.get(p, f'<div class="film none">no video {escape(p)}</div>') for p in phases)
        caption = f"State {escape(str(state))}: “{escape(instruction[state])}”"
        pairs.append(
            f'<figure class="pair"><div class="films">{films}</div>'
            f'<figcaption>{caption} <button type="button" hidden>play</button></figcaption></figure>'
        )
    note = html_missing(f"{left_out} video(s) are absent, or too large to embed; see videos/.") if left_out else ""
    return html_section("Videos", f'<div class="grid four">{"".join(pairs)}</div>{note}')


def html_video(file: Path, phase: str, state: str, success: bool) -> str:
    content = base64.b64encode(file.read_bytes()).decode()
    badge = '<b class="badge solved">✓ solved</b>' if success else '<b class="badge failed">✗ not solved</b>'
    label = escape(f"{phase}, initial state {state}, {'solved' if success else 'not solved'}")
    return (
        f'<div class="film"><video controls muted loop playsinline preload="auto" aria-label="{label}" '
        f'src="data:video/mp4;base64,{content}"></video><p>{escape(phase)} {badge}</p></div>'
    )
