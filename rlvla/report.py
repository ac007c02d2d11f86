"""`report.html`: what a run did, on one page that needs nothing else.

The page is text, inline SVG and base64 video; its content security policy forbids every request. All that a
run folder may lack (it was killed, it only evaluated) is said on the page and is never an error.

Order of this file: read the folder, say the verdict, draw the sections from top to bottom, style.
"""

import base64
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from rlvla.svg import (
    CHART_CSS,
    Cell,
    Format,
    Interval,
    IntervalRow,
    Reference,
    Series,
    interval_chart,
    line_chart,
    number,
    outcome_grid,
    percent,
)
from rlvla_algos.statistics import wilson_interval

Record = Mapping[str, Any]

SIGNIFICANCE = 0.05
MAX_VIDEO_BYTES = 32 * 2**20
"""Of all embedded videos together; a page of more than some 40 MB opens slowly on a phone."""


@dataclass(frozen=True)
class RunFolder:
    """What could be read of a run. Absent files are empty; damaged ones are named in `problems`."""

    path: Path
    config: Record
    config_text: str
    policy_config: Record
    versions: Record
    summary: Record
    iterations: Sequence[Record]
    alarms: Sequence[Record]
    evaluation_points: Sequence[Record]
    evaluations: Mapping[str, Record]
    comparison: Record
    probe: Record
    videos: Sequence[Record]
    problems: list[str] = field(default_factory=list)

    def setting(self, key: str) -> Any:
        """A value of config.yaml by its dotted key, or None."""
        node: Any = self.config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        return node

    @property
    def trains(self) -> bool:
        return bool(self.iterations) or self.setting("algo") is not None

    @property
    def task(self) -> str:
        named = [record.get("task") for record in (*self.evaluations.values(), self.summary)]
        return str(next((name for name in [*named, self.setting("suite.task")] if name), self.path.name))


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder, whatever state the run is in, and return its path.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir} is not a folder; give the output folder of a run.")
    page = render(read_run(run_dir))
    target, stage = run_dir / "report.html", run_dir / "report.html.partial"
    stage.write_bytes(page.encode("utf-8", "replace"))
    os.replace(stage, target)
    return target


def read_run(path: Path) -> RunFolder:
    """Read a run folder; a file that is damaged or torn becomes a problem, not an exception."""
    problems: list[str] = []
    lines = _read_metrics(path / "metrics.jsonl", problems)
    config_text = _read_text(path / "config.yaml", problems)
    config = _parse_yaml(config_text, "config.yaml", problems)
    policy_text = next((_read_text(p, problems) for p in _policy_configs(path, config) if p.is_file()), "")
    evaluations = {p.stem: _read_json(p, problems, {}) for p in sorted((path / "evaluations").glob("*.json"))}
    return RunFolder(
        path=path,
        config=config,
        config_text=config_text,
        policy_config=_parse_yaml(policy_text, "the policy's config.yaml", problems),
        versions=_read_json(path / "versions.json", problems, {}),
        summary=_read_json(path / "summary.json", problems, {}),
        # A resumed run repeats what it had not saved, with the same result: the last line counts.
        iterations=_last_of_each(lines, "iteration", ("iteration",)),
        alarms=_last_of_each(lines, "alarm", ("iteration", "message")),
        evaluation_points=_last_of_each(lines, "evaluation", ("name",)),
        evaluations=evaluations,
        comparison=_read_json(path / "comparison.json", problems, {}),
        probe=_read_json(path / "probe.json", problems, {}),
        videos=[v for v in _read_json(path / "videos" / "index.json", problems, []) if isinstance(v, dict)],
        problems=problems,
    )


def _policy_configs(run: Path, config: Record) -> list[Path]:
    """Where the policy describes itself: the refined one, or the one the run started from."""
    start = config.get("policy")
    return [
        run / "policy" / "config.yaml",
        *([Path(start) / "config.yaml"] if isinstance(start, str) else []),
    ]


def _read_text(path: Path, problems: list[str]) -> str:
    if not path.is_file():
        return ""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        problems.append(f"{path.name} could not be read: {error}")
        return ""


def _read_json(path: Path, problems: list[str], absent: Any) -> Any:
    """The content when it has the type of `absent`; `absent` when there is none."""
    content = _read_text(path, problems)
    if not content:
        return absent
    try:
        found = json.loads(content)
    except ValueError as error:
        problems.append(f"{path.name} is not JSON: {error}")
        return absent
    if not isinstance(found, type(absent)):
        problems.append(f"{path.name} holds a {type(found).__name__}, not a {type(absent).__name__}")
        return absent
    return found


