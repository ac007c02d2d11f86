"""Every suite by name. Adding one: a file here, one line below, one YAML under configs/suite."""

import difflib
import importlib
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
