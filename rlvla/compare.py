"""`rlvla compare BEFORE AFTER suites=[...]`: what a policy gained, kept and lost, with statistics that hold."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlvla.compare_page import render
from rlvla.compare_tables import compared_markdown, compared_rows, csv_text
from rlvla.comparison import Change, compare_results, support_sentence, verdict
from rlvla.config import CompareConfig, ConfigError, EvalConfig
from rlvla.evaluate_suites import Policy, make_plan, measure_missing, read_policy
from rlvla.results import Result, differences, read_results
from rlvla.run import Run, check_output
from rlvla_envs.suites import HELD_OUT

Side = Policy | list[Result]
"""A policy that is measured where results are missing, or the results of a file."""


def run(config: CompareConfig) -> dict[str, Any]:
    """Compare two policies on every suite. ``config.output`` gets the page, the tables and the numbers.

    Raises:
        ConfigError: the two were not measured alike, or something is missing that could be measured.
        ValueError: a suite or a policy that `rlvla.evaluate_suites.make_plan` refuses.
    """
    sides = [_side(Path(given)) for given in (config.before, config.after)]
    policies = [side for side in sides if isinstance(side, Policy)]
    labels = _labels(config, sides)
    check_output(config, "compare")
    plan = make_plan(config, policies)
    read = [[] if isinstance(side, Policy) else _chosen(side, labels, config) for side in sides]
    with Run.open(config, "compare", total=len(labels)) as record:
        record.require_policy(" ".join(_digest(side) for side in sides))

        def of(label: str) -> list[Result]:
            """Both sides' results on a suite."""
            return [
                plan.found[side.sha256, label] if isinstance(side, Policy) else results[labels.index(label)]
                for side, results in zip(sides, read, strict=True)
            ]

        measure_missing(config, plan, record, lambda label: telling_states(*of(label)))
        before, after = (list(side) for side in zip(*map(of, labels), strict=True))
        comparison = compare_results(before, after, config.trained_on or _trained(before))
        rows = compared_rows(comparison)
        _write(record.folder / "compare.md", compared_markdown(comparison, before, after))
        _write(record.folder / "compare.csv", csv_text(rows))
        results = {"before": [r.to_dict() for r in before], "after": [r.to_dict() for r in after]}
        content = {
            "changes": rows,
            "notes": list(comparison.notes),
            "results": results,
        }
        _write(record.folder / "compare.json", json.dumps(content, indent=1) + "\n")
        _write(record.folder / "compare.html", render(comparison, before, after))
        summary = {
            **{change.suite: _short(change) for change in comparison.groups},
            "suites": {change.suite: _short(change) for change in comparison.suites},
            "notes": list(comparison.notes),
            "episodes_played": plan.played,
            "results_known": plan.cached,
            "page": str(record.folder / "compare.html"),
        }
        for change in comparison.groups:
            record.progress.note(f"{change.suite}: {verdict(change)}")
        record.finish(summary)
        return summary


def _side(path: Path) -> Side:
    return read_results(path) if path.is_file() else read_policy(path)


def _digest(side: Side) -> str:
    return side.sha256 if isinstance(side, Policy) else side[0].policy_sha256


def _labels(config: CompareConfig, sides: Sequence[Side]) -> list[str]:
    """The suites to compare on: those that are named, or all of two result files."""
    if config.suites:
        return list(config.suites)
    if any(isinstance(side, Policy) for side in sides):
        raise ConfigError(
            "suites must be given, for example suites=[simpler_env,simpler_env_ood]. `rlvla suites` lists them."
        )
    first, second = ([result.label for result in side] for side in sides if not isinstance(side, Policy))
    if set(first) != set(second):
        raise ConfigError(
            f"{config.before} has results on {', '.join(first)} and {config.after} on {', '.join(second)}. Name those "
            f"to compare, suites=[{','.join(label for label in first if label in second)}], or measure the others."
        )
    return first


def _chosen(side: list[Result], labels: Sequence[str], config: CompareConfig) -> list[Result]:
    """The results of a file in the order of the suites.

    Raises:
        ConfigError: one is missing, or was measured in another way than the command says.
    """
    by_label = {result.label: result for result in side}
    absent = [label for label in labels if label not in by_label]
    if absent:
        raise ConfigError(
            f"the result file of {side[0].policy} has nothing on {', '.join(absent)}; it has {', '.join(by_label)}. "
            "Give the policy's folder instead, and what is missing is played."
        )
    for label, suite in config.suites.items():
        asked = {key: value for key, value in dataclasses.asdict(suite).items() if key != "python"}
        _require_equal(f"suite {label}", asked, by_label[label].identity["suite"]["config"])
    if config.eval != EvalConfig(shuffled_images=False):
        for label in labels:
            settings = by_label[label].identity["settings"]
            asked = {key: value for key, value in dataclasses.asdict(config.eval).items() if key in settings}
            _require_equal("eval", asked, {key: settings[key] for key in asked})
    return [by_label[label] for label in labels]


def _require_equal(what: str, asked: dict[str, Any], measured: dict[str, Any]) -> None:
    differing = [f"{key} is {theirs} there and {ours} here" for key, ours, theirs in differences(asked, measured)]
    if differing:
        raise ConfigError(
            f"the result file was measured with other settings of {what} than this command has: "
            f"{'; '.join(differing)}. Give those of the file, or the policy's folder to measure it again."
        )


def _trained(results: Sequence[Result]) -> list[str]:
    """Suites that are there to be trained on."""
    return [result.label for result in results if result.identity["suite"]["config"]["name"] not in HELD_OUT]


def telling_states(before: Result, after: Result) -> list[int]:
    """The first initial state that was gained and the first that was lost, of those with the first noise."""
    visited = len(set(before.evaluation.initial_states))
    pairs = list(
        zip(before.evaluation.outcomes, after.evaluation.outcomes, before.evaluation.initial_states, strict=True)
    )
    firsts = (next((s for b, a, s in pairs[:visited] if (b, a) == kind), None) for kind in ((0, 1), (1, 0)))
    return [state for state in firsts if state is not None]


def _short(change: Change) -> dict[str, Any]:
    return {
        "before": change.before,
        "after": change.after,
        "difference": change.difference,
        "interval": list(change.interval),
        "p_holm": change.p_holm,
        "shown": change.shown,
        "trials": change.trials,
        **({} if change.shown else {"why_not": support_sentence(change)}),
    }


def _write(path: Path, text: str) -> None:
    stage = path.with_name(f"{path.name}.partial")
    stage.write_bytes(text.encode("utf-8", "replace"))
    os.replace(stage, path)