def _parse_yaml(content: str, name: str, problems: list[str]) -> Record:
    import yaml  # type: ignore[import-untyped, unused-ignore]

    try:
        found = yaml.safe_load(content)
    except yaml.YAMLError as error:
        problems.append(f"{name} is not YAML: {error}")
        return {}
    return found if isinstance(found, dict) else {}


def _read_metrics(path: Path, problems: list[str]) -> list[Record]:
    rows: list[Record] = []
    torn = 0
    for line in _read_text(path, problems).splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            torn += 1
            continue
        if isinstance(row, dict):
            rows.append(row)
    if torn:
        problems.append(f"{torn} line(s) of metrics.jsonl could not be read; the run was probably killed there")
    return rows


def _last_of_each(rows: Iterable[Record], kind: str, key: tuple[str, ...]) -> list[Record]:
    kept = {tuple(str(row.get(part)) for part in key): row for row in rows if row.get("kind") == kind}
    return list(kept.values())


def _value(record: Record, key: str) -> float | None:
    """A finite number of a record, or None: null, NaN, text and absence are all gaps."""
    found = record.get(key)
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


def _interval(record: Record) -> Interval | None:
    bounds = [_value({"bound": bound}, "bound") for bound in _list(record, "interval")]
    if len(bounds) != 2 or bounds[0] is None or bounds[1] is None:
        return None
    return bounds[0], bounds[1]


def _list(record: Record, key: str) -> list[Any]:
    found = record.get(key)
    return found if isinstance(found, list) else []


def _rate_interval(rate: float | None, trials: float | None) -> Interval | None:
    """Wilson 95% of a rate over a known number of trials."""
    if rate is None or not trials or not 0 <= rate <= 1:
        return None
    return wilson_interval(round(rate * trials), round(trials))


def render(run: RunFolder) -> str:
    """The whole page."""
    sections = [
        _header(run),
        _success(run),
        _learning_curve(run),
        _pairs(run),
        _videos(run),
        _health(run),
        _alarms(run),
        _time(run),
        _settings(run),
        _details(run),
    ]
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; media-src data:; script-src 'sha256-{script}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(run.task)} · rlvla report</title><style>{PAGE_CSS}{CHART_CSS}</style></head>"
        f"<body><main>{''.join(sections)}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _section(title: str, body: str, lead: str = "") -> str:
    """A section with a heading; `lead` and `body` are HTML."""
    return f"<section><h2>{escape(title)}</h2>{f'<p class=lead>{lead}</p>' if lead else ''}{body}</section>\n"


def _figure(title: str, chart: str, note: str = "") -> str:
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return f"<figure><h3>{escape(title)}</h3>{chart}{caption}</figure>"


def _missing(text: str) -> str:
    return f'<p class="missing">{escape(text)}</p>'


def _table(rows: Iterable[Sequence[str]], head: Sequence[str] = (), css: str = "") -> str:
    """Cells are HTML. The first one of a row is its header."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = [f'<th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) for row in rows]
    lines = [f"<tr>{cells}</tr>" for cells in ([top, *body] if head else body)]
    return f'<div class="scroll"><table class="{css}">{"".join(lines)}</table></div>'


def _data(value: float, form: Format = percent) -> str:
    """A number of the headline, with the exact value from the run's JSON beside what is printed."""
    return f'<data value="{value!r}">{form(value)}</data>'


def _points(value: float) -> str:
    """A difference of two rates in percentage points, with its sign."""
    return ("+" if value > 0 else "") + percent(value).removesuffix("%")


def _p_value(value: float) -> str:
    if value >= 0.001 or value == 0:
        return f"{value:.3f}".rstrip("0").rstrip(".")
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')} × 10<sup>−{abs(int(exponent))}</sup>"


def _header(run: RunFolder) -> str:
    suite = run.setting("suite.name") or next((e.get("suite") for e in run.evaluations.values()), None)
    policy = run.setting("policy")
    known = [
        ("suite", suite),
        ("policy", policy if isinstance(policy, str) else None),
        ("run", run.path.resolve().name),
    ]
    names = " · ".join(f"{label} <b>{escape(str(name))}</b>" for label, name in known if name)
    tone, sentence = _verdict(run)
    problems = "".join(f"<li>{escape(problem)}</li>" for problem in run.problems)
    return (
        f"<header><h1>{escape(run.task)}</h1><p class=names>{names}</p>"
        f'<p class="verdict {tone}">{sentence}</p><p class=facts>{_facts(run)}</p>'
        f"{f'<ul class=problems>{problems}</ul>' if problems else ''}</header>\n"
    )


