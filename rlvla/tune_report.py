"""What a study found: report.html, in the style of a run's report, and best.yaml, which `rlvla train` takes."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from rlvla.compose import to_yaml
from rlvla.config.tune import TuneConfig
from rlvla.report_page import PAGE_CSS, html_figure, html_missing, html_section, html_table
from rlvla.svg import (
    CHART_CSS,
    Dimension,
    Interval,
    Reference,
    Series,
    Strand,
    line_chart,
    number,
    parallel_coordinates,
    percent,
)
from rlvla.tune_space import Choices, Range, Space, Value, words
from rlvla.tune_study import TrialRecord, importances
from rlvla_algos.statistics import wilson_interval

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
TINTS = {"complete": 0, "stopped": 3, "failed": 2, "running": 5}


@dataclass(frozen=True)
class StudyView:
    """All that the report and best.yaml are made of."""

    folder: Path
    config: TuneConfig
    space: Space
    words: Sequence[str]
    """Of `rlvla train`, for what all trials have in common."""
    trials: Sequence[TrialRecord]
    minutes: float


def best_of(trials: Sequence[TrialRecord]) -> TrialRecord | None:
    """The complete trial with the highest lower bound; of equal ones that with fewer environment steps."""
    ended = [trial for trial in trials if trial.state == "complete" and trial.objective is not None]
    return max(ended, key=lambda trial: (trial.objective or 0.0, -trial.env_steps), default=None)


def write_best(view: StudyView) -> None:
    """Write best.yaml; nothing while no trial is complete."""
    best = best_of(view.trials)
    if best is None or best.objective is None or best.success is None:
        return
    own = [word for word in view.words if word.partition("=")[0] not in best.values]
    ended = sum(trial.state != "running" for trial in view.trials)
    lines = [
        f"# The best of {ended} trials of `rlvla tune`: trial {best.number}, "
        f"success {percent(best.success)}, lower end",
        f"# of its {view.config.tune.confidence:.0%} interval {percent(best.objective)}. It was chosen by these very "
        "numbers, so they flatter it; a run with another seed",
        "# says what it is worth:",
        f"#   rlvla train @{view.folder / 'best.yaml'} output=runs/best seed={view.config.seed + 1000}",
        "train:",
        # A word holds quotes and colons at will; JSON strings are YAML.
        *(f"  - {_yaml(word)}" for word in (*own, *words(best.values))),
    ]
    _replace(view.folder / "best.yaml", "\n".join(lines) + "\n")


def _yaml(word: str) -> str:
    return "'" + word.replace("'", "''") + "'" if any(c in word for c in "'\"{}[]:#, ") else word


def write_study_report(view: StudyView) -> Path:
    """Write report.html into the study's folder, whatever state the study is in."""
    page = render(view)
    _replace(view.folder / "report.html", page)
    return view.folder / "report.html"


def _replace(path: Path, text: str) -> None:
    stage = path.with_name(path.name + ".partial")
    stage.write_text(text, encoding="utf-8")
    os.replace(stage, path)


def render(view: StudyView) -> str:
    """The whole page."""
    sections = [
        _header(view),
        _best_section(view),
        _history_section(view),
        _coordinates_section(view),
        _importance_section(view),
        _trials_section(view),
        _failures_section(view),
        _details(view),
    ]
    suite = view.config.suite
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(suite.task)} · rlvla tune</title><style>{PAGE_CSS}{CHART_CSS}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _header(view: StudyView) -> str:
    config, best = view.config, best_of(view.trials)
    own = next((trial for trial in view.trials if trial.own), None)
    sentence = "No trial has come to its end yet: there are no best settings."
    if best is not None and best.success is not None and best.objective is not None:
        sentence = f"Best: {percent(best.success)} in trial {best.number}, at least {percent(best.objective)}"
        if own is best:
            sentence += "; they are the settings of the command itself"
        elif own is not None and own.success is not None:
            how = "" if own.state == "complete" else f" before they were {own.state}"
            sentence += f", against {percent(own.success)} with the settings of the command itself{how}"
        sentence += f" <small>({_how_chosen(view)})</small>"
    states = [trial.state for trial in view.trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in TINTS if state in states)
    steps = sum(trial.env_steps for trial in view.trials)
    facts = [
        f"{len(states)} of {config.tune.trials} trials: {counts or 'none'}",
        f"{number(steps)} environment steps",
        f"{number(view.minutes)} minutes",
    ]
    names = {"suite": config.suite.name, "policy": config.policy, "study": view.folder.resolve().name}
    return (
        f"<header><h1>{escape(config.suite.task)}: tuning</h1><p class=names>"
        + " · ".join(f"{label} <b>{escape(str(name))}</b>" for label, name in names.items())
        + f'</p><p class="verdict {"better" if best else "flat"}">{sentence}</p>'
        f"<p class=facts>{' · '.join(facts)}</p></header>\n"
    )


