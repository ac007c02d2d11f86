"""Where a suite with an interpreter of its own lives: a virtual environment that `rlvla suites setup` makes.

A suite's module says that it has one: ``HOME = Home(...)``. `rlvla_envs.suites.make_env` then finds it by itself.
"""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path

STAMP = "rlvla-suite.json"
"""In the virtual environment, written when everything is installed: what it was made from."""


@dataclass(frozen=True)
class Home:
    """What a suite's own interpreter needs."""

    name: str
    """Of the folder, and the word after `rlvla suites setup`."""
    modules: tuple[str, ...]
    """Python modules without which the suite cannot run."""
    python: tuple[int, int]
    """Oldest Python, from (3, 10)."""
    megabytes: int
    """On disk, about."""
    download_megabytes: int
    newest: tuple[int, int] | None = None
    """Newest Python that all exact versions have wheels for; None where that is not known to end."""
    alone: tuple[str, ...] = ()
    """Distributions that are installed without looking at what they require, because it contradicts the list."""

    def requirements_file(self) -> Path:
        """Exact versions of everything, one a line, for pip."""
        return Path(__file__).parent / "requirements" / f"{self.name}.txt"

    def requirements(self) -> list[str]:
        lines = (line.partition("#")[0].strip() for line in self.requirements_file().read_text().splitlines())
        return [line for line in lines if line]

    def folder(self) -> Path:
        return suites_folder() / self.name

    def interpreter(self) -> Path:
        return self.folder() / "bin" / "python"

    def is_set_up(self) -> bool:
        """Whether everything is there, in the versions of today's list."""
        return self.interpreter().exists() and self.installed() == self.requirements()

    def installed(self) -> list[str] | None:
        """The list that the environment was made from; None where it was never finished."""
        try:
            said = json.loads((self.folder() / STAMP).read_text())
            return list(map(str, said["requirements"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def is_here(self) -> bool:
        """Whether this interpreter itself can run the suite."""
        return all(importlib.util.find_spec(module) is not None for module in self.modules)

    def complaint(self) -> str:
        """What is wrong, for a suite that can run neither here nor there; empty where all is well."""
        if self.is_here() or self.is_set_up():
            return ""
        if self.installed() is None:
            return f"{self.name} is not set up: {self.folder()} has no finished environment."
        return f"{self.folder()} has other versions than this release of rlvla needs."

    @property
    def cure(self) -> str:
        return f"rlvla suites setup {self.name}"


def suites_folder() -> Path:
    """RLVLA_SUITES, else rlvla/suites in the user's cache folder."""
    chosen = os.environ.get("RLVLA_SUITES")
    if chosen:
        return absolute(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlvla" / "suites"


def absolute(path: str | Path) -> Path:
    """A path that somebody gave, whole. Links stay: a virtual environment's interpreter is one."""
    return Path(os.path.abspath(Path(path).expanduser()))