def _verdict(run: RunFolder) -> tuple[str, str]:
    """(css class, one sentence). Every number in it is in comparison.json or evaluations/."""
    facts = {key: _value(run.comparison, key) for key in ("before", "after", "trials", "p_value", "difference")}
    known = {key: value for key, value in facts.items() if value is not None}
    if len(known) < len(facts):
        return _verdict_without_test(run)
    before, after, difference = _data(known["before"]), _data(known["after"]), known["difference"]
    states = f"{_data(known['trials'], lambda n: str(int(n)))} held-back initial states"
    interval = _interval(run.comparison)
    spread = ""
    if interval:
        spread = f", 95% interval {_data(interval[0], _points)} to {_data(interval[1], _points)}"
    test = (
        f"<small>(paired exact McNemar p = {_data(known['p_value'], _p_value)}; difference "
        f"{_data(difference, _points)} points{spread})</small>"
    )
    if known["p_value"] >= SIGNIFICANCE:
        tone, claim = (
            "flat",
            f"No significant change: success was {before} before and {after} after on {states}",
        )
    elif difference < 0:
        tone, claim = (
            "worse",
            f"Success fell from {before} to {after} on {states}: keep the policy from before",
        )
    else:
        tone, claim = "better", f"Success rose from {before} to {after} on {states}"
    return tone, f"{claim} {test}"


def _verdict_without_test(run: RunFolder) -> tuple[str, str]:
    before, after = run.evaluations.get("before"), run.evaluations.get("after")
    own = [e for e in run.evaluations.values() if e.get("images") != "shuffled"]
    if before and after:
        sentence = f"{_rate(before)} before, {_rate(after)} after; the paired test, comparison.json, is missing."
    elif before:
        sentence = f"No result yet: before training {_rate(before)}; the evaluation after it is missing."
    elif own:
        sentence = f"The policy succeeds on {_rate(own[-1])}."
    else:
        sentence = "No result yet: nothing was evaluated."
    return "flat", sentence


def _rate(evaluation: Record) -> str:
    success, trials = _value(evaluation, "success"), _value(evaluation, "trials")
    if success is None or trials is None:
        return "an unreadable share of episodes"
    interval = _interval(evaluation)
    spread = f" (95% interval {_data(interval[0])} to {_data(interval[1])})" if interval else ""
    return f"{_data(success)} of {_data(trials, lambda n: str(int(n)))} held-back initial states{spread}"


def _facts(run: RunFolder) -> str:
    """How far the run came, in one line."""
    last: Record = run.iterations[-1] if run.iterations else {}
    steps = _value(run.summary, "env_steps") or _value(last, "env_steps")
    minutes = _value(run.summary, "minutes") or _value(last, "minutes")
    parts = []
    if run.trains:
        planned = run.setting("iterations")
        of = f" of {escape(str(planned))}" if planned is not None else ""
        parts.append(f"{len(run.iterations)}{of} iterations")
    parts += [f"{number(n)} {unit}" for n, unit in ((steps, "environment steps"), (minutes, "minutes")) if n]
    if not run.summary:
        parts.append(f'<strong class="unfinished">this run has not finished</strong>, {_last_sign(run.path)}')
    return " · ".join(parts)


def _last_sign(path: Path) -> str:
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        return "and it wrote no metrics"
    return f"its last metric is from {datetime.fromtimestamp(metrics.stat().st_mtime, UTC):%Y-%m-%d %H:%M} UTC"


