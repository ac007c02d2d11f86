"""A run is a folder that explains itself: configuration, versions, metrics, policies, videos, report."""

import contextlib
import fcntl
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import yaml  # type: ignore[import-untyped, unused-ignore]

from rlvla.compose import to_yaml
from rlvla.config import ConfigError
from rlvla.progress import Progress
from rlvla.recovery import Incident

REPEATABLE = ("eval_suites", "compare")
"""Verbs whose output follows from a cache of results: the same command writes the same again."""
RESUMABLE = ("train", "eval", "tune", *REPEATABLE)
FREE_TO_CHANGE = (
    *("output", "cache", "device", "workers", "learners"),
    *("save_every", "keep_checkpoints", "max_minutes", "max_env_steps", "profile"),
    # The space is compared by its content.
    *("tune.trials", "tune.parallel", "tune.space", "tune.budget", "tune.give_up_after", "tune.grace_s"),
    "tune.keep_checkpoints",
)
"""Settings that no iteration and no trial of a study depends on, but for the rounding of other devices and numbers of
learners: a run may go on with others."""

RECORDED_PACKAGES = (
    "rlvla",
    "torch",
    "transformers",
    "ray",
    "mani-skill",
    "sapien",
    "tensordict",
    "torchrl",
    "numpy",
    "gymnasium",
    "hydra-core",
    "optuna",
)
"""Whose version can change a result."""

CLOCK = ".minutes"
SECONDS_BETWEEN_TICKS = 5.0


