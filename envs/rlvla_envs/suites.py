"""Every suite by name. Adding one: a file here, one line below, one YAML under configs/suite."""

import difflib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from rlvla_envs.base import SuiteConfig, VecEnv
from rlvla_envs.suite_home import Home, absolute

SUITES = {
    "toy": "rlvla_envs.toy:ToyEnv",
    "maniskill": "rlvla_envs.maniskill:ManiSkillEnv",
    "simpler_env": "rlvla_envs.simpler_env:SimplerEnv",
    "simpler_env_ood": "rlvla_envs.simpler_env:SimplerEnv",
    "libero_spatial": "rlvla_envs.libero:LiberoEnv",
    "libero_object": "rlvla_envs.libero:LiberoEnv",
    "libero_goal": "rlvla_envs.libero:LiberoEnv",
    "libero_10": "rlvla_envs.libero:LiberoEnv",
    "libero_90": "rlvla_envs.libero:LiberoEnv",
    "libero_spatial_pro": "rlvla_envs.libero:LiberoEnv",
    "libero_object_pro": "rlvla_envs.libero:LiberoEnv",
    "libero_goal_pro": "rlvla_envs.libero:LiberoEnv",
    "libero_10_pro": "rlvla_envs.libero:LiberoEnv",
    "metaworld_mt10": "rlvla_envs.metaworld:MetaWorldEnv",
    "metaworld_mt50": "rlvla_envs.metaworld:MetaWorldEnv",
    "metaworld_ml10_train": "rlvla_envs.metaworld:MetaWorldEnv",
    "metaworld_ml10_test": "rlvla_envs.metaworld:MetaWorldEnv",
    "metaworld_ml45_train": "rlvla_envs.metaworld:MetaWorldEnv",
    "metaworld_ml45_test": "rlvla_envs.metaworld:MetaWorldEnv",
    "robocasa_gr1": "rlvla_envs.robocasa_gr1:RoboCasaGR1Env",
    "calvin": "rlvla_envs.calvin:CalvinEnv",
    "robotwin_easy": "rlvla_envs.robotwin:RoboTwinEnv",
    "robotwin_hard": "rlvla_envs.robotwin:RoboTwinEnv",
    "domino": "rlvla_envs.domino:DominoEnv",
    "vln_ce": "rlvla_envs.vln_ce:missing_simulator",
}

HELD_OUT = {
    "simpler_env_ood",
    "libero_spatial",
    "libero_object",
    "libero_goal",
    "libero_10",
    "libero_90",
    "libero_spatial_pro",
    "libero_object_pro",
    "libero_goal_pro",
    "libero_10_pro",
    "metaworld_ml10_test",
    "metaworld_ml45_test",
    "robocasa_gr1",
    "calvin",
    "robotwin_easy",
    "robotwin_hard",
    "domino",
    "vln_ce",
}
"""Suites that are there to be measured on; nothing is trained on them."""


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
    path = absolute(python)
    if path.is_file() and os.access(path, os.X_OK):
        return str(path)
    inside = path / "bin" / "python"
    hint = f" Did you mean {inside}?" if inside.is_file() else ""
    raise ValueError(
        f"suite.python is {python!r}, and {path} is no program that can be run.{hint} Make a virtual environment for "
        "the simulator and give its bin/python (docs/how-to/foreign-simulators.md), or leave suite.python=null."
    )


def home_of(name: str) -> Home | None:
    """The environment that `rlvla suites setup` makes for a suite, where it has one."""
    home: Home | None = getattr(suite_module(name), "HOME", None)
    return home


def homes() -> dict[str, Home]:
    """Every such environment by its name."""
    found = filter(None, map(home_of, SUITES))
    return {home.name: home for home in found}


def stand_in_maker(home: Home) -> Callable[[Path], int] | None:
    """What writes generated assets into an environment's folder and says how many files; None where a suite has its
    own, or nobody wrote such a function."""
    for name in SUITES:
        if home_of(name) == home:
            found: Callable[[Path], int] | None = getattr(suite_module(name), "make_stand_ins", None)
            return found
    return None


def trial_task(name: str) -> str:
    """Task of a suite with which a new environment is tried: its first, where its module does not say another one."""
    return str(getattr(suite_module(name), "TRIAL_TASK", "0"))


def interpreter_of(config: SuiteConfig) -> str | None:
    """The interpreter that hosts a suite: ``suite.python``; else this one (None) where it can; else the suite's home.

    It is found here and not written into the configuration, so that results of two machines have one identity.

    Raises:
        ValueError: no such interpreter; a NotReadyError for a suite that is not set up.
    """
    if config.python is not None:
        return interpreter_path(config.python)
    home = home_of(config.name)
    if home is None or home.is_here():
        return None
    if complaint := home.complaint():
        raise NotReadyError(f"{complaint} Run: {home.cure}", fix=home.cure)
    return str(home.interpreter())


def make_env(config: SuiteConfig, num_envs: int) -> VecEnv:
    """Build ``num_envs`` simulators of a suite: in this process, or in another interpreter if the suite names one.

    Raises:
        ValueError: unknown suite, task or option, or no such interpreter.
        RuntimeError: the simulator cannot run on this machine; the message has the cure.
    """
    check_suite(config)
    python = interpreter_of(config)
    if python is None:
        return make_env_here(config, num_envs)
    from rlvla_envs.foreign import ForeignEnv

    return ForeignEnv(replace(config, python=python), num_envs)


def make_env_here(config: SuiteConfig, num_envs: int) -> VecEnv:
    """`make_env` in this very interpreter."""
    check_suite(config)
    env: VecEnv = getattr(suite_module(config.name), SUITES[config.name].split(":")[1])(config, num_envs)
    return env


