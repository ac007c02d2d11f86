"""`rlvla suites`: the suites there are, what each is for, and what it lacks on this machine.

An action is a function here and a member of `SuitesAction`.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from rlvla.compose import suite_files, suite_of
from rlvla.config import SuitesAction, SuitesConfig
from rlvla.probes import Status, probe_suite
from rlvla_envs.suites import HELD_OUT, outline, suite_version

WORDS = {Status.ok: "ready", Status.warning: "ready, but", Status.missing: "not here"}


def run(config: SuitesConfig) -> dict[str, Any]:
    """Do what ``config.action`` says."""
    return ACTIONS[config.action](config.names)


def list_suites(names: Sequence[str]) -> dict[str, Any]:
    """A table on stderr; the same as JSON on stdout. No simulator is started: `rlvla doctor suite=NAME` does that."""
    found = [status_of(name) for name in names or suite_files()]
    _say(f"{'suite':18s}{'role':10s}{'tasks':>6s}{'states':>8s}  status")
    for suite in found:
        status = WORDS[Status(suite["status"])]
        _say(f"{suite['name']:18s}{suite['role']:10s}{suite['tasks']:6d}{suite['states']:8d}  {status}")
        if suite["status"] != "ok":
            lines = suite["found"].replace("; stand-in", "\nstand-in").split("\n")
            for line in [*lines, *([f"-> {suite['fix']}"] if suite["fix"] else [])]:
                _say(f"{'':18s}{line}")
    return {"suites": found}


def status_of(name: str) -> dict[str, Any]:
    """One suite: name, suite (its adapter), role, tasks and states (how many), version, status, found, fix."""
    suite = suite_of(name)
    (finding,) = probe_suite(suite.name, suite)
    try:
        states, version = outline(suite), suite_version(suite)
    except (ValueError, ImportError):
        # The finding says why.
        states, version = {}, {}
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


ACTIONS: dict[SuitesAction, Callable[[Sequence[str]], dict[str, Any]]] = {SuitesAction.list: list_suites}
