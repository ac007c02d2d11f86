"""How starVLA normalises: dataset_statistics.json, and per robot what is done with it, which no checkpoint says.

The table is that of starVLA's data configurations, by robot type. Modes, of a value x (StateActionTransform):

    q99        2 (x - q01) / (q99 - q01) - 1
    min_max    2 (x - min) / (max - min) - 1
    mean_std   (x - mean) / std
    binary     1 where x > 0.5, else 0; back: open where what is sampled is above 0.5
    none       x

A gripper of starVLA's data is 1 where it is open and 0 where it is closed; which numbers the suite has for that, the
convention of its action component says.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlvla.config import ImportConfig
from rlvla.formats.base import affine, read_json, read_numbers
from rlvla.policies.action_stats import ActionStats
from rlvla_envs.base import ActionComponent, EnvSpec

FILE = "dataset_statistics.json"
MODES = ("q99", "min_max", "mean_std", "binary", "none")
AFFINE = {"q99": "QUANTILES", "min_max": "MIN_MAX", "mean_std": "MEAN_STD"}


class Robot(NamedTuple):
    """What a data configuration fixes."""

    action: tuple[str, ...]
    """Mode of each channel."""
    images: tuple[str, ...]
    """In the order of the prompt."""


ROBOTS = {
    "oxe_bridge": Robot((*["q99"] * 6, "binary"), ("image_0",)),
    "oxe_rt1": Robot((*["q99"] * 6, "binary"), ("image",)),
    # Its gripper is not normalised; it is 0 or 1 in the data, and cut at 0.5 by the evaluation.
    "libero_franka": Robot((*["min_max"] * 6, "binary"), ("primary_image", "wrist_image")),
}
MIXES = {
    "libero_all": "libero_franka",
    "libero_goal": "libero_franka",
    "libero_spatial": "libero_franka",
    "libero_object": "libero_franka",
    "libero_10": "libero_franka",
}
"""datasets.vla_data.data_mix -> robot, where the statistics have another name for it. Mixes of several robots name
their statistics after the robots."""


class Normalization(NamedTuple):
    stats: ActionStats
    images: tuple[str, ...]
    """Names of the checkpoint's images in their order; empty where the robot is not in the table."""


def read_normalization(
    run: Path, config: ImportConfig, spec: EnvSpec, data_mix: Any, *, uses_state: bool
) -> Normalization:
    """The statistics that a policy acts with in a suite.

    Args:
        data_mix: of the checkpoint's configuration.
        uses_state: whether the policy reads the suite's state.

    Raises:
        ValueError: statistics are missing, ambiguous or of other channels, or nobody says how they are used.
    """
    path = run / FILE
    if config.statistics is not None:
        if path.is_file():
            raise ValueError(f"{run} has statistics of its own ({FILE}). Leave statistics={config.statistics} out.")
        path = Path(config.statistics)
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: without it the policy's actions have no units. Copy it from the training run, or give "
            f"statistics=FILE, a {FILE} of starVLA."
        )
    key, entry = _entry(read_json(path), config.robot, path)
    robot = ROBOTS.get(key, ROBOTS.get(MIXES.get(str(data_mix), "")))
    if config.normalization:
        modes = _modes("normalization", config.normalization, spec.action_size)
    elif robot is not None:
        modes = robot.action
    else:
        raise ValueError(
            f"{path} has statistics of {key!r}, and no checkpoint says how they are used: the table knows "
            f"{', '.join(ROBOTS)}, and data_mix is {data_mix!r}. Give normalization=[MODE,...], one of "
            f"{', '.join(MODES)} for each action channel, as in the robot's data configuration (data_config.py)."
        )
    where = f"{path} ({key}.action)"
    table = _table(entry, "action", where)
    if len(modes) != spec.action_size:
        raise ValueError(
            f"{where} is for {len(modes)} channels, the suite has {spec.action_size}. Choose a suite with the "
            "checkpoint's conventions (suite=NAME)."
        )
    _check_mask(entry["action"].get("mask"), modes, where)
    low, high = _bounds(modes, table, where)
    binary = np.array([mode == "binary" for mode in modes])
    for channel in np.flatnonzero(binary):
        low[channel], high[channel] = closed_and_open(_component(spec, int(channel)))
    middle, half, bound = _state(entry, config, spec, f"{path} ({key}.state)", uses_state)
    unclipped = {"mean_std", "none"} & set(modes)
    stats = ActionStats(
        low.astype(np.float32),
        high.astype(np.float32),
        middle.astype(np.float32),
        half.astype(np.float32),
        # starVLA's evaluation cuts what was mapped from quantiles or extremes at 1.
        action_bound=float("inf") if unclipped else 1.0,
        state_bound=bound,
        binary=binary if binary.any() else None,
    )
    return Normalization(stats, () if robot is None else robot.images)


