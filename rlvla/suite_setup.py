"""`rlvla suites setup`: a virtual environment for a suite, with exact versions, proven by a chunk that is played.

What is there is kept: a second run takes seconds, and one that was stopped goes on where it stopped.
"""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlvla.probes import ProbeError, ask
from rlvla_envs.base import SuiteConfig
from rlvla_envs.suite_home import STAMP, Home
from rlvla_envs.suites import SUITES, NotReadyError, check_ready, home_of, stand_in_maker, trial_task

PIP_TRIES = 3
"""A mirror that drops a connection is asked again; what has arrived is in pip's cache."""


def set_up(home: Home, *, trial_timeout_s: float | None, stand_ins: bool = False) -> dict[str, Any]:
    """Make or complete a suite's environment, saying on stderr what is done.

    Args:
        trial_timeout_s: for a chunk of its first suite; None plays none.
        stand_ins: generate assets that the user would have to download, for smoke tests without a score.

    Returns:
        ``ok``, ``name``, ``folder``, ``installed`` (whether anything was), ``trial`` (what the suite said, or the
        error).

    Raises:
        ValueError: this Python is too old for the suite, the disk has too little room, or it has no stand-ins.
        RuntimeError: pip failed.
    """
    folder = home.folder()
    maker = stand_in_maker(home)
    if stand_ins and maker is None:
        raise ValueError(f"stand_ins=true, but {home.name} installs its own assets; leave it away.")
    installed = False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _alone(folder.with_name(f"{home.name}.lock")):
        damaged = _damaged(home) if home.is_set_up() else None
        if damaged is not None and not damaged:
            _say(f"{home.name} is set up already, in {folder}")
        else:
            _check_python(home)
            _check_room(home, folder)
            _make_environment(home)
            if damaged:
                _say(f"files are missing of {', '.join(damaged)}; installing these again")
                _pip(home, "--force-reinstall", "--no-deps", *damaged)
            else:
                _say(f"installing {len(home.requirements())} packages, {home.download_megabytes} MB, takes minutes")
                alone = [line for line in home.requirements() if line.partition("==")[0] in home.alone]
                for words, lines in (((), set(home.requirements()) - set(alone)), (("--no-deps",), alone)):
                    if lines:
                        _pip(home, *words, *sorted(lines))
            (folder / STAMP).write_text(json.dumps({"requirements": home.requirements()}, indent=1))
            installed = True
            _say(f"{home.name} is installed in {folder}")
        if stand_ins and maker is not None:
            _say(f"generated {maker(folder)} stand-in files; official assets, once they are there, take their place")
    trial = _play(home, trial_timeout_s) if trial_timeout_s is not None else {"ok": True, "played": None}
    return {"ok": trial["ok"], "name": home.name, "folder": str(folder), "installed": installed, "trial": trial}


def _check_python(home: Home) -> None:
    if sys.version_info < home.python:
        wanted = ".".join(map(str, home.python))
        raise ValueError(f"{home.name} needs Python {wanted} or newer; this is {sys.version.split()[0]}.")
    if home.newest is not None and sys.version_info[:2] > home.newest:
        wanted = ".".join(map(str, home.newest))
        raise ValueError(
            f"{home.name} needs Python {wanted} or older, as its exact versions have no wheels for newer ones; this is "
            f"{sys.version.split()[0]}. Make rlvla's environment with an older Python, or name an interpreter that has "
            "the suite with suite.python=PATH."
        )


def _check_room(home: Home, folder: Path) -> None:
    """Packages, and beside them their downloads in pip's cache."""
    needed = home.megabytes + home.download_megabytes
    free = shutil.disk_usage(folder.parent).free // 10**6
    if free < needed:
        raise ValueError(
            f"{home.name} needs {needed} MB and {free} MB are free at {folder.parent}. Choose another place with "
            "RLVLA_SUITES=/path/on/another/disk, set for all later commands too."
        )


def _make_environment(home: Home) -> None:
    python = home.interpreter()
    works = python.exists() and not subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode
    if works:
        _say(f"going on with the environment in {home.folder()}")
        return
    _say(f"making a virtual environment in {home.folder()}")
    made = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(home.folder())], capture_output=True, text=True, check=False
    )
    if made.returncode:
        said = (made.stdout + made.stderr).strip()
        raise RuntimeError(f"{sys.executable} cannot make a virtual environment: {said} (Debian: python3-venv)")


_ASK_FOR_FILES = """
import importlib.metadata as m, json, sys
damaged = []
for line in json.loads(sys.argv[1]):
    name = line.partition("==")[0]
    try:
        files = m.files(name) or []
        whole = all(f.locate().exists() for f in files if f.suffix != ".pyc")
    except m.PackageNotFoundError:
        whole = False
    damaged += [] if whole else [line]
print(json.dumps(damaged))
"""


def _damaged(home: Home) -> list[str]:
    """Requirements of which a file is gone; all of them where the environment does not even say."""
    command = [str(home.interpreter()), "-c", _ASK_FOR_FILES, json.dumps(home.requirements())]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    return list(json.loads(asked.stdout)) if not asked.returncode else home.requirements()


def _pip(home: Home, *arguments: str) -> None:
    """Exact versions; pip takes them from wherever it is configured to."""
    command = [str(home.interpreter()), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    # Without what points this interpreter to its own packages.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    for attempt in range(PIP_TRIES):
        done = subprocess.run(
            [*command, "-q", *arguments],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        if not done.returncode:
            return
        last = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")][-3:]
        if attempt + 1 < PIP_TRIES:
            _say(f"pip failed, trying again: {last[-1] if last else done.returncode}")
    raise RuntimeError(
        f"pip could not install what {home.name} needs:\n" + "\n".join(last) + f"\nRun `{home.cure}` again; what has "
        "arrived is kept."
    )


def _play(home: Home, deadline_s: float) -> dict[str, Any]:
    """A chunk of the first suite that lives there."""
    name = next(name for name in SUITES if home_of(name) == home)
    from rlvla.compose import compose

    suite: SuiteConfig = compose("collect", [f"suite={name}", f"suite.task={trial_task(name)}"]).suite
    try:
        check_ready(suite)
    except NotReadyError as error:
        _say(str(error))
        return {"ok": False, "error": str(error)}
    _say(f"playing a chunk of {name}")
    try:
        said = ask("rlvla_envs.trial:play", asdict(suite), deadline_s=deadline_s)
    except ProbeError as error:
        _say(f"it does not run: {error}")
        return {"ok": False, "error": str(error)}
    if said["blank"]:
        _say(f"it runs, but camera {', '.join(said['blank'])} shows one colour only")
        return {"ok": False, "error": f"blank cameras: {', '.join(said['blank'])}"}
    _say(f"it runs: {said['instruction']!r}, a picture was seen from each camera")
    return {"ok": True, "played": name, "instruction": said["instruction"]}


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Two runs at once would write one environment."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another run is at work; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    print(f"suites: {text}", file=sys.stderr, flush=True)
