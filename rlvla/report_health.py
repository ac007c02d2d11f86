"""Is the training sound? Charts with what healthy looks like, alarms, and where the time went."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

from rlvla.report_page import html_figure, html_missing, html_section, html_table
from rlvla.run_folder import RunFolder, list_in, number_in
from rlvla.svg import (
    Format,
    Interval,
    Reference,
    Series,
    line_chart,
    number,
    percent,
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
    {"ppo/kl": "KL", "ppo/target_kl": "target"},
    "near the target. Far above it, the policy moved further than its data supports.",
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


def health_section(run: RunFolder) -> str:
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
    return html_section(
        "Health",
        f'<div class="grid three">{figures}</div>{_iteration_table(run)}',
        "Against iterations. A hollow mark lies off the scale; point at any mark for its value.",
    )


def _panel(run: RunFolder, panel: Panel) -> str:
    rows = [row for row in run.iterations if number_in(row, "iteration") is not None]
    values = {key: [number_in(row, key) for row in rows] for key in panel.keys}
    series = [
        Series(name=name, x=[number_in(row, "iteration") or 0.0 for row in rows], y=values[key], tint=TINTS[i])
        for i, (key, name) in enumerate(panel.keys.items())
        if any(value is not None for value in values[key])
    ]
    if not series:
        return html_figure(panel.title, html_missing("Not recorded."), f"Healthy: {panel.healthy}")
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
    return html_figure(panel.title, chart, f"Healthy: {panel.healthy}")


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
        found = [(number_in(row, key), form) for _, key, form in COLUMNS]
        rows.append([form(value) if value is not None else "–" for value, form in found])
    table = html_table(rows, [name for name, _, _ in COLUMNS], "numbers")
    return f"<details><summary>All iterations as a table</summary>{table}</details>"


def alarms_section(run: RunFolder) -> str:
    if not run.trains:
        return ""
    items = ""
    for alarm in run.alarms:
        where, what = str(alarm.get("where")), str(alarm.get("message"))
        items += f"<li><b>{escape(where)}</b> {escape(what)}</li>"
    return html_section("Alarms", f"<ul>{items}</ul>" if items else "<p>None.</p>")


def restarts_section(run: RunFolder) -> str:
    """What was lost while the run went, what that cost, and what is no longer played."""
    losses = [alarm for alarm in run.alarms if str(alarm.get("where")).startswith(LEARNERS_LOST)]
    if not run.trains and not run.restarts:
        return ""

    def total(key: str) -> str:
        return number(sum(number_in(row, key) or 0.0 for row in run.restarts))

    rows = []
    if run.restarts:
        workers = sorted({str(row.get("worker")) for row in run.restarts})
        what = f"simulator {escape(', '.join(workers))}"
        costs = [total(key) for key in ("recovery_s", "replayed_chunks", "lost_episodes")]
        rows.append((what, str(len(run.restarts)), *costs))
    if losses:
        rows.append(("all learners, from the newest checkpoint", str(len(losses)), "–", "–", "–"))
    if not rows:
        return html_section("Restarts", "<p>None: no simulator and no learner was lost.</p>")
    head = ("what", "times", "seconds until it was back", "chunks played again", "episodes lost")
    left_out = _quarantined(run)
    note = (
        f"<p>Initial states that killed their simulator and were left out: <b>{left_out}</b>.</p>" if left_out else ""
    )
    return html_section("Restarts", html_table(rows, head, "numbers") + note, "Why is under Alarms.")


LEARNERS_LOST = "restart "
"""What `rlvla.train.lead` calls the loss of a learner rank."""


def _quarantined(run: RunFolder) -> str:
    """States left out of rollouts, and those that evaluations counted as failures."""
    records = [*run.restarts, *run.evaluations.values()]
    states = {state for record in records for state in list_in(record, "quarantined") if isinstance(state, int)}
    return ", ".join(map(str, sorted(states)))


def time_section(run: RunFolder) -> str:
    if not run.iterations:
        return ""

    def minutes(key: str) -> float:
        return sum(number_in(row, key) or 0.0 for row in run.iterations) / 60

    rollouts, parts = minutes("time/rollout_s"), (minutes("time/infer_s"), minutes("time/simulators_s"))
    if any(parts):
        # Under async the parts are of a thread that worked beside the updates, and may exceed what was waited for.
        spent = {
            "rollouts: deciding": parts[0],
            "rollouts: waiting for simulators": parts[1],
            "rollouts: all else": max(0.0, rollouts - sum(parts)),
        }
    else:
        # What an earlier version wrote.
        spent = {"rollouts": rollouts}
    spent |= {"updates": minutes("time/update_s"), "checkpoints": minutes("time/save_s")}
    total = number_in(run.summary, "minutes") or max(number_in(row, "minutes") or 0.0 for row in run.iterations)
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
    rates = sorted(rate for row in run.iterations if (rate := number_in(row, "speed/env_steps_per_s")) is not None)
    lead = f"Rollouts run at {number(rates[len(rates) // 2])} environment steps per second (median)." if rates else ""
    return html_section("Where the time went", html_table(rows, css="time"), lead)
