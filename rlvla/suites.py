"""`rlvla suites`: the suites there are, what each is for, what it lacks on this machine, and setting them up.

An action is a function here and a member of `SuitesAction`.
"""

import contextlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rlvla.compose import suite_files, suite_of
from rlvla.config import SuitesAction, SuitesConfig
from rlvla.probes import Status, probe_suite
from rlvla.suite_setup import set_up
from rlvla_envs.suite_home import Home
from rlvla_envs.suites import HELD_OUT, home_of, homes, outline, suite_version

WORDS = {Status.ok: "ready", Status.warning: "ready, but", Status.missing: "not here"}


def run(config: SuitesConfig) -> dict[str, Any]:
    """Do what ``config.action`` says."""
    return ACTIONS[config.action](config)


def list_suites(config: SuitesConfig) -> dict[str, Any]:
    """A table on stderr; the same as JSON on stdout. No simulator is started: `rlvla doctor suite=NAME` does that."""
    names = dict.fromkeys(name for word in config.names for name in _files_of(word))
    found = [status_of(name) for name in names or suite_files()]
    _say(f"{'suite':22s}{'role':10s}{'tasks':>6s}{'states':>8s}  status")
    for suite in found:
        status = WORDS[Status(suite["status"])]
        _say(f"{suite['name']:22s}{suite['role']:10s}{suite['tasks']:6d}{suite['states']:8d}  {status}")
        if suite["status"] != "ok":
            lines = suite["found"].replace("; stand-in", "\nstand-in").split("\n")
            for line in [*lines, *([f"-> {suite['fix']}"] if suite["fix"] else [])]:
                _say(f"{'':22s}{line}")
    return {"suites": found}


def show_homes(config: SuitesConfig) -> dict[str, Any]:
    """The environments of suites that have their own: where each is, and whether it is as it should be."""
    found = []
    for home in _homes_of(config.names) or homes().values():
        installed = home.installed()
        status = "set up" if home.is_set_up() else "not set up" if installed is None else "of another release"
        found.append({"name": home.name, "folder": str(home.folder()), "status": status, "installed": installed})
        _say(f"{home.name}: {status}, {home.folder()}")
        if not home.is_set_up():
            _say(f"  -> {home.cure}   (downloads {home.download_megabytes} MB, takes {home.megabytes} MB)")
    return {"environments": found}


def set_up_suites(config: SuitesConfig) -> dict[str, Any]:
    """Make the environments that these suites need, and play a chunk in each. See `rlvla.suite_setup`."""
    chosen = _homes_of(config.names)
    without = [name for name in config.names if name not in homes() and home_of(suite_of(name).name) is None]
    for name in without:
        _say(f"{name} needs no environment of its own; `rlvla suites {name}` says what it lacks.")
    timeout_s = config.trial_timeout_s if config.trial else None
    made = [set_up(home, trial_timeout_s=timeout_s, stand_ins=config.stand_ins) for home in chosen]
    return {"ok": all(entry["ok"] for entry in made), "environments": made}


def _homes_of(words: Sequence[str]) -> list[Home]:
    """The environments of these suites and environments, each once."""
    found = [homes().get(word) or home_of(suite_of(word).name) for word in words]
    return list({home.name: home for home in found if home is not None}.values())


def _files_of(word: str) -> list[str]:
    """Suites that a word names: a file of configs/suite, or all that live in an environment."""
    if word in suite_files():
        return [word]
    return [name for name in suite_files() if home_of(suite_of(name).name) == homes()[word]]


def status_of(name: str) -> dict[str, Any]:
    """One suite: name, suite (its adapter), role, tasks and states (how many), version, status, found, fix."""
    suite = suite_of(name)
    (finding,) = probe_suite(suite.name, suite)
    states: dict[str, int] = {}
    version: dict[str, str] = {}
    # What fails is in the finding; what a suite has is known also where it is not set up.
    with contextlib.suppress(ValueError, ImportError):
        states = outline(suite)
    with contextlib.suppress(ValueError, ImportError):
        version = suite_version(suite)
    return {
        "name": name,
        "suite": suite.name,
        "role": "held-out" if suite.name in HELD_OUT else "training",
        "tasks": len(states),
        "states": sum(states.values()),
        "states_by_task": states,
        "version": version,
        "status": finding.status.value,
        "found": finding.found,
        "fix": finding.fix,
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


ACTIONS: dict[SuitesAction, Callable[[SuitesConfig], dict[str, Any]]] = {
    SuitesAction.list: list_suites,
    SuitesAction.status: show_homes,
    SuitesAction.setup: set_up_suites,
}