def suite_module(name: str) -> ModuleType:
    """The module of a suite. Beside its class it may have ``memory_mb`` (`check_memory`), ``check_ready``
    (`check_ready`), ``outline`` (`outline`), ``VERSION`` and ``PACKAGES`` (`suite_version`), ``RENDERER`` ("vulkan"
    or "mujoco"), ``HOME`` (`home_of`), ``make_stand_ins`` (`stand_in_maker`) and ``TRIAL_TASK`` (`trial_task`)."""
    return importlib.import_module(SUITES[name].split(":")[0])


class NotReadyError(ValueError):
    """A suite lacks something that a command can bring."""

    def __init__(self, message: str, *, fix: str) -> None:
        super().__init__(message)
        self.fix = fix
        """The command."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Raised in a simulator's process it has to reach the user, and pickle cannot call with a keyword.
        return _not_ready, (str(self), self.fix)


def _not_ready(message: str, fix: str) -> NotReadyError:
    return NotReadyError(message, fix=fix)


def require_packages(*modules: str, fix: str) -> None:
    """Raise NotReadyError unless each of these can be imported; imports none."""
    absent = [module for module in modules if importlib.util.find_spec(module) is None]
    if absent:
        raise NotReadyError(f"{', '.join(absent)} cannot be imported.", fix=fix)


def named_clone(config: SuiteConfig, variable: str, *, absent: str, fix: str) -> Path:
    """The user's clone of a benchmark that is in no package: ``suite.options.root``, else an environment variable.

    Raises:
        NotReadyError: neither names one: ``absent`` and how to.
    """
    said = config.options.get("root") or os.environ.get(variable)
    if not said:
        raise NotReadyError(f"{absent} ({fix}) and set {variable}, or suite.options.root, to the clone.", fix=fix)
    return absolute(str(said))


class Ready(NamedTuple):
    """A suite can run."""

    notes: tuple[str, ...] = ()
    """What a user should know all the same, such as stand-ins for assets."""
    fix: str = ""
    """The command after which there would be no notes."""


def check_ready(config: SuiteConfig) -> Ready:
    """Whether a suite has its packages and files here, without starting it. The suite's own function of this name does
    the work; a suite without one needs nothing.

    Raises:
        ValueError: it cannot run; a NotReadyError has the command that helps.
    """
    check_suite(config)
    check = getattr(suite_module(config.name), "check_ready", None)
    ready: Ready = check(config) if check else Ready()
    return ready


def outline(config: SuiteConfig) -> dict[str, int]:
    """Tasks of a suite and how many enumerated initial states each has, without starting it. The suite's own function
    of this name says; one without has the task of its configuration.

    Raises:
        ValueError: a task or an option that the suite does not have.
    """
    check_suite(config)
    say = getattr(suite_module(config.name), "outline", None)
    found: dict[str, int] = say(config) if say else {config.task: config.num_evaluation_states}
    return found


def suite_version(config: SuiteConfig) -> dict[str, str]:
    """What measurements of a suite must share: our own version of it and those of the packages that simulate it.

    The module's ``VERSION`` (a string, "1" where absent) is raised whenever the same actions would lead elsewhere;
    ``PACKAGES`` names the distributions, asked in ``suite.python`` where the suite lives there.

    Raises:
        ValueError: that interpreter cannot be asked.
    """
    check_suite(config)
    module = suite_module(config.name)
    packages: tuple[str, ...] = getattr(module, "PACKAGES", ())
    found = {"suite": str(getattr(module, "VERSION", "1"))}
    python = interpreter_of(config)
    if python is None:
        return found | {name: _package_version(name) for name in packages}
    code = (
        "import importlib.metadata as m, json, sys\n"
        "have = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: have.get(n, 'absent') for n in sys.argv[1:]}))"
    )
    command = [python, "-c", code, *packages]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        return found | dict(json.loads(said.splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise ValueError(f"{config.name} is hosted by {python}, which does not say its packages: {error}.") from error


def _package_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def memory_estimate_mb(config: SuiteConfig, num_envs: int) -> int | None:
    """What one process with ``num_envs`` environments takes, if the suite says."""
    estimate = getattr(suite_module(config.name), "memory_mb", None)
    return None if estimate is None else int(estimate(config, num_envs))


def starts_slowly(config: SuiteConfig) -> bool:
    """Whether the first simulator of a process takes seconds: where there is a renderer or another interpreter."""
    return config.python is not None or hasattr(suite_module(config.name), "RENDERER")


def check_memory(config: SuiteConfig, num_envs: int, num_processes: int, *, spare: bool = False) -> None:
    """Refuse more environments than memory allows, before the first of them is built.

    A suite whose environments are large says what they take: a function ``memory_mb(config, num_envs)`` in its module.

    Args:
        spare: there is to be one process more that waits (`rlvla.config.WorkersConfig.spare`).

    Raises:
        ValueError: they would not fit; the message says how many do.
    """
    estimate, available = getattr(suite_module(config.name), "memory_mb", None), available_mb()
    if estimate is None or available is None:
        return
    each = estimate(config, num_envs)
    if (num_processes + spare) * each <= available:
        return
    if num_processes * each <= available:
        raise ValueError(
            f"{num_envs} environments in each of {num_processes} processes and in a spare one need about "
            f"{(num_processes + 1) * each} MB and {available} MB are free: workers.spare=false fits."
        )
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
        f"{num_processes * each} MB and {available} MB are free: {cure}."
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
