"""A training run in a process of its own, watched through its folder."""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
TAIL_LINES = 12


@dataclass(frozen=True)
class Checkup:
    """An evaluation during a run."""

    iteration: int
    """After so many iterations."""
    successes: int
    trials: int


class TrialProcess:
    """`rlvla train` as a child. It does not outlive its parent, however that ends."""

    def __init__(self, words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        """Start a run in ``folder``, or go on with the one that is there. Its stderr goes to the file ``FOLDER.log``.

        Args:
            words: of `rlvla train`, without output.
            environment: variables to set beside those of this process.
        """
        self.folder = folder
        self.log = folder.with_name(f"{folder.name}.log")
        self._seen = 0
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "rlvla.cli", "train", *words, f"output={folder}"]
        with self.log.open("ab") as log:
            self._began = log.tell()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env={**os.environ, **environment},
                # Ctrl-C reaches this process alone, which then ends its children in order.
                start_new_session=True,
                preexec_fn=_die_with_parent(),
            )

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.poll()

    def checkups(self) -> list[Checkup]:
        """The evaluations during the run so far."""
        return read_checkups(self.folder)

    def end(self, grace_s: float) -> None:
        """Interrupt the run as Ctrl-C does; kill it, with all that it started, if it is not over after ``grace_s``."""
        if self._process.poll() is None:
            self._signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
        # What is left of its group has no parent any more.
        self._signal(signal.SIGKILL)
        self._process.wait()

    def error(self) -> str:
        """Why it died: the end of what it said since it was started."""
        status = self._process.returncode
        with self.log.open("rb") as log:
            log.seek(self._began)
            lines = log.read().decode(errors="replace").strip().splitlines()
        if status < 0:
            name = signal.Signals(-status).name
            memory = ", perhaps by the kernel for want of memory" if -status == signal.SIGKILL else ""
            lines.append(f"ended by {name}{memory}")
        return "\n".join(lines[-TAIL_LINES:]) or f"exit status {status}, and it said nothing"

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


def end_all(processes: Sequence[TrialProcess], grace_s: float) -> None:
    """Interrupt all at once, so that they take the grace together; an interrupt meanwhile kills what is left."""
    for process in processes:
        if process.poll() is None:
            process._signal(signal.SIGINT)
    until = time.monotonic() + grace_s
    try:
        while time.monotonic() < until and any(process.poll() is None for process in processes):
            time.sleep(0.05)
    finally:
        for process in processes:
            process._signal(signal.SIGKILL)


def read_checkups(folder: Path) -> list[Checkup]:
    """The evaluations during a run, from its metrics; a line that is being written is left for later."""
    found: dict[int, Checkup] = {}
    for row in _rows(folder):
        name = str(row.get("name", ""))
        if row.get("kind") == "evaluation" and name.startswith("iteration-"):
            iteration, trials = int(name.removeprefix("iteration-")), int(row["trials"])
            found[iteration] = Checkup(iteration, round(row["success"] * trials), trials)
    return [found[iteration] for iteration in sorted(found)]


def read_env_steps(folder: Path) -> int:
    """Environment steps a run has taken so far."""
    return max((int(row["env_steps"]) for row in _rows(folder) if row.get("kind") == "iteration"), default=0)


def read_result(folder: Path, seed: int) -> dict[str, Any] | None:
    """What a run came to; None where it has not ended."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
        after = json.loads((folder / "evaluations" / "after.json").read_text())
    except (OSError, ValueError):
        return None
    return {
        "seed": seed,
        "successes": int(after["successes"]),
        "trials": int(after["trials"]),
        "before": float(summary["success_before"]),
        "env_steps": int(summary["env_steps"]),
        "minutes": float(summary["minutes"]),
    }


def _rows(folder: Path) -> list[dict[str, Any]]:
    rows = []
    try:
        lines = (folder / "metrics.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def _die_with_parent() -> Any:
    """What a child does before it becomes itself: ask to be ended with its parent, even one that is killed."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent = ctypes.CDLL(None, use_errno=True).prctl, os.getpid()

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            # It was killed before the child could ask.
            os._exit(1)

    return ask