def _how_chosen(view: StudyView) -> str:
    seeds = view.config.tune.seeds
    runs = f"{seeds} seeds" if seeds > 1 else "one seed"
    return (
        f"chosen by the lower end of the {view.config.tune.confidence:.0%} interval over {runs}; the best of many is "
        "flattered by the numbers it was chosen by, so measure it again with another seed"
    )


def _best_section(view: StudyView) -> str:
    best = best_of(view.trials)
    if best is None:
        return html_section("Best settings", html_missing("No trial was completed."))
    own = next((trial for trial in view.trials if trial.own), None)
    rows = [
        (
            f"<code>{escape(key)}</code>",
            f"<b>{escape(_value(value))}</b>",
            escape(_value(own.values[key])) if own and own.values else "–",
            escape(str(view.space[key])),
        )
        for key, value in best.values.items()
    ]
    command = f"rlvla train @{view.folder / 'best.yaml'} output=runs/best seed={view.config.seed + 1000}"
    return html_section(
        "Best settings",
        html_table(rows, ("option", "best", "the command's own", "searched")) + f"<pre>{escape(command)}</pre>",
        "<code>best.yaml</code> has them, with all else that the trials had in common. Words after it win over it.",
    )


def _value(value: Value) -> str:
    return value if isinstance(value, str) else number(value)


def _interval(trial: TrialRecord) -> Interval | None:
    total = sum(result["trials"] for result in trial.results)
    return wilson_interval(sum(result["successes"] for result in trial.results), total) if total else None


def _history_section(view: StudyView) -> str:
    known = [trial for trial in view.trials if trial.success is not None]
    if not known:
        return ""
    series, best = [], 0.0
    labels = {"complete": "complete", "stopped": "stopped early, success until then"}
    for state, label in labels.items():
        some = [trial for trial in known if trial.state == state]
        series.append(
            Series(
                name=label,
                x=[trial.number for trial in some],
                y=[trial.success for trial in some],
                interval=[_interval(trial) if state == "complete" else None for trial in some],
                mark="point",
                tint=TINTS[state],
            )
        )
    best_so_far = []
    for trial in view.trials:
        best = max(best, trial.success or 0.0) if trial.state == "complete" else best
        best_so_far.append(best)
    numbers = [trial.number for trial in view.trials]
    series.append(Series(name="best so far", x=numbers, y=best_so_far, tint=1))
    before = [result["before"] for trial in known for result in trial.results]
    chart = line_chart(
        title="Success of the trials",
        description=f"{len(known)} trials with a success rate; the best complete one has {percent(best)}.",
        series=[s for s in series if s.x],
        x_label="trial",
        y_format=percent,
        y_range=(0.0, 1.0),
        references=[Reference(y=before[0], label="before training")] if before else [],
        width=960,
    )
    return html_section("Trials in order", html_figure("Success", chart, "Whiskers are 95% Wilson intervals."))


def _coordinates_section(view: StudyView) -> str:
    known = [trial for trial in view.trials if trial.success is not None and trial.values]
    if not known:
        return ""
    best = best_of(view.trials)
    rates = [trial.success or 0.0 for trial in known]
    low, high = min(rates), max(rates)
    dimensions = [_dimension(key, entry) for key, entry in view.space.items()]
    dimensions.append(Dimension("success", [(i / 4, percent(i / 4)) for i in range(5)]))
    strands = []
    # The best one is drawn last, on top of the others.
    for trial in sorted(known, key=lambda trial: (trial is best, trial.success or 0.0)):
        rate = trial.success or 0.0
        settings = ", ".join(f"{key.rsplit('.', 1)[-1]} {_value(value)}" for key, value in trial.values.items())
        strands.append(
            Strand(
                at=[*(_place(view.space[key], trial.values[key]) for key in view.space), rate],
                tip=f"trial {trial.number}, {trial.state}, {percent(rate)}: {settings}",
                tint=2 if trial is best else TINTS[trial.state],
                strength=1.0 if trial is best else 0.25 + 0.7 * (rate - low) / (high - low or 1.0),
                bold=trial is best,
            )
        )
    chart = parallel_coordinates(
        title="Settings and success",
        description=f"{len(known)} trials as lines through {len(dimensions)} axes, the last one success.",
        dimensions=dimensions,
        strands=strands,
    )
    note = "Orange: the best. Blue: complete. Grey: stopped early, with the success they had then. Darker is better."
    return html_section("Where the good ones lie", html_figure("Settings and success", chart, note))


def _dimension(key: str, entry: Range | Choices) -> Dimension:
    label = key.rsplit(".", 1)[-1]
    if isinstance(entry, Choices):
        return Dimension(label, [(entry.place(value), value) for value in entry.values])
    middle = (entry.low * entry.high) ** 0.5 if entry.log else (entry.low + entry.high) / 2
    values = (entry.low, middle, entry.high) if entry.high > entry.low else (entry.low,)
    return Dimension(label, [(entry.place(value), number(value)) for value in values])


