"""Checkpoints of a training run: whole or absent, checked when read, the newest and the best kept."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

MANIFEST = "manifest.json"
STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a run must know, beside weights and optimizers, to go on as if nothing had happened. Randomness is keyed, so
    no generator has a state."""

    iterations: int
    """Finished ones."""
    env_steps: int
    difficulty: dict[str, float]
    """Success of each task in the last evaluation; what `TaskMix.difficulty` allocates by."""
    unseen_evaluation: str | None
    """Evaluation that the next iteration's gap between samplers is measured against."""
    metrics_bytes: int
    """Length of metrics.jsonl: what an abandoned iteration wrote after it is cut off."""
    success: float | None
    """Of the evaluation made at this point, which `best` goes by; None where there was none."""
    watch: dict[str, float] | None = None
    """What the safeguard remembers (`rlvla.safeguard.Watch`); its best checkpoint is kept as well. None without it."""


class Checkpoints:
    """The folder ``checkpoints/`` of a run, one folder for each: policy/, learner.pt, state.json, manifest.json."""

    def __init__(self, folder: Path, keep: int) -> None:
        """
        Args:
            keep: how many of the newest to keep; the best one is kept beside them.
        """
        self.folder, self.keep = folder, keep
        for left in folder.glob(".stage-*"):
            shutil.rmtree(left, ignore_errors=True)

    def save(self, state: TrainState, write: Callable[[Path], None]) -> Path:
        """Write a checkpoint: it appears under its name when everything in it is on the disk, or not at all.

        Args:
            write: puts the weights and optimizers into the folder it is given.

        Raises:
            RuntimeError: the disk is full or not writable; earlier checkpoints stand.
        """
        target = self.folder / self.name(state.iterations)
        stage = self.folder / f".stage-{target.name}"
        shutil.rmtree(stage, ignore_errors=True)
        try:
            stage.mkdir(parents=True)
            write(stage)
            (stage / STATE).write_text(json.dumps(asdict(state), indent=1) + "\n")
            (stage / MANIFEST).write_text(json.dumps(_checksums(stage), indent=1) + "\n")
            for path in (*stage.rglob("*"), stage):
                _sync(path)
            os.replace(stage, target)
            _sync(self.folder)
        except (OSError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError.
            shutil.rmtree(stage, ignore_errors=True)
            raise RuntimeError(
                f"cannot save a checkpoint to {target}: {error}. Free some space; the checkpoints before it stand, and "
                "the same command goes on from the newest."
            ) from error
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise
        self._prune(self.name(int(state.watch["best"])) if state.watch else "")
        return target

    @staticmethod
    def name(iterations: int) -> str:
        """Of a checkpoint's folder."""
        return f"iteration-{iterations:04d}"

    def newest(self, damaged: Callable[[str], None]) -> tuple[Path, TrainState] | None:
        """The newest checkpoint that is as it was written; ``damaged`` is told of those that are not.

        Raises:
            ValueError: there are checkpoints and all are damaged.
        """
        found = self._all()
        for path in reversed(found):
            problem = verify(path)
            if not problem:
                return path, read_state(path)
            # Out of the way, or it would count among the newest when the run comes to that iteration again.
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
            damaged(f"{path} is damaged ({problem}); the one before it is used, and this one kept as {aside.name}")
        if found:
            raise ValueError(
                f"every checkpoint in {self.folder} is damaged. Choose another output= to begin anew, or copy one back."
            )
        return None

    def _all(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("iteration-*") if path.is_dir())

    def _prune(self, wanted: str) -> None:
        found = self._all()
        measured = {path: score for path in found if (score := _score(path)) is not None}
        # The later of two equals: it has seen more.
        best = max(measured, key=lambda path: (measured[path], path.name), default=None)
        for path in found[: -self.keep]:
            if path != best and path.name != wanted:
                shutil.rmtree(path)


def _score(path: Path) -> float | None:
    try:
        return read_state(path).success
    except (OSError, ValueError, TypeError):
        return None


def read_state(path: Path) -> TrainState:
    return TrainState(**json.loads((path / STATE).read_text()))


def verify(path: Path) -> str:
    """What is wrong with a checkpoint; empty when nothing is."""
    try:
        expected: dict[str, str] = json.loads((path / MANIFEST).read_text())
        found = _checksums(path)
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {error}"
    if absent := sorted({STATE, *expected} - set(found)):
        return f"{absent[0]} is missing"
    changed = [name for name, digest in expected.items() if found[name] != digest]
    return f"{changed[0]} is not what was written" if changed else ""


def _checksums(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb") as file:
                digests[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _sync(path: Path) -> None:
    """Have the disk hold a file, or a folder's list of names, before anything relies on it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
