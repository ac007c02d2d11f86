"""Every suite by name. Adding one: a file here, one line below, one YAML under configs/suite."""

import difflib
import importlib
import os
import re
from pathlib import Path

from rlvla_envs.base import SuiteConfig, VecEnv

SUITES = {
    "toy": "rlvla_envs.toy:ToyEnv",
    "maniskill": "rlvla_envs.maniskill:ManiSkillEnv",
    "simpler_env": "rlvla_envs.simpler_env:SimplerEnv",
    "simpler_env_ood": "rlvla_envs.simpler_env:SimplerEnv",
}


def check_suite(config: SuiteConfig) -> None:
    """Raise ValueError for a suite nobody has, with the nearest one, or an interpreter that is not there."""
    if config.name not in SUITES:
        close = difflib.get_close_matches(config.name, SUITES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"suite.name is {config.name!r}, which does not exist.{hint} Suites: {', '.join(SUITES)}.")
    if config.python is not None:
        interpreter_path(config.python)


def interpreter_path(python: str) -> str:
    """`SuiteConfig.python` as an absolute path.

    Raises:
        ValueError: there is nothing that could be run.
    """
    # Not resolved: the interpreter of a virtual environment is a link, and finds its packages by the link's place.
    path = Path(os.path.abspath(Path(python).expanduser()))
    if path.is_file() and os.access(path, os.X_OK):
        return str(path)
    inside = path / "bin" / "python"
    hint = f" Did you mean {inside}?" if inside.is_file() else ""
    raise ValueError(
        f"suite.python is {python!r}, and {path} is no program that can be run.{hint} Make a virtual environment for "
        "the simulator and give its bin/python (docs/how-to/foreign-simulators.md), or leave suite.python=null."
    )


def make_env(config: SuiteConfig, num_envs: int) -> VecEnv:
    """Build ``num_envs`` simulators of a suite: in this process, or in another interpreter if the suite names one.

    Raises:
        ValueError: unknown suite, task or option, or no such interpreter.
        RuntimeError: the simulator cannot run on this machine; the message has the cure.
    """
    check_suite(config)
    if config.python is not None:
        from rlvla_envs.foreign import ForeignEnv

        return ForeignEnv(config, num_envs)
    module, name = SUITES[config.name].split(":")
    env: VecEnv = getattr(importlib.import_module(module), name)(config, num_envs)
    return env


def check_memory(config: SuiteConfig, num_envs: int, num_processes: int) -> None:
    """Refuse more environments than memory allows, before the first of them is built.

    A suite whose environments are large says what they take: a function ``memory_mb(config, num_envs)`` in its module.

    Raises:
        ValueError: they would not fit; the message says how many do.
    """
    module = importlib.import_module(SUITES[config.name].split(":")[0])
    estimate, available = getattr(module, "memory_mb", None), available_mb()
    if estimate is None or available is None or num_processes * estimate(config, num_envs) <= available:
        return
    fitting = [n for n in range(1, num_envs) if num_processes * estimate(config, n) <= available]
    alone = available // estimate(config, 1)
    cure = (
        f"workers.envs_per_actor={fitting[-1]} fits"
        if fitting
        else f"workers.num_actors={alone} with one environment each fits"
        if alone
        else "not even one fits; free some memory"
    )
    raise ValueError(
        f"{num_envs} environments in each of {num_processes} processes need about "
        f"{num_processes * estimate(config, num_envs)} MB and {available} MB are free: {cure}."
    )


def available_mb() -> int | None:
    """Memory that new processes may still take; None where the system does not say."""
    limits = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        limits += [int(kb) // 1024 for kb in re.findall(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())]
    maximum, current = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if maximum.is_file() and current.is_file() and maximum.read_text().strip().isdigit():
        limits.append((int(maximum.read_text()) - int(current.read_text())) // 2**20)
    return min(limits, default=None)