class Run:
    """The folder of one run, its metrics file and its progress display."""

    def __init__(
        self, folder: Path, title: str, total: int, *, lock: IO[str] | None = None, resumed: bool = False
    ) -> None:
        self.folder = folder
        self.resumed = resumed
        """The folder holds the beginning of this very run."""
        self.progress = Progress()
        self._lock = lock or lock_folder(folder)
        self._read_metrics()
        # The clock counts on; the time in which nothing ran is left out.
        self._started = time.monotonic() - 60 * self._minutes_before()
        self._ticked = -math.inf
        self._metrics = self._path.open("a", buffering=1)
        self.progress.start(title, total)

    @classmethod
    def open(cls, config: Any, verb: str, *, total: int, simulator: str = "") -> Self:
        """Create the folder and write what is known before anything runs; or go on in the folder of an unfinished run.

        Args:
            simulator: versions of the interpreter that hosts it, if that is another one (`rlvla.workers.Envs`).

        Raises:
            ConfigError: as `check_output`, or another process is writing there.
        """
        check_output(config, verb)
        folder = Path(config.output)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(folder)
            # Again: whoever held the lock may have begun a run meanwhile.
            resumed = check_output(config, verb)
            if not resumed:
                _write_synced(folder / "config.yaml", to_yaml(config))
                _write_synced(folder / "versions.json", json.dumps(versions(simulator), indent=2) + "\n")
                # Last: with it the run has begun, without it there is nothing to keep.
                _write_synced(folder / "run.json", json.dumps({"verb": verb}) + "\n")
        except OSError as error:
            raise RuntimeError(
                f"cannot write to {folder}: {error}. Free some space or choose another output=."
            ) from error
        suite = getattr(config, "suite", None)
        about = suite.task if suite else ", ".join(getattr(config, "suites", ()))
        title = f"{verb.removesuffix('_suites')} {about}".strip()
        record = cls(folder, title, total, lock=lock, resumed=resumed)
        if resumed:
            begun = "results of this command" if verb in REPEATABLE else "an unfinished run"
            record.progress.note(f"{folder} holds {begun}; going on with it")
            record._note_versions(versions(simulator))
            for left in folder.glob(".policy.*"):
                shutil.rmtree(left, ignore_errors=True)
        return record

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tick(now=True)
        self.progress.close()
        self._metrics.close()
        self._lock.close()

    def require_policy(self, digest: str) -> None:
        """Note which weights the run starts from, or compare them with those it started from.

        Raises:
            ConfigError: they are others.
        """
        known = json.loads((self.folder / "run.json").read_text())
        if known.setdefault("policy_sha256", digest) != digest:
            raise ConfigError(
                f"the policy's weights are not those that {self.folder} started from. Give the policy it started from, "
                "or choose another output=."
            )
        self.write_json("run.json", known)

    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl so far, all of it on the disk."""
        self._metrics.flush()
        os.fsync(self._metrics.fileno())
        return self._path.stat().st_size

    def truncate_metrics(self, length: int) -> None:
        """Cut off what was logged after a checkpoint."""
        self._metrics.flush()
        missing = length - self._path.stat().st_size
        if missing <= 0:
            os.truncate(self._path, length)
            self._read_metrics()
        else:
            self.alarm("resume", f"metrics.jsonl lacks {missing} bytes that it had at the checkpoint; rows are lost")

    def tick(self, *, now: bool = False) -> None:
        """Write the clock down, every few seconds: what a killed process took counts too."""
        if now or time.monotonic() - self._ticked > SECONDS_BETWEEN_TICKS:
            self._ticked = time.monotonic()
            # A full disk must not end a run that has nothing else to write.
            with contextlib.suppress(OSError):
                (self.folder / CLOCK).write_text(f"{self.minutes()}\n")

    @property
    def _path(self) -> Path:
        return self.folder / "metrics.jsonl"

    def _read_metrics(self) -> None:
        """Learn what is logged already, and drop a last line that a crash cut short."""
        self._last: dict[str, Any] = {}
        self._said: set[tuple[str, ...]] = set()
        if not self._path.exists():
            return
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        for line in content[:whole].splitlines():
            # A line that a power failure spoilt is the report's to mention.
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                self._last |= row
                self._said.add(_identity(row))
        if whole < len(content):
            os.truncate(self._path, whole)

    def _minutes_before(self) -> float:
        logged = float(self._last.get("minutes") or 0.0)
        with contextlib.suppress(OSError, ValueError):
            return max(logged, float((self.folder / CLOCK).read_text()))
        return logged

    def _note_versions(self, now: Mapping[str, str]) -> None:
        """Say when a run goes on with other software or another machine: bits may differ from here on."""
        path = self.folder / "versions.json"
        known = json.loads(path.read_text())
        latest = known.get("resumed_with", [known])[-1]
        changed = [f"{key} {latest.get(key)} -> {value}" for key, value in now.items() if latest.get(key) != value]
        if changed:
            self.write_json("versions.json", known | {"resumed_with": [*known.get("resumed_with", []), now]})
            self.alarm("resume", f"the run goes on with {', '.join(changed)}; its bits may depend on that")

    def minutes(self) -> float:
        """Wall-clock minutes since the run began, those of earlier processes included."""
        return (time.monotonic() - self._started) / 60

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl. NaN becomes null: the file is JSON for everybody."""
        clean = {k: None if isinstance(v, float) and v != v else v for k, v in row.items()}
        self._metrics.write(json.dumps(clean) + "\n")
        self._last |= clean
        self._said.add(_identity(clean))
        self.tick()

    def last(self, key: str) -> Any:
        """The latest value logged under a key."""
        return self._last.get(key)

    def logged(self, row: Mapping[str, Any]) -> bool:
        """Whether metrics.jsonl has this iteration, evaluation or alarm already, from a process that was killed."""
        return _identity(row) in self._said

    def alarm(self, where: str, message: str) -> None:
        """Something a person should look at; shown, logged, and listed in the report.

        Args:
            where: "iteration 7" or "evaluation before".
        """
        row = {"kind": "alarm", "where": where, "message": message}
        if not self.logged(row):
            self.log(row)
        self.progress.warn(f"{where}: {message}")

    def restart(self, where: str, incident: Incident) -> None:
        """A simulator was lost and replaced: an alarm to read, and a line to count."""
        self.log({"kind": "restart", "where": where, **asdict(incident)})
        self.alarm(where, str(incident))

    def write_json(self, name: str, content: Any) -> None:
        write_json(self.folder / name, content)

    def update_json(self, name: str, addition: Any) -> None:
        """Add keys to a JSON object in the folder, or entries to a JSON list."""
        path = self.folder / name
        if not path.exists():
            self.write_json(name, addition)
            return
        present = json.loads(path.read_text())
        self.write_json(name, present | addition if isinstance(present, dict) else present + addition)

    def evaluation(self, measured: Any, env_steps: int) -> None:
        """Record one `rlvla.evaluate.Evaluation`: its file, a line in the metrics, a line on the screen."""
        per_task = measured.by_task.items() if len(measured.by_task) > 1 else ()
        row = {
            "kind": "evaluation",
            "name": measured.name,
            "env_steps": env_steps,
            "minutes": self.minutes(),
            "success": measured.success,
            "trials": measured.trials,
            **{f"success/{name}": rate["success"] for name, rate in per_task},
            **{f"metrics/{name}": value for name, value in measured.metrics.items()},
        }
        if not self.logged(row):
            self.log(row)
        low, high = measured.interval
        self.progress.note(
            f"evaluation {measured.name}: {measured.success:.3f} [{low:.3f}, {high:.3f}] of {measured.trials} "
            f"at temperature {measured.temperature:g}"
            + "".join(f"\n  {name}: {rate['successes']} of {rate['trials']}" for name, rate in per_task)
            + "".join(f"\n  {name}: {value:.3f}" for name, value in measured.metrics.items())
            + "".join(f"\n  note: {note}" for note in measured.notes)
        )
        self.write_json(f"evaluations/{measured.name}.json", asdict(measured))

    def finish(self, summary: dict[str, Any]) -> None:
        self.write_json("summary.json", summary)