def _success(run: RunFolder) -> str:
    others = [n for n in run.evaluations if n not in EVALUATIONS and not n.startswith("iteration-")]
    rows = []
    for name, (label, tint) in {**EVALUATIONS, **{name: (name, 0) for name in others}}.items():
        evaluation = run.evaluations.get(name, {})
        success = _value(evaluation, "success")
        if success is not None:
            detail = f"{evaluation.get('successes', '?')} of {evaluation.get('trials', '?')}"
            interval = _interval(evaluation)
            rows.append(IntervalRow(label=label, value=success, interval=interval, detail=detail, tint=tint))
    if not rows:
        return _section("Success", _missing("No evaluation was written: evaluations/ is empty."))
    described = "; ".join(f"{row.label} {percent(row.value)}" for row in rows)
    chart = interval_chart(title="Success with 95% Wilson intervals", description=described, rows=rows)
    notes = [*_conditions(run), *_probe(run)]
    absent = [label.lower() for name, (label, _) in EVALUATIONS.items() if name not in run.evaluations]
    if run.trains and absent:
        notes.append(f"Not measured: {'; '.join(absent)}.")
    text = "".join(f"<p>{note}</p>" for note in notes)
    return _section("Success", f'<div class="split"><figure>{chart}</figure><div class="prose">{text}</div></div>')


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
        own, shuffled, p = (_value(probe, key) for key in ("own", "shuffled", "p_value"))
        if own is None or shuffled is None or p is None:
            continue
        looks = p < SIGNIFICANCE and shuffled < own
        claim = "the policy looks" if looks else "the policy may be blind, nothing shows that it uses its eyes"
        sentences.append(
            f"<b>{phase.capitalize()} training {claim}</b>: {percent(own)} with its own images, "
            f"{percent(shuffled)} with swapped ones (p = {_p_value(p)})."
        )
    probe_is = "Eyes swapped: every episode is shown another one's images. A blind policy loses nothing by it."
    return [*sentences, probe_is] if sentences else []


def _learning_curve(run: RunFolder) -> str:
    if not run.trains:
        return ""
    if not run.iterations:
        return _section("Learning curve", _missing("No iteration was completed."))
    charts = []
    for key, label in (("env_steps", "environment steps"), ("minutes", "minutes")):
        series = [_rollout_series(run, key), _evaluation_series(run, key)]
        first, last = (_value(run.iterations[i], "rollout/success") for i in (0, -1))
        ends = [percent(rate) if rate is not None else "unknown" for rate in (first, last)]
        chart = line_chart(
            title=f"Success against {label}",
            description=f"Rollouts go from {ends[0]} to {ends[1]} in {len(run.iterations)} iterations.",
            series=[s for s in series if s.x],
            x_label=label,
            y_format=percent,
            y_range=(0.0, 1.0),
        )
        charts.append(_figure(f"Success against {label}", chart))
    return _section(
        "Learning curve",
        f'<div class="grid two">{"".join(charts)}</div>',
        "Rollouts act with exploration noise; evaluations without it and at their own temperature, so the "
        "two need not agree. Bands and bars are 95% Wilson intervals.",
    )


def _rollout_series(run: RunFolder, key: str) -> Series:
    rows = [row for row in run.iterations if _value(row, key) is not None]
    success = [_value(row, "rollout/success") for row in rows]
    return Series(
        name="rollouts",
        x=[_value(row, key) or 0.0 for row in rows],
        y=success,
        interval=[_rate_interval(y, _value(row, "rollout/episodes")) for y, row in zip(success, rows, strict=True)],
        tint=0,
    )


def _evaluation_series(run: RunFolder, key: str) -> Series:
    points = [p for p in run.evaluation_points if _value(p, key) is not None]
    points = [p for p in points if not str(p.get("name", "")).endswith("-shuffled")]
    rates = [_value(p, "success") for p in points]
    known = [_interval(run.evaluations.get(str(p.get("name")), {})) for p in points]
    trials = [_value(p, "trials") for p in points]
    return Series(
        name="evaluations",
        x=[_value(p, key) or 0.0 for p in points],
        y=rates,
        interval=[i or _rate_interval(y, n) for i, y, n in zip(known, rates, trials, strict=True)],
        mark="point",
        tint=2,
    )


