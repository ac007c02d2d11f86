"""Every suite by name. Adding one: a file here, one line below, one YAML under configs/suite."""

import difflib
import importlib

from rlvla_envs.base import SuiteConfig, VecEnv

SUITES = {
    "toy": "rlvla_envs.toy:ToyEnv",
    "maniskill": "rlvla_envs.maniskill:ManiSkillEnv",
    "simpler_env": "rlvla_envs.simpler_env:SimplerEnv",
    "simpler_env_ood": "rlvla_envs.simpler_env:SimplerEnv",
}


def check_suite(config: SuiteConfig) -> None:
    """Raise ValueError for a suite nobody has, with the nearest one."""
    if config.name not in SUITES:
        close = difflib.get_close_matches(config.name, SUITES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"suite.name is {config.name!r}, which does not exist.{hint} Suites: {', '.join(SUITES)}.")


def make_env(config: SuiteConfig, num_envs: int) -> VecEnv:
    """Build ``num_envs`` simulators of a suite in this process.

    Raises:
        ValueError: unknown suite, task or option.
        RuntimeError: the simulator cannot run on this machine; the message has the cure.
    """
    check_suite(config)
    module, name = SUITES[config.name].split(":")
    env: VecEnv = getattr(importlib.import_module(module), name)(config, num_envs)
    return env
