"""What every schema checks with, and the error a user can correct."""

import math
from typing import Any

MISSING: Any = "???"


class ConfigError(ValueError):
    """The user's configuration is wrong; the message has the cure."""


def require(condition: bool, key: str, value: object, must: str) -> None:
    if not condition:
        raise ConfigError(f"{key} is {value}; it must be {must}.")


def check_rates(rates: dict[str, float], key: str) -> None:
    for name, rate in rates.items():
        require(0 < rate < math.inf, f"{key}.{name}", rate, "positive and finite; freeze=[...] keeps a group as it is")


def check_common(config: Any) -> None:
    seed = getattr(config, "seed", 0)
    require(seed >= 0, "seed", seed, "0 or more")
    device = getattr(config, "device", "auto")
    valid = device in ("auto", "cpu", "cuda") or device.startswith("cuda:")
    require(valid, "device", device, "auto, cpu, cuda or cuda:N")
    if hasattr(config, "inference_batch"):
        require(config.inference_batch >= 1, "inference_batch", config.inference_batch, "at least 1")
