"""From a configuration back to the words one would type for it."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml  # type: ignore[import-untyped, unused-ignore]

from rlvla.compose import compose, config_dir, group_choices, shown, to_yaml
from rlvla.config import TrainConfig
from rlvla_envs.base import SuiteConfig

PLAIN = re.compile(r"(?!(?:null|true|false|nan|inf)$)[a-z_/][\w./+-]*", re.IGNORECASE)
"""Text that Hydra's grammar takes as it is, and as text."""


def train_words(config: TrainConfig) -> list[str]:
    """The shortest list of words with which `rlvla train` composes to ``config``: a suite, and what differs from its
    defaults.

    Raises:
        RuntimeError: they would not.
    """
    suite = _nearest_suite(config.suite)
    # `compose` keeps this one from Hydra, which would read it as a choice: no quotes.
    first = [f"suite={suite}", f"policy={config.policy}"]
    before, now = (_tree(c) for c in (compose("train", first), config))
    words = first + [_word(key, value) for key, value in _changes(before, now)]
    if compose("train", words) != config:
        raise RuntimeError(f"these words do not compose to the configuration they were made of: {words}")
    return words


def _nearest_suite(suite: SuiteConfig) -> str:
    """The file of configs/suite with the fewest differences; what it sets in open mappings cannot be taken back."""
    now = _leaves(dataclasses.asdict(suite))

    def distance(name: str) -> float:
        content = yaml.safe_load((config_dir() / "suite" / f"{name}.yaml").read_text())
        content.pop("defaults", None)
        before = _leaves(dataclasses.asdict(SuiteConfig(**content)))
        return float("inf") if before.keys() - now.keys() else sum(before.get(k) != v for k, v in now.items())

    return min(group_choices("train")["suite"], key=distance)


def _tree(config: Any) -> dict[str, Any]:
    return _leaves(yaml.safe_load(to_yaml(config)))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; a list is a value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= _leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in now.items():
        if key not in before or before[key] != value:
            yield key, value


def _word(key: str, value: Any) -> str:
    return f"{key}={_quoted(value) if isinstance(value, str) else shown(value)}"


def _quoted(text: str) -> str:
    """In quotes where it would otherwise be read as a number, a list, null or an error."""
    if PLAIN.fullmatch(text):
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
