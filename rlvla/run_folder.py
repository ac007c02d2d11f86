"""What a run folder holds. Whatever is absent or damaged is a gap or a named problem, never an exception."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlvla.svg import (
    Interval,
)
from rlvla_algos.statistics import wilson_interval

Record = Mapping[str, Any]


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
    restarts: Sequence[Record]
    """Of simulators, one line each: no two are the same."""
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


def read_run(path: Path) -> RunFolder:
    """Read a run folder; a file that is damaged or torn becomes a problem, not an exception."""
    problems: list[str] = []
    lines = _read_metrics(path / "metrics.jsonl", problems)
    config_text = _read_text(path / "config.yaml", problems)
    config = _parse_yaml(config_text, "config.yaml", problems)
    policy_texts = (_read_text(file, problems) for file in _policy_configs(path, config))
    policy_text = next((text for text in policy_texts if text), "")
    evaluations = {p.stem: _read_json(p, problems, {}) for p in sorted((path / "evaluations").glob("*.json"))}
    return RunFolder(
        path=path,
        config=config,
        config_text=config_text,
        policy_config=_parse_yaml(policy_text, "the policy's config.yaml", problems),
        versions=_read_json(path / "versions.json", problems, {}),
        summary=_read_json(path / "summary.json", problems, {}),
        # Whoever repeats an iteration repeats it with the same result: the last line counts.
        iterations=_last_of_each(lines, "iteration", ("iteration",)),
        alarms=_last_of_each(lines, "alarm", ("where", "message")),
        restarts=[line for line in lines if line.get("kind") == "restart"],
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
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
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


def number_in(record: Record, key: str) -> float | None:
    """A finite number of a record, or None: null, NaN, text and absence are all gaps."""
    found = record.get(key)
    # Comparisons with NaN are false; a bound below the largest float keeps sums of a few values finite.
    return float(found) if isinstance(found, int | float) and abs(found) < 1e300 else None


def interval_in(record: Record) -> Interval | None:
    bounds = [number_in({"bound": bound}, "bound") for bound in list_in(record, "interval")]
    if len(bounds) != 2 or bounds[0] is None or bounds[1] is None:
        return None
    return bounds[0], bounds[1]


def list_in(record: Record, key: str) -> list[Any]:
    found = record.get(key)
    return found if isinstance(found, list) else []


def rate_interval(rate: float | None, trials: float | None) -> Interval | None:
    """Wilson 95% of a rate over a known number of trials."""
    if rate is None or trials is None or trials < 1 or not 0 <= rate <= 1:
        return None
    return wilson_interval(round(rate * trials), round(trials))
