"""`report.html`: what a run did, on one page that needs nothing else.

The page is text, inline SVG and base64 video; its content security policy forbids every request. All that a
run folder may lack (it was killed, it only evaluated) is said on the page and is never an error.

Read the folder (`rlvla.run_folder`), say the verdict, draw the sections from top to bottom.
"""

import base64
import hashlib
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from rlvla.report_evidence import learning_curve_section, pairs_section, success_section, videos_section
from rlvla.report_health import alarms_section, health_section, restarts_section, time_section
from rlvla.report_page import (
    PAGE_CSS,
    SCRIPT,
    SIGNIFICANCE,
    html_missing,
    html_p_value,
    html_section,
    html_table,
)
from rlvla.report_tasks import tasks_section
from rlvla.run_folder import Record, RunFolder, interval_in, number_in, read_run
from rlvla.svg import (
    CHART_CSS,
    Format,
    number,
    percent,
)


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


def render(run: RunFolder) -> str:
    """The whole page."""
    sections = [
        _header(run),
        success_section(run),
        tasks_section(run),
        learning_curve_section(run),
        pairs_section(run),
        videos_section(run),
        health_section(run),
        alarms_section(run),
        restarts_section(run),
        time_section(run),
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


def _data(value: float, form: Format = percent) -> str:
    """A number of the headline, with the exact value from the run's JSON beside what is printed."""
    return f'<data value="{value!r}">{form(value)}</data>'


def _points(value: float) -> str:
    """A difference of two rates in percentage points, with its sign."""
    return ("+" if value > 0 else "") + percent(value).removesuffix("%")


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
    facts = {key: number_in(run.comparison, key) for key in ("before", "after", "trials", "p_value", "difference")}
    known = {key: value for key, value in facts.items() if value is not None}
    if len(known) < len(facts):
        return _verdict_without_test(run)
    before, after, difference = _data(known["before"]), _data(known["after"]), known["difference"]
    states = f"{_data(known['trials'], lambda n: str(int(n)))} held-back initial states"
    interval = interval_in(run.comparison)
    spread = ""
    if interval:
        spread = f", 95% interval {_data(interval[0], _points)} to {_data(interval[1], _points)}"
    test = (
        f"<small>(paired exact McNemar p = {_data(known['p_value'], html_p_value)}; difference "
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
    success, trials = number_in(evaluation, "success"), number_in(evaluation, "trials")
    if success is None or trials is None:
        return "an unreadable share of episodes"
    interval = interval_in(evaluation)
    spread = f" (95% interval {_data(interval[0])} to {_data(interval[1])})" if interval else ""
    return f"{_data(success)} of {_data(trials, lambda n: str(int(n)))} held-back initial states{spread}"


def _facts(run: RunFolder) -> str:
    """How far the run came, in one line."""
    last: Record = run.iterations[-1] if run.iterations else {}
    steps = number_in(run.summary, "env_steps") or number_in(last, "env_steps")
    minutes = number_in(run.summary, "minutes") or number_in(last, "minutes")
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


SETTINGS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("temperature of evaluations", ("eval.temperature",)),
    ("noise level", ("algo.noise_level",)),
    ("reduction of the ratio", ("algo.reduction",)),
    ("clip ε, KL target at first, at last", ("algo.clip_epsilon", "algo.target_kl", "algo.final_target_kl")),
    ("epochs, minibatch", ("algo.epochs", "algo.minibatch_size")),
    ("discount γ, λ, bootstrap at the limit", ("algo.gamma", "algo.gae_lambda", "algo.bootstrap_time_limit")),
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
        return html_section("Settings", html_missing("config.yaml is missing or empty."))
    return html_section("Settings", html_table(rows, css="settings"))


def _find(node: Any, name: str) -> Any:
    """The first value of that name, at any depth."""
    if not isinstance(node, Mapping):
        return None
    if name in node:
        return node[name]
    return next((found for child in node.values() if (found := _find(child, name)) is not None), None)


def _details(run: RunFolder) -> str:
    versions = html_table((escape(str(k)), escape(str(v))) for k, v in run.versions.items())
    config = f"<pre>{escape(run.config_text)}</pre>" if run.config_text else html_missing("config.yaml is missing.")
    return (
        f"<section><details><summary>Full configuration</summary>{config}</details>"
        f"<details><summary>Versions and machine</summary>"
        f"{versions if run.versions else html_missing('versions.json is missing.')}</details></section>\n"
    )