def _pairs(run: RunFolder) -> str:
    """What became of each initial state."""
    counts = [_value(run.comparison, key) for key in ("gained", "lost", "kept", "trials")]
    if not run.trains:
        return ""
    if None in counts:
        return _section("State by state", _missing("No comparison.json: before and after were not both evaluated."))
    gained, lost, kept, trials = (int(count or 0) for count in counts)
    never = trials - gained - lost - kept
    rows = [
        ("solved before", f"<b>{kept}</b> kept", f"<b>{lost}</b> lost", str(kept + lost)),
        ("failed before", f"<b>{gained}</b> gained", f"<b>{never}</b> never solved", str(gained + never)),
        ("", str(kept + gained), str(lost + never), str(trials)),
    ]
    table = _table(rows, ("", "solved after", "failed after", ""), "pairs")
    cells = _outcome_cells(run)
    if not cells:
        return _section("State by state", table)
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
    return _section(
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
        pairs = zip(_list(record, "initial_states"), _list(record, "outcomes"), strict=False)
        outcomes.append({str(state): int(bool(solved)) for state, solved in pairs})
    before, after = outcomes
    kinds = [((before[state], after[state]), state) for state in before if state in after]
    order = list(KINDS)
    cells = []
    for kind, state in sorted(kinds, key=lambda pair: order.index(pair[0])):
        name, tint, filled = KINDS[kind]
        cells.append((tint, filled, f"initial state {state}: {name}"))
    return cells


def _videos(run: RunFolder) -> str:
    """Before and after side by side, by initial state."""
    by_state: dict[str, dict[str, str]] = {}
    instruction: dict[str, str] = {}
    left_out, spent = 0, 0
    for entry in run.videos:
        # Only the last part of the name: an index must not reach outside its folder.
        file = run.path / "videos" / Path(str(entry.get("file"))).name
        size = file.stat().st_size if file.is_file() else 0
        state, phase = str(entry.get("initial_state")), str(entry.get("phase"))
        instruction[state] = str(entry.get("instruction", ""))
        if not size or spent + size > MAX_VIDEO_BYTES:
            left_out += 1
            by_state.setdefault(state, {})
            continue
        spent += size
        by_state.setdefault(state, {})[phase] = _video(file, phase, state, bool(entry.get("success")))
    if not by_state:
        return _section("Videos", _missing("No videos were filmed."))
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
    note = _missing(f"{left_out} video(s) are absent, or too large to embed; see videos/.") if left_out else ""
    return _section("Videos", f'<div class="grid four">{"".join(pairs)}</div>{note}')


def _video(file: Path, phase: str, state: str, success: bool) -> str:
    content = base64.b64encode(file.read_bytes()).decode()
    badge = '<b class="badge solved">✓ solved</b>' if success else '<b class="badge failed">✗ not solved</b>'
    label = escape(f"{phase}, initial state {state}, {'solved' if success else 'not solved'}")
    return (
        f'<div class="film"><video controls muted loop playsinline preload="auto" aria-label="{label}" '
        f'src="data:video/mp4;base64,{content}"></video><p>{escape(phase)} {badge}</p></div>'
    )


@dataclass(frozen=True)
class Panel:
    """One health chart: what is drawn and what healthy looks like."""

    title: str
    keys: Mapping[str, str]
    """Metric -> name in the legend."""
    healthy: str
    limits: Mapping[str, str] = field(default_factory=dict)
    """Dotted config key -> label of a horizontal line at its value."""
    log_y: bool = False
    y_range: Interval | None = None
    y_format: Format = number


KL = Panel(
    "KL per chunk, nats",
    {"ppo/kl": "KL"},
    "near the target. Far above it, the policy moved further than its data supports.",
    {"algo.target_kl": "target"},
)
CLIP_FRACTION = Panel(
    "Clip fraction",
    {"ppo/clip_fraction": "clip fraction"},
    "some per cent to about 30%. Near zero the update barely moves; far above, most of it is cut off.",
    y_format=percent,
)
EXPLAINED_VARIANCE = Panel(
    "Explained variance of the critic",
    {"value/explained_variance": "explained variance"},
    "above 0 within some iterations. At or below 0 the critic knows no more than a constant.",
    y_range=(-1.0, 1.0),
)
LEARNING_RATE = Panel(
    "Learning rate of the policy",
    {"optim/policy_lr": "learning rate"},
    "steered by KL, it settles. At its ceiling, the KL target is out of reach.",
    {"algo.max_policy_lr": "ceiling"},
    log_y=True,
)
VALUE_LOSS = Panel(
    "Value loss",
    {"loss/value": "value loss"},
    "falls, then stays level. A jump says that the policy changed faster than the critic could follow.",
)
GRADIENT_NORM = Panel(
    "Gradient norm before clipping",
    {"optim/grad_norm": "gradient norm"},
    "steady, mostly below the clip. Always above it, the clip sets the step size.",
    {"algo.max_grad_norm": "clip"},
)
MEAN_ERROR = Panel(
    "First minibatch: mean error, in s",
    {"ppo/mean_error": "mean error"},
    "below its tolerance in fp32. Above it, rollout and learner do not compute the same policy.",
    {"algo.mean_tolerance": "tolerance"},
    log_y=True,
)
RATIO_ERROR = Panel(
    "First minibatch: |ratio − 1|",
    {"ppo/ratio_error": "|ratio − 1|"},
    "below its tolerance: before the first step of an update the ratio is 1.",
    {"algo.ratio_tolerance": "tolerance"},
    log_y=True,
)


def _kl_by_step(run: RunFolder) -> Panel:
    found = {key for row in run.iterations for key in row if key.startswith("ppo/kl_step_")}
    keys = sorted(found, key=lambda key: (len(key), key))[: len(TINTS)]
    return Panel(
        "KL by denoising step, nats",
        {key: f"step {key.removeprefix('ppo/kl_step_')}" for key in keys},
        "the last step weighs most, as the same change of velocity costs most there; all move together.",
    )


def _health(run: RunFolder) -> str:
    if not run.trains:
        return ""
    panels = [
        KL,
        _kl_by_step(run),
        CLIP_FRACTION,
        EXPLAINED_VARIANCE,
        VALUE_LOSS,
        GRADIENT_NORM,
        LEARNING_RATE,
    ]
    figures = "".join(_panel(run, panel) for panel in [*panels, MEAN_ERROR, RATIO_ERROR])
    return _section(
        "Health",
        f'<div class="grid three">{figures}</div>{_iteration_table(run)}',
        "Against iterations. A hollow mark lies off the scale; point at any mark for its value.",
    )


def _panel(run: RunFolder, panel: Panel) -> str:
    rows = [row for row in run.iterations if _value(row, "iteration") is not None]
    values = {key: [_value(row, key) for row in rows] for key in panel.keys}
    series = [
        Series(name=name, x=[_value(row, "iteration") or 0.0 for row in rows], y=values[key], tint=TINTS[i])
        for i, (key, name) in enumerate(panel.keys.items())
        if any(value is not None for value in values[key])
    ]
    if not series:
        return _figure(panel.title, _missing("Not recorded."), f"Healthy: {panel.healthy}")
    references = []
    for key, label in panel.limits.items():
        limit = _number(run.setting(key))
        if limit is not None:
            references.append(Reference(y=limit, label=f"{label} {number(limit)}"))
    last = [f"{s.name} ends at {panel.y_format(next(y for y in reversed(s.y) if y is not None))}" for s in series]
    chart = line_chart(
        title=panel.title,
        description=f"{'; '.join(last)}. Healthy: {panel.healthy}",
        series=series,
        x_label="iteration",
        references=references,
        log_y=panel.log_y,
        y_range=panel.y_range,
        y_format=panel.y_format,
        width=300,
        height=170,
    )
    return _figure(panel.title, chart, f"Healthy: {panel.healthy}")


TINTS = (0, 2, 4, 5, 1, 3)
"""Neighbouring series differ in lightness as well as in hue."""


def _number(setting: Any) -> float | None:
    """A configured number; YAML reads 5e-6 as text."""
    try:
        found = float(setting)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


COLUMNS: tuple[tuple[str, str, Format], ...] = (
    ("iteration", "iteration", number),
    ("env steps", "env_steps", number),
    ("minutes", "minutes", number),
    ("success", "rollout/success", percent),
    ("KL", "ppo/kl", number),
    ("clip", "ppo/clip_fraction", percent),
    ("expl. var.", "value/explained_variance", number),
    ("lr", "optim/policy_lr", number),
    ("value loss", "loss/value", number),
    ("grad norm", "optim/grad_norm", number),
    ("epochs", "ppo/epochs", number),
    ("steps/s", "speed/env_steps_per_s", number),
)


def _iteration_table(run: RunFolder) -> str:
    if not run.iterations:
        return ""
    rows = []
    for row in run.iterations:
        found = [(_value(row, key), form) for _, key, form in COLUMNS]
        rows.append([form(value) if value is not None else "–" for value, form in found])
    table = _table(rows, [name for name, _, _ in COLUMNS], "numbers")
    return f"<details><summary>All iterations as a table</summary>{table}</details>"


def _alarms(run: RunFolder) -> str:
    if not run.trains:
        return ""
    items = ""
    for alarm in run.alarms:
        where = f"iteration {alarm.get('iteration')}"
        what = str(alarm.get("message")).removeprefix(f"{where}: ")
        items += f"<li><b>{escape(where)}</b> {escape(what)}</li>"
    return _section("Alarms", f"<ul>{items}</ul>" if items else "<p>None.</p>")


def _time(run: RunFolder) -> str:
    if not run.iterations:
        return ""
    spent = {
        label: sum(_value(row, key) or 0.0 for row in run.iterations) / 60
        for label, key in (("rollouts", "time/rollout_s"), ("updates", "time/update_s"))
    }
    total = _value(run.summary, "minutes") or max(_value(row, "minutes") or 0.0 for row in run.iterations)
    spent["evaluations and all else"] = max(0.0, total - sum(spent.values()))
    whole = sum(spent.values()) or 1.0
    rows = [
        (
            escape(label),
            f"{number(minutes)} min",
            percent(round(minutes / whole, 2)),
            f'<span class="bar" style="width:{100 * minutes / whole:.1f}%"></span>',
        )
        for label, minutes in spent.items()
    ]
    rates = sorted(rate for row in run.iterations if (rate := _value(row, "speed/env_steps_per_s")) is not None)
    lead = f"Rollouts run at {number(rates[len(rates) // 2])} environment steps per second (median)." if rates else ""
    return _section("Where the time went", _table(rows, css="time"), lead)


SETTINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("temperature of rollouts, of evaluations", ("temperature", "eval.temperature")),
    ("noise level", ("algo.noise_level",)),
    ("reduction of the ratio", ("algo.reduction",)),
    ("clip ε, KL target", ("algo.clip_epsilon", "algo.target_kl")),
    ("epochs, minibatch", ("algo.epochs", "algo.minibatch_size")),
    ("discount γ, λ", ("algo.gamma", "algo.gae_lambda")),
    ("learning rate: start, schedule, critic", ("algo.policy_lr", "algo.lr_schedule", "algo.value_lr")),
    ("backbone trained", ("algo.train_vlm",)),
    ("episodes an iteration", ("episodes_per_iteration",)),
    ("environments: kind, actors (0: one a core)", ("workers.kind", "workers.num_actors")),
    ("environments an actor", ("workers.envs_per_actor",)),
    ("actions in a chunk, step limit", ("suite.chunk_size", "suite.max_episode_steps")),
    ("seed of the run, of evaluations", ("seed", "eval.seed")),
)


