"""DOMINO: tasks of RoboTwin in which an object moves, at three levels, with the Manipulation Score beside success.

One simulation: `domino_world`; the score: `domino_score`. The code is a fork of RoboTwin in the user's clone and the
interpreter is RoboTwin's; docs/how-to/domino.md says what a user has to know, and that this has never met the real one.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rlvla_envs.base import SuiteConfig
from rlvla_envs.common import chosen_names
from rlvla_envs.domino_score import PENALTY_CLUTTER, PENALTY_OUT_OF_BOUNDS
from rlvla_envs.robotwin import HOME as ROBOTWIN
from rlvla_envs.robotwin import (
    MB_PER_PROCESS,
    MB_PER_WORLD,
    arms_spec,
    check_arms,
    shader,
    shared_notes,
    shared_variant,
    words,
)
from rlvla_envs.robotwin_standins import VERSION as STAND_INS_VERSION
from rlvla_envs.robotwin_standins import missing_files
from rlvla_envs.robotwin_tasks import FIRST_SEED, STATES_PER_TASK, seeds_to_try
from rlvla_envs.slots import Slot, TellingEnv, ready_at_home
from rlvla_envs.stand_ins import Assets, is_current
from rlvla_envs.suites import NotReadyError, Ready, named_clone

if TYPE_CHECKING:
    from rlvla_envs.domino_world import DominoWorld

HOME = ROBOTWIN
TRIAL_TASK = "stack_blocks_two"

CLONE = "git clone https://github.com/H-EmbodVis/DOMINO"
VARIABLE = "RLVLA_DOMINO"
"""Names the clone where ``suite.options.root`` does not."""
LIMITS = Path("task_config/_eval_step_limit.yml")
FILES = (
    LIMITS,
    Path("task_config/_camera_config.yml"),
    Path("task_config/demo_clean_dynamic.yml"),
    Path("envs/_base_task.py"),
    Path("envs/robot/robot.py"),
    Path("envs/utils/create_actor.py"),
    Path("description/utils/generate_episode_instructions.py"),
)
MOVES = re.compile(r"def get_dynamic_motion_config\b")
"""In the source of a task whose object can move."""
LONGEST = 1000
"""Steps of a task that the benchmark's list lacks; the benchmark's own."""

LEVELS = (1, 2, 3)
"""Constant speed, a polynomial, pieces of both."""
OPTIONS = {"root", "dynamic_level", "dynamic_coefficient", "instructions", "shader", "render_every_step"}

RENDERER = "vulkan"
PACKAGES = ("sapien", "mplib", "toppra")
VERSION = f"1, penalties {PENALTY_OUT_OF_BOUNDS} and {PENALTY_CLUTTER}"


class DominoEnv(TellingEnv["DominoWorld"]):
    """A `VecEnv` of DOMINO's tasks. An object that leaves the table's bounds untouched loses the episode.

    ``ChunkResult.metrics`` has ``manipulation_score`` and ``route_completion``, 0 to 100, and ``seed_moves``, as
    `RoboTwinEnv`: the expert has to solve a seed, or another one is tried.

    ``config.task`` is ``all``, one task of the clone, or several joined with ``+``.
    ``config.options``:
        root: clone of H-EmbodVis/DOMINO with RoboTwin's assets in its folder ``assets``; RLVLA_DOMINO otherwise.
        dynamic_level: 1 (the default), 2 or 3.
        dynamic_coefficient: of the speed, 0.1.
        instructions, shader, render_every_step: see `RoboTwinEnv`.

    Raises:
        NotReadyError: the clone, its assets or cuRobo are not there.
    """

    def __init__(self, config: SuiteConfig, num_envs: int) -> None:
        _check(config)
        self._config, self._root = config, find_clone(config)
        limits = tasks_of(self._root)
        self._tasks = _chosen(config, self._root)
        self._limits = [limits[task] for task in self._tasks]
        variant = [f"dynamic_level={_level(config)}"]
        variant += [] if _coefficient(config) == 0.1 else [f"dynamic_coefficient={_coefficient(config)}"]
        spec = arms_spec(
            config,
            self._tasks,
            _assets(self._root),
            variant=", ".join((*variant, *shared_variant(config))),
            notes=shared_notes(config),
        )
        super().__init__(config, num_envs, spec, render_every_step=bool(config.options.get("render_every_step", False)))

    def _make(self, task: int) -> DominoWorld:
        from rlvla_envs.domino_world import DominoWorld, load

        name, config = self._tasks[task], self._config
        code = load(name, self._root, shader(config), _level(config), _coefficient(config))
        seeds = [seeds_to_try(FIRST_SEED + state, DominoWorld.tries) for state in range(STATES_PER_TASK)]
        return DominoWorld(name, code, config.image_size, words(config), seeds)

    def _step_limit(self, slot: Slot[DominoWorld]) -> int:
        return min(self.spec.max_episode_steps, self._limits[slot.task])


def find_clone(config: SuiteConfig) -> Path:
    """The user's clone.

    Raises:
        NotReadyError: nobody says where it is, or it lacks something.
    """
    absent = "DOMINO's code is in no package: put RoboTwin's assets into the folder assets of a clone"
    root = named_clone(config, VARIABLE, absent=absent, fix=CLONE)
    lacks = [name for name in FILES if not (root / name).is_file()]
    if lacks:
        raise NotReadyError(
            f"{root} is no clone of H-EmbodVis/DOMINO, or one of another version: {lacks[0]} is missing.", fix=CLONE
        )
    if lacking := missing_files(root):
        download = f"{HOME.folder() / 'bin/robotwin-download-assets'} --output {HOME.folder() / 'official'}"
        raise NotReadyError(
            f"{root} has no assets: {lacking[0]} is missing. They are RoboTwin's: download them, gigabytes, and link "
            f"their folder assets to {root / 'assets'}: {download}.",
            fix=download,
        )
    return root


def tasks_of(root: Path) -> dict[str, int]:
    """Tasks of a clone in which an object can move, in alphabetical order, with their step limits."""
    limits = {name: int(steps) for name, steps in re.findall(r"(?m)^(\w+):\s*(\d+)", (root / LIMITS).read_text())}
    files = sorted(path for path in (root / "envs").glob("*.py") if not path.name.startswith("_"))
    return {path.stem: limits.get(path.stem, LONGEST) for path in files if MOVES.search(path.read_text())}


def _assets(root: Path) -> Assets:
    if is_current(root, STAND_INS_VERSION) or is_current((root / "assets").resolve().parent, STAND_INS_VERSION):
        return Assets(root, f"its assets in {root} are stand-ins that rlvla generated. A score needs RoboTwin's own.")
    return Assets(root, "")


def _chosen(config: SuiteConfig, root: Path) -> tuple[str, ...]:
    return chosen_names(config.name, tuple(tasks_of(root)), config.task)


def _level(config: SuiteConfig) -> int:
    return int(config.options.get("dynamic_level", LEVELS[0]))


def _coefficient(config: SuiteConfig) -> float:
    return float(config.options.get("dynamic_coefficient", 0.1))


def _check(config: SuiteConfig) -> None:
    check_arms(config, OPTIONS, (), who="DOMINO")
    if _level(config) not in LEVELS:
        raise ValueError(
            f"suite.options.dynamic_level is {_level(config)}; it must be 1 (constant speed), 2 (a polynomial) or 3 "
            "(pieces of both)."
        )
    if _coefficient(config) <= 0:
        raise ValueError(
            f"suite.options.dynamic_coefficient is {_coefficient(config)}; it must be above 0. Usual: 0.1."
        )


def outline(config: SuiteConfig) -> dict[str, int]:
    """See `rlvla_envs.suites.outline`. The tasks are the clone's: without one nobody can say."""
    return dict.fromkeys(_chosen(config, find_clone(config)), STATES_PER_TASK)


def check_ready(config: SuiteConfig) -> Ready:
    """See `rlvla_envs.suites.check_ready`."""
    _check(config)
    ready = ready_at_home(config, HOME)
    root = find_clone(config)
    _chosen(config, root)
    if config.python is None:
        prefix = Path(sys.prefix) if HOME.is_here() else HOME.folder()
        if not any(prefix.glob("lib/python3*/site-packages/*curobo*")):
            raise NotReadyError(
                f"{prefix} has no cuRobo. DOMINO's objects move on ways on which its expert met them, and the expert "
                "plans with cuRobo, on a GPU: install it there as the clone's script/_install.sh does.",
                fix=f"{prefix / 'bin/python'} -m pip install -e CUROBO --no-build-isolation",
            )
    return Ready(("stand-in assets: it runs, and gives no score",)) if _assets(root).unscored else ready


def memory_mb(config: SuiteConfig, num_envs: int) -> int:
    """What one process with ``num_envs`` environments takes; cuRobo's share of it is not known."""
    return MB_PER_PROCESS + MB_PER_WORLD * (num_envs + 1)
