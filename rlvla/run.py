"""A run is a folder that explains itself: configuration, versions, metrics, policies, videos, report."""

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rlvla.compose import to_yaml
from rlvla.config import ConfigError
from rlvla.progress import Progress


class Run:
    """The folder of one run, its metrics file and its progress display."""

    def __init__(self, folder: Path, title: str, total: int) -> None:
        self.folder = folder
        self.progress = Progress()
        self._started = time.monotonic()
        self._metrics = (folder / "metrics.jsonl").open("a", buffering=1)
        self._last: dict[str, Any] = {}
        self.progress.start(title, total)

    @classmethod
    def open(cls, config: Any, verb: str, *, total: int) -> Self:
        """Create the folder and write what is known before anything runs.

        Raises:
            ConfigError: the folder already holds a finished or foreign run.
        """
        folder = require_fresh(config.output)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(to_yaml(config))
            (folder / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n")
        except OSError as error:
            raise RuntimeError(
                f"cannot write to {folder}: {error}. Free some space or choose another output=."
            ) from error
        suite = getattr(config, "suite", None)
        return cls(folder, f"{verb} {suite.task if suite else ''}".strip(), total)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.close()
        self._metrics.close()

    def minutes(self) -> float:
        """Wall-clock minutes since the run began."""
        return (time.monotonic() - self._started) / 60

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl. NaN becomes null: the file is JSON for everybody."""
        clean = {k: None if isinstance(v, float) and v != v else v for k, v in row.items()}
        self._metrics.write(json.dumps(clean) + "\n")
        self._last |= clean

    def last(self, key: str) -> Any:
        """The latest value logged under a key."""
        return self._last.get(key)

    def alarm(self, where: str, message: str) -> None:
        """Something a person should look at; shown, logged, and listed in the report.

        Args:
            where: "iteration 7" or "evaluation before".
        """
        self.log({"kind": "alarm", "where": where, "message": message})
        self.progress.warn(f"{where}: {message}")

    def write_json(self, name: str, content: Any) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        stage = path.with_suffix(".partial")
        stage.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(stage, path)

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
        self.write_json(f"evaluations/{measured.name}.json", asdict(measured))
        per_task = measured.by_task.items() if len(measured.by_task) > 1 else ()
        self.log(
            {
                "kind": "evaluation",
                "name": measured.name,
                "env_steps": env_steps,
                "minutes": self.minutes(),
                "success": measured.success,
                "trials": measured.trials,
                **{f"success/{name}": rate["success"] for name, rate in per_task},
                **{f"metrics/{name}": value for name, value in measured.metrics.items()},
            }
        )
        low, high = measured.interval
        self.progress.note(
            f"evaluation {measured.name}: {measured.success:.3f} [{low:.3f}, {high:.3f}] of {measured.trials} "
            f"at temperature {measured.temperature:g}"
            + "".join(f"\n  {name}: {rate['successes']} of {rate['trials']}" for name, rate in per_task)
            + "".join(f"\n  {name}: {value:.3f}" for name, value in measured.metrics.items())
            + "".join(f"\n  note: {note}" for note in measured.notes)
        )

    def finish(self, summary: dict[str, Any]) -> None:
        self.write_json("summary.json", summary)


def require_fresh(output: str) -> Path:
    """The run folder, which must not hold anything yet.

    Raises:
        ConfigError: it does.
    """
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"output is {folder}, which is not empty. Choose another output=, or remove it first: "
            "a run never overwrites another."
        )
    return folder


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


def versions() -> dict[str, str]:
    """Of everything that can change a result."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0], "platform": platform.platform(), "cpu": _cpu_name()}
    for package in [
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
    ]:
        with contextlib.suppress(PackageNotFoundError):
            found[package.replace("-", "_")] = version(package)
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