def closed_and_open(component: ActionComponent) -> tuple[float, float]:
    """The numbers of a gripper, from the words of its convention, such as "absolute, 1 open, -1 closed".

    Raises:
        ValueError: the words do not say.
    """
    found = [re.search(rf"(-?\d+(?:\.\d+)?)\s+{word}", component.convention) for word in ("closed", "open")]
    if found[0] is None or found[1] is None:
        raise ValueError(
            f"the suite's action component {component.name!r} has the convention {component.convention!r}; for a "
            'binary channel it must say which number is "open" and which is "closed", as in "1 open, -1 closed".'
        )
    return float(found[0].group(1)), float(found[1].group(1))


def _component(spec: EnvSpec, channel: int) -> ActionComponent:
    return [component for component in spec.action for _ in range(component.size)][channel]


def _entry(data: Mapping[str, Any], robot: str | None, path: Path) -> tuple[str, Mapping[str, Any]]:
    keys = [key for key, value in data.items() if isinstance(value, dict) and "action" in value]
    if robot is None and len(keys) == 1:
        robot = keys[0]
    if robot not in keys:
        said = "None was chosen" if robot is None else f"robot is {robot!r}"
        raise ValueError(
            f"{path} has action statistics of {', '.join(keys) or 'nobody'}. {said}. Give robot=NAME, one of these, as "
            "unnorm_key in starVLA."
        )
    return robot, data[robot]


def _table(entry: Mapping[str, Any], name: str, where: str) -> dict[str, np.ndarray]:
    values = entry.get(name)
    if not isinstance(values, dict):
        raise ValueError(f"{where} is missing or no table of statistics.")
    found = {}
    for key, value in values.items():
        found[key] = read_numbers(value, f"{where}, {key},")
    return found


def _modes(option: str, given: Sequence[str], size: int) -> tuple[str, ...]:
    modes = tuple(given) * (size if len(given) == 1 else 1)
    if len(modes) != size or not set(modes) <= set(MODES):
        raise ValueError(
            f"{option} is {list(given)}; it must be one of {', '.join(MODES)}, for all {size} channels of the suite or "
            "for each."
        )
    return modes


def _bounds(modes: Sequence[str], table: Mapping[str, np.ndarray], where: str) -> tuple[np.ndarray, np.ndarray]:
    """What each mode maps to -1 and to +1; a binary channel's are not statistics, and are filled in later."""
    low, high = -np.ones(len(modes)), np.ones(len(modes))
    for mode in set(modes) & set(AFFINE):
        below, above = affine(AFFINE[mode], table, 0.0, where, "Copy the file from the training run.")
        if len(below) != len(modes):
            raise ValueError(
                f"{where} has {len(below)} channels, the suite has {len(modes)}. Choose a suite with the checkpoint's "
                "conventions (suite=NAME)."
            )
        chosen = np.array([m == mode for m in modes])
        low[chosen], high[chosen] = below[chosen], above[chosen]
    return low, high


def _check_mask(mask: Any, modes: Sequence[str], where: str) -> None:
    """Channels that the statistics mark as not normalised must not be mapped."""
    if mask is None:
        return
    if not isinstance(mask, list) or len(mask) != len(modes):
        raise ValueError(f"{where} has mask = {mask!r}; it must have one entry for each of {len(modes)} channels.")
    wrong = [i for i, (used, mode) in enumerate(zip(mask, modes, strict=True)) if not used and mode in AFFINE]
    if wrong:
        raise ValueError(
            f"{where} has mask = false for channel {wrong[0]}, which is not normalised then, and the mode there is "
            f"{modes[wrong[0]]!r}. Give normalization=[MODE,...] with none or binary for it."
        )


def _state(
    entry: Mapping[str, Any], config: ImportConfig, spec: EnvSpec, where: str, uses_state: bool
) -> tuple[np.ndarray, np.ndarray, float]:
    """Middle and half range of each channel, and the bound; they mean nothing where the state is not read."""
    size = spec.state_size
    if not uses_state:
        return np.zeros(size), np.ones(size), 4.0
    if not config.state_normalization:
        raise ValueError(
            f"the checkpoint reads the robot's state, and does not say how {where} is used. Give "
            "state_normalization=[MODE,...], q99, min_max, mean_std or none for each state channel, as in the robot's "
            "data configuration (data_config.py)."
        )
    modes = _modes("state_normalization", config.state_normalization, size)
    if "binary" in modes or len({mode == "q99" for mode in modes}) > 1:
        raise ValueError(
            f"state_normalization is {list(modes)}; supported are min_max, mean_std and none in any mixture, or q99 "
            "for all channels, which alone is clipped."
        )
    low, high = _bounds(modes, _table(entry, "state", where), where)
    # A channel that never moved: by min_max starVLA gives it as 0, by the others as it is.
    still, zeroed = high == low, np.array([mode == "min_max" for mode in modes])
    about = np.where(zeroed, low, 0.0)
    low, high = np.where(still, about - 1, low), np.where(still, about + 1, high)
    return (low + high) / 2, (high - low) / 2, 1.0 if modes[0] == "q99" else float("inf")