def _settings(run: RunFolder) -> str:
    """What decides a result. Keys as one would type them."""
    rows = []
    steps = _find(run.policy_config, "num_denoising_steps")
    for label, keys in SETTINGS:
        values = [run.setting(key) for key in keys]
        if any(value is not None for value in values):
            shown = ", ".join("–" if value is None else str(value) for value in values)
            rows.append((escape(label), escape(shown), f"<code>{escape(', '.join(keys))}</code>"))
    where = "<code>config.yaml of the policy</code>"
    rows.insert(1, ("denoising steps", escape(str(steps if steps is not None else "unknown")), where))
    if not run.config:
        return _section("Settings", _missing("config.yaml is missing or empty."))
    return _section("Settings", _table(rows, css="settings"))


def _find(node: Any, name: str) -> Any:
    """The first value of that name, at any depth."""
    if not isinstance(node, Mapping):
        return None
    if name in node:
        return node[name]
    return next((found for child in node.values() if (found := _find(child, name)) is not None), None)


def _details(run: RunFolder) -> str:
    versions = _table((escape(str(k)), escape(str(v))) for k, v in run.versions.items())
    config = f"<pre>{escape(run.config_text)}</pre>" if run.config_text else _missing("config.yaml is missing.")
    return (
        f"<section><details><summary>Full configuration</summary>{config}</details>"
        f"<details><summary>Versions and machine</summary>"
        f"{versions if run.versions else _missing('versions.json is missing.')}</details></section>\n"
    )