def check_output(config: Any, verb: str) -> bool:
    """Whether ``config.output`` holds the beginning of this run; False where it holds nothing.

    Raises:
        ConfigError: it holds something else: another run, a finished one, or this one with other settings.
    """
    folder = Path(config.output)
    # What a start leaves that was killed before it had begun anything.
    nothing = {".lock", "config.yaml", "versions.json"}
    if not folder.exists() or (folder.is_dir() and not {p.name for p in folder.iterdir()} - nothing):
        return False
    try:
        begun = json.loads((folder / "run.json").read_text())["verb"]
    except (OSError, ValueError, KeyError, TypeError):
        begun = None
    advice = "Choose another output=, or remove it first: a run never overwrites another."
    if begun is None or not (folder / "config.yaml").is_file():
        raise ConfigError(f"output is {folder}, which is not empty. {advice}")
    # The report is written last; without it only that is missing.
    finished = (folder / "summary.json").exists() and begun not in REPEATABLE
    if finished and (begun not in RESUMABLE or (folder / "report.html").exists()):
        raise ConfigError(f"output is {folder}, which holds a finished {begun} run. {advice}")
    if begun != verb or verb not in RESUMABLE:
        raise ConfigError(f"output is {folder}, which holds an unfinished {begun} run. {advice}")
    differing = _differences(yaml.safe_load((folder / "config.yaml").read_text()), yaml.safe_load(to_yaml(config)))
    if differing:
        state = f"results of {verb}" if verb in REPEATABLE else f"an unfinished {verb} run"
        raise ConfigError(
            f"{folder} holds {state} with other settings: {'; '.join(differing)}. Give the same ones to go "
            "on with it, or choose another output=."
        )
    return True


def _differences(before: Any, now: Any, prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, with both values; `FREE_TO_CHANGE` is left out."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in {**before, **now} if f"{prefix}{key}" not in FREE_TO_CHANGE]
        return [line for key in keys for line in _differences(before.get(key), now.get(key), f"{prefix}{key}.")]
    return [] if before == now else [f"{prefix[:-1]} was {before} and is {now}"]


def lock_folder(folder: Path, otherwise: str = "choose another output=") -> IO[str]:
    """Hold the folder until the file is closed or the process ends, however it ends.

    Args:
        otherwise: what a user can do who does not want to wait.

    Raises:
        ConfigError: another process holds it.
    """
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ConfigError(f"another process is writing to {folder}. Wait for it, stop it, or {otherwise}.") from error
    except OSError:
        # A file system without locks: better unguarded than not at all.
        pass
    return file


def write_json(path: Path, content: Any) -> None:
    """All of it or nothing; what was there before stays until then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stage = path.with_suffix(".partial")
    _write_synced(stage, json.dumps(content, indent=1) + "\n")
    os.replace(stage, path)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _identity(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What makes a row of metrics.jsonl the same thing said again."""
    return tuple(str(row.get(key)) for key in ("kind", "iteration", "name", "where", "message", "step"))


def pick_device(name: str) -> str:
    """auto is a GPU when there is one.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device is {name}, but torch sees no GPU here. Use device=cpu or device=auto.")
    return name


def versions(simulator: str = "") -> dict[str, str]:
    """Of everything that can change a result; ``simulator`` is what another interpreter says of itself."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0], "platform": platform.platform(), "cpu": _cpu_name()}
    for package in RECORDED_PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package.replace("-", "_")] = version(package)
    if simulator:
        found["simulator"] = simulator
    found["git_commit"] = _git_commit()
    return found


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or 'unknown'}, {os.cpu_count()} cores"


def _git_commit() -> str:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