def _place(entry: Range | Choices, value: Value) -> float:
    return entry.place(value if isinstance(entry, Choices) else float(value))  # type: ignore[arg-type]


def comparable(trials: Sequence[TrialRecord]) -> tuple[str, list[tuple[Mapping[str, Value], float]]]:
    """Where most trials were measured after the same number of iterations, and (settings, success) there."""
    steps = [step for trial in trials for step in trial.rungs]
    ended = [(trial.values, trial.success) for trial in trials if trial.state == "complete"]
    # Of the rungs that most came to the last one.
    step = max(set(steps), key=lambda step: (steps.count(step), step), default=-1)
    if steps.count(step) <= len(ended):
        return "the end", [(values, success) for values, success in ended if success is not None]
    there = [(trial.values, trial.rungs[step]) for trial in trials if step in trial.rungs]
    return str(there[0][1]["where"]), [(values, rung["successes"] / rung["trials"]) for values, rung in there]


def _importance_section(view: StudyView) -> str:
    where, points = comparable(view.trials)
    found = importances(view.space, points)
    if not found:
        text = "Too few trials were measured alike to say what mattered; eight are the least."
        return html_section("What mattered", html_missing(text))
    top = sorted(points, key=lambda point: -point[1])[: max(2, round(len(points) / 4))]
    rows = [
        (
            f"<code>{escape(key)}</code>",
            f'<span class="bar" style="width:{100 * share:.1f}%"></span>',
            percent(share),
            escape(_spread(view.space[key], [values[key] for values, _ in top])),
        )
        for key, share in found.items()
    ]
    lead = (
        f"Share of each option in being among the best quarter of {len(points)} trials at {escape(where)} (PED-ANOVA), "
        f"and where the best {len(top)} lie. From so few trials it is a hint where to look, not a proof."
    )
    return html_section(
        "What mattered", html_table(rows, ("option", "share", "", "the best quarter"), css="time"), lead
    )


def _spread(entry: Range | Choices, values: Sequence[Value]) -> str:
    if isinstance(entry, Choices):
        counts = {value: list(values).count(value) for value in entry.values}
        return ", ".join(f"{value} × {count}" for value, count in counts.items() if count)
    numbers = [float(value) for value in values]
    return f"{number(min(numbers))} to {number(max(numbers))}"


def _trials_section(view: StudyView) -> str:
    if not view.trials:
        return html_section("All trials", html_missing("None was begun."))
    best = best_of(view.trials)
    head = ("trial", "", "success", "at least", "steps", *(key.rsplit(".", 1)[-1] for key in view.space), "runs")
    order = {"complete": 0, "running": 1, "stopped": 2, "failed": 3}
    rows = []
    for trial in sorted(view.trials, key=lambda t: (order[t.state], -(t.objective or 0.0), -(t.success or 0.0))):
        label = f"<b>{trial.number}</b>" if trial is best else str(trial.number)
        cells = [
            f"{label}{' (own)' if trial.own else ''}",
            _state(trial),
            "–" if trial.success is None else percent(trial.success),
            "–" if trial.objective is None else percent(trial.objective),
            number(trial.env_steps),
            *(escape(_value(trial.values[key])) if trial.values else "–" for key in view.space),
            ", ".join(_links(view.folder, trial)),
        ]
        rows.append(cells)
    lead = "The best first. A trial that was stopped shows the success it had then. Runs are links to their reports."
    return html_section("All trials", html_table(rows, head, css="numbers"), lead)


def _state(trial: TrialRecord) -> str:
    stopped = [rung["where"] for _, rung in sorted(trial.rungs.items()) if not rung["goes_on"]]
    return f"stopped at {stopped[0]}" if trial.state == "stopped" and stopped else trial.state


def _links(folder: Path, trial: TrialRecord) -> Iterator[str]:
    for run in sorted((folder / "trials" / f"{trial.number:04d}").glob("seed-*")):
        if (run / "report.html").is_file():
            yield f'<a href="{run.relative_to(folder)}/report.html">{run.name}</a>'


def _failures_section(view: StudyView) -> str:
    failed = [trial for trial in view.trials if trial.state == "failed"]
    if not failed:
        return ""
    items = [
        f"<details><summary>Trial {trial.number}: {escape(trial.error.splitlines()[-1])}</summary><p class=names>"
        f"{escape(' '.join(words(trial.values)))}</p><pre>{escape(trial.error)}</pre></details>"
        for trial in failed
    ]
    lead = "They count as tried and as nothing else; the study went on without them."
    return html_section("Trials that died", "".join(items), lead)


def _details(view: StudyView) -> str:
    space = "\n".join(f"{key}: {entry}" for key, entry in view.space.items())
    common = "\n".join(view.words)
    return (
        f"<section><details><summary>Search space</summary><pre>{escape(space)}</pre></details>"
        f"<details><summary>What all trials have in common</summary><pre>{escape(common)}</pre></details>"
        f"<details><summary>Full configuration</summary><pre>{escape(to_yaml(view.config))}</pre></details></section>\n"
    )