# The only script. A click plays or stops both films of a pair together; without it each has its controls.
SCRIPT = """
for (const pair of document.querySelectorAll(".pair")) {
  const films = [...pair.querySelectorAll("video")], button = pair.querySelector("button");
  const toggle = () => {
    const play = films[0].paused;
    for (const film of films) {
      if (play) { film.currentTime = 0; film.play(); } else film.pause();
    }
    button.textContent = play ? "stop" : "play";
  };
  if (!films.length) continue;
  button.hidden = false;
  button.onclick = toggle;
  for (const film of films) { film.controls = false; film.onclick = toggle; }
}
"""

PAGE_CSS = """
:root{color-scheme:light dark;--paper:#fffefb;--ink:#1c1d20;--muted:#62656b;--faint:#a9abae;--hair:#e7e5df;
--after:#0a6aa6;--before:#7d858d;--warm:#c8551b;--violet:#8156b3;--green:#2a8060;--wash:#f6f4ee;
--sans:ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",Arial,sans-serif;
--serif:Charter,"Bitstream Charter","Iowan Old Style",Palatino,Georgia,"DejaVu Serif",serif}
@media(prefers-color-scheme:dark){:root{--paper:#15171a;--ink:#e6e4df;--muted:#9fa3a8;--faint:#5f646a;
--hair:#2b2e33;--after:#5ab4ea;--before:#9aa3ac;--warm:#f0894f;--violet:#b592e0;--green:#5cc39c;--wash:#1d2024}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 var(--sans);
-webkit-text-size-adjust:100%}
main{max-width:1000px;margin:0 auto;padding:36px 20px 64px}
h1{font:600 30px/1.2 var(--serif);margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font:600 19px/1.3 var(--serif);margin:0 0 6px} h3{font:600 13px/1.3 var(--sans);margin:0 0 6px}
section{margin-top:34px;padding-top:14px;border-top:1px solid var(--hair)} p{margin:0 0 8px}
sup{line-height:0;font-size:.75em} .lead{max-width:72ch;font-size:14px}
.lead,.names,.facts,figcaption,.key,.missing{color:var(--muted)} .missing{font-style:italic}
.names{overflow-wrap:anywhere} .names b{font-weight:500;color:var(--ink)}
.verdict{font:400 24px/1.35 var(--serif);margin:20px 0 12px;padding-left:16px;max-width:40em;
border-left:4px solid var(--faint)} .better{border-color:var(--after)} .worse{border-color:var(--warm)}
.verdict data{font-weight:600;white-space:nowrap} .verdict small{display:block;font:15px/1.5 var(--sans);
color:var(--muted);margin-top:6px} .verdict small data{color:var(--ink)}
.facts,.problems{font-size:14px} .unfinished,.problems{color:var(--warm)}
figure{margin:0;min-width:0} figcaption{font-size:12.5px;line-height:1.4;margin-top:4px}
.grid{display:grid;gap:26px 30px} .grid+details{margin-top:22px}
.two{grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr))}
.three{grid-template-columns:repeat(auto-fill,minmax(min(100%,270px),1fr))}
.four{grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr))}
.split{display:grid;gap:20px 40px;grid-template-columns:repeat(auto-fit,minmax(min(100%,360px),1fr))}
.prose{font-size:14px;padding-top:2px}
.scroll{overflow-x:auto} table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:4px 18px 4px 0;font-weight:400;border-bottom:1px solid var(--hair);
vertical-align:baseline} th[scope=col]{color:var(--muted);font-size:12.5px}
.numbers th,.numbers td{text-align:right;white-space:nowrap} .pairs td b{font-size:17px}
.settings th,.time th{color:var(--muted)} .time{width:100%} .time td{white-space:nowrap}
.time td:last-child{width:50%;padding:0} .bar{display:block;height:9px;background:var(--after);opacity:.75}
.key{font-size:12.5px;margin-top:8px} .key span{margin-right:16px;white-space:nowrap}
.key i{display:inline-block;width:9px;height:9px;margin-right:5px;border-radius:2px;
border:1px solid var(--tint)} .key .full{background:var(--tint)}
.films{display:flex;gap:8px} .film{flex:1;min-width:0} .film p{font-size:13px;margin:2px 0 0}
video{display:block;width:100%;background:var(--wash);border-radius:3px;cursor:pointer}
.film.none{display:grid;place-items:center;background:var(--wash);color:var(--muted);font-size:13px}
.badge{font-weight:600;float:right} .solved{color:var(--green)} .failed{color:var(--warm)}
button{font:inherit;color:var(--after);background:none;border:0;padding:0;cursor:pointer;
text-decoration:underline} ul{padding-left:20px;margin:0}
details{margin-top:14px} summary{cursor:pointer;color:var(--muted)} details>*+*{margin-top:8px}
pre{background:var(--wash);padding:12px 14px;overflow-x:auto;font-size:12.5px;line-height:1.45}
code{font-size:12px;color:var(--muted)}
@media(max-width:600px){main{padding:22px 16px 48px} h1{font-size:25px} .verdict{font-size:20px}
.settings td:last-child{display:none}}
@media print{details{display:none} section{break-inside:avoid}}
"""
