"""Every architecture by name. Adding one: a file here, one line below, YAML under configs/policy."""

import difflib
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from rlvla.policies.action_stats import ActionStats
from rlvla.policies.policy import Policy
from rlvla_envs.base import EnvSpec

ARCHITECTURES = {
    "qwen_vla": "rlvla.policies.qwen_vla:QwenVLAConfig:QwenVLA",
    "uam": "rlvla.policies.uam:UAMConfig:UAM",
    "vlm4vla": "rlvla.policies.vlm4vla:VLM4VLAConfig:VLM4VLA",
    "pi0": "rlvla.policies.pi:Pi0Config:Pi0",
    "pi05": "rlvla.policies.pi:Pi05Config:Pi05",
    "smolvla": "rlvla.policies.smolvla:SmolVLAConfig:SmolVLA",
    "qwen_gr00t": "rlvla.policies.qwen_gr00t:QwenGr00tConfig:QwenGr00t",
    "qwen_oft": "rlvla.policies.qwen_oft:QwenOftConfig:QwenOft",
    "qwen_pi": "rlvla.policies.qwen_pi:QwenPiConfig:QwenPi",
    "twinbrain_vla": "rlvla.policies.twinbrain_vla:TwinBrainVLAConfig:TwinBrainVLA",
}
"""module:configuration:policy. A configuration has ``name``, and ``vlm`` with ``vocab_size`` and ``patch_size``."""


class Architecture(NamedTuple):
    """A policy class and the dataclass of its options."""

    config: type
    policy: Callable[[Any, EnvSpec, ActionStats, Any], Policy]
    """(config, env_spec, stats, tokenizer) -> policy."""


def architecture(name: str) -> Architecture:
    """The architecture of a name; modules are imported when first asked for.

    Raises:
        ValueError: nobody has it; the message suggests the nearest.
    """
    if name not in ARCHITECTURES:
        close = difflib.get_close_matches(str(name), ARCHITECTURES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"policy.name is {name!r}, which does not exist.{hint} Policies: {', '.join(ARCHITECTURES)}.")
    module, config, policy = ARCHITECTURES[name].split(":")
    found: Any = importlib.import_module(module)
    return Architecture(getattr(found, config), getattr(found, policy))


def check_name(name: str, own: str) -> None:
    """Refuse a configuration that says it is another architecture's."""
    if name != own:
        raise ValueError(
            f"policy.name is {name!r}; it must be {own!r} in this configuration. policy=NAME chooses another "
            f"architecture, and there are: {', '.join(ARCHITECTURES)}."
        )
