"""RoboTwin 2.0's 50 tasks for two arms, on a bare table (easy) or a randomized one (hard): 14 absolute joint targets.

Tasks: `robotwin_tasks`; one simulation: `robotwin_world`; what replaces assets that are not there:
`robotwin_standins`. The suites live in an interpreter of their own (`HOME`); docs/how-to/robotwin.md says what a user
has to know.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlvla_envs.base import ActionComponent, Camera, EnvSpec, SuiteConfig
from rlvla_envs.robotwin_standins import VERSION as STAND_INS_VERSION
from rlvla_envs.robotwin_standins import generate, missing_files
from rlvla_envs.robotwin_tasks import (
    ARM_JOINTS,
    BOX_TASKS,
    FIRST_SEED,
    STATE_NAMES,
    STATES_PER_TASK,
    STEP_LIMITS,
    SUITE_CONFIGS,
    chosen_tasks,
    read_seeds,
    seeds_to_try,
)
from rlvla_envs.slots import Slot, TellingEnv, check_slotted, ready_at_home
from rlvla_envs.stand_ins import FOLDER as STAND_INS
from rlvla_envs.stand_ins import Assets, is_current
from rlvla_envs.suite_home import Home, absolute
from rlvla_envs.suites import NotReadyError, Ready

if TYPE_CHECKING:
    from rlvla_envs.robotwin_world import World

HOME = Home(
    name="robotwin",
    modules=("robotwin", "mplib", "sapien", "toppra"),
    python=(3, 11),
    megabytes=1700,
    download_megabytes=700,
    newest=(3, 11),  # what the package says of itself
    # The runtime pins a SAPIEN that cannot draw without a GPU, another torch and 400 MB of open3d; torch wants a newer
    # setuptools than SAPIEN can be imported with.
    alone=("rlinf-robotwin-runtime", "mplib", "toppra", "sapien", "setuptools"),
)
TRIAL_TASK = "stack_blocks_two"
"""Wants no object, so that it runs on stand-ins."""

VARIABLE = "ROBOTWIN_ASSETS_ROOT"
"""The benchmark's own: names the official assets where they are not in the environment's folder."""
OFFICIAL = Path("official")
"""In the environment's folder."""


def arms_action(size: int = ARM_JOINTS) -> tuple[ActionComponent, ...]:
    """Both arms' joints and grippers, in the benchmark's order."""
    return tuple(
        component
        for side in ("left", "right")
        for component in (
            ActionComponent(
                name=f"{side}_arm",
                size=size,
                convention="absolute, joint targets, radians, reached as fast as the joints may (TOPP)",
                # No joint of the robot has a range that ends outside; the benchmark declares none.
                low=-2 * math.pi,
                high=2 * math.pi,
            ),
            ActionComponent(name=f"{side}_gripper", size=1, convention="absolute, 0 closed, 1 open", low=0.0, high=1.0),
        )
    )


ACTION = arms_action()
CAMERAS = ("head_camera", "left_camera", "right_camera")
CONTROL_HZ = 250 / 15
"""Of the benchmark's recorded data, which keeps every 15th physics step. An action lasts as long as its way takes."""
MAX_IMAGE_SIZE = 320
"""Pixels; the benchmark draws 320 x 240."""

OPTIONS = {"instructions", "seeds", "shader", "render_every_step"}
WORDS = ("unseen", "seen")
"""Sets of sentences; the first is the benchmark's own in an evaluation."""
SHADERS = ("default", "rt")

RENDERER = "vulkan"
PACKAGES = ("rlinf-robotwin-runtime", "sapien", "mplib", "toppra")

MB_PER_PROCESS = 700
"""Python, torch, SAPIEN and mplib, and the process that speaks to them."""
MB_PER_WORLD = 600
"""One simulation with its pictures, on stand-ins: 1.2 GB were measured with both."""


class RoboTwinEnv(TellingEnv["World"]):
    """A `VecEnv` of RoboTwin's tasks, each with the benchmark's own step limit.

    ``ChunkResult.metrics`` has ``seed_moves``: how often setting up moved on to another seed, because objects did not
    stand still. The seed of evaluation state i of a task was then ``100000 + i + 100 * seed_moves``.

    ``config.task`` is ``all``, one task, or several joined with ``+``.
    ``config.options``:
        instructions: ``unseen`` (the default) or ``seen``.
        seeds: file with seeds that the benchmark's expert solved, see `robotwin_tasks.read_seeds`.
        shader: ``default`` (rasterized) or ``rt`` (ray-traced as the benchmark, on a GPU that can).
        render_every_step: draw after every action as the benchmark does, for benchmarks and tests only.

    Raises:
        NotReadyError: there are neither official assets nor stand-ins that suffice for the tasks.
    """

    def __init__(self, config: SuiteConfig, num_envs: int) -> None:
        check(config)
        self._tasks = chosen_tasks(config.name, config.task)
        self._config = config
        self._assets = find_assets(Path(sys.prefix), config.name, self._tasks)
        spec = arms_spec(config, self._tasks, self._assets, variant=_variant(config), notes=_notes(config))
        super().__init__(config, num_envs, spec, render_every_step=bool(config.options.get("render_every_step", False)))

    def _make(self, task: int) -> World:
        from rlvla_envs.robotwin_world import World, load

        name, config = self._tasks[task], self._config
        code = load(name, SUITE_CONFIGS[config.name], self._assets.folder, shader(config))
        return World(name, code, config.image_size, words(config), seeds_of(config)[name])

    def _step_limit(self, slot: Slot[World]) -> int:
        return min(self.spec.max_episode_steps, STEP_LIMITS[self._tasks[slot.task]])


def arms_spec(
    config: SuiteConfig, tasks: tuple[str, ...], assets: Assets, *, variant: str, notes: tuple[str, ...]
) -> EnvSpec:
    """The conventions of RoboTwin's robot and cameras."""
    stand_ins = (f"stand-in: every asset in {assets.folder}",) if assets.unscored else ()
    return EnvSpec(
        suite=config.name,
        task=config.task,
        robot="Aloha AgileX",
        arms="two arms",
        action=ACTION,
        cameras=tuple(Camera(name=name, height=config.image_size, width=config.image_size) for name in CAMERAS),
        state_names=STATE_NAMES,
        control_hz=CONTROL_HZ,
        chunk_size=config.chunk_size,
        max_episode_steps=config.max_episode_steps,
        num_evaluation_states=STATES_PER_TASK * len(tasks),
        tasks=tasks,
        evaluation_states_per_task=(STATES_PER_TASK,) * len(tasks),
        variant=variant,
        notes=(*stand_ins, *notes),
        unscored=assets.unscored,
    )


def find_assets(prefix: Path, suite: str, tasks: Sequence[str]) -> Assets:
    """The official assets where they are whole, else stand-ins where `make_stand_ins` has put some.

    Args:
        prefix: folder of the virtual environment.
        suite: its name, for commands.
        tasks: that are to be played; stand-ins suffice for `BOX_TASKS`.

    Raises:
        NotReadyError: neither, or stand-ins that lack objects; with the command that brings the official ones.
    """
    named = os.environ.get(VARIABLE)
    root = absolute(named) if named else prefix / OFFICIAL
    fix = f"{prefix / 'bin/robotwin-download-assets'} --output {root}"
    absent = missing_files(root)
    if not absent and not is_current(root, STAND_INS_VERSION):
        return Assets(root, "")
    made = prefix / STAND_INS
    wanting = [task for task in tasks if task not in BOX_TASKS]
    if is_current(made, STAND_INS_VERSION) and not wanting:
        return Assets(
            made,
            f"its assets in {made} are a robot of boxes and plain pictures that `rlvla suites setup` generated. A "
            f"score needs the official ones ({fix}). Without a score: `rlvla eval policy=PATH suite={suite} "
            f"suite.task={'+'.join(tasks)} smoke_test=true`.",
        )
    if is_current(made, STAND_INS_VERSION):
        raise NotReadyError(
            f"{suite} has stand-ins for its assets, which have no objects: {len(wanting)} of {len(tasks)} tasks need "
            f"some, the first is {wanting[0]}. Play those without, suite.task={'+'.join(BOX_TASKS)}, or download the "
            f"official assets, gigabytes: {fix}.",
            fix=fix,
        )
    other = " (its stand-ins are of another release of rlvla)" if made.exists() else ""
    raise NotReadyError(
        f"{suite} has no assets{other}: {absent[0] if absent else root} is missing. Download the official ones, "
        f"gigabytes: {fix}; {VARIABLE} names them elsewhere. Or, to try the tasks without objects and without a "
        f"score, generate stand-ins: {HOME.cure} stand_ins=true.",
        fix=fix,
    )


def make_stand_ins(prefix: Path) -> int:
    """Write stand-ins into an environment, beside what it has; returns how many files."""
    return generate(prefix / STAND_INS)


def seeds_of(config: SuiteConfig) -> dict[str, list[list[int]]]:
    """For each task and evaluation state the seeds to try in turn. One that somebody's expert solved has no second."""
    tasks = chosen_tasks(config.name, config.task)
    if file := config.options.get("seeds"):
        found = read_seeds(Path(str(file)).expanduser(), tasks)
        return {task: [[seed] for seed in seeds] for task, seeds in found.items()}
    return {task: [seeds_to_try(FIRST_SEED + state) for state in range(STATES_PER_TASK)] for task in tasks}


def words(config: SuiteConfig) -> str:
    """Which instructions."""
    return str(config.options.get("instructions", WORDS[0]))


def shader(config: SuiteConfig) -> str:
    """Which way of drawing."""
    return str(config.options.get("shader", SHADERS[0]))


def _variant(config: SuiteConfig) -> str:
    """Of a list of seeds the numbers count, not where it lies."""
    parts = shared_variant(config)
    if config.options.get("seeds"):
        parts.append(f"seeds={hashlib.sha256(repr(sorted(seeds_of(config).items())).encode()).hexdigest()[:8]}")
    return ", ".join(parts)


def shared_variant(config: SuiteConfig) -> list[str]:
    """What of the options that all such suites have makes an episode another one."""
    said = (("instructions", words(config), WORDS), ("shader", shader(config), SHADERS))
    return [f"{name}={value}" for name, value, known in said if value != known[0]]


def shared_notes(config: SuiteConfig) -> tuple[str, ...]:
    """See `EnvSpec.notes`."""
    if shader(config) == SHADERS[0]:
        return ("pictures: rasterized; the benchmark traces rays (suite.options.shader=rt, on a GPU that can)",)
    return ()


def _notes(config: SuiteConfig) -> tuple[str, ...]:
    seeds = "seeds: counted up, not filtered by the benchmark's expert (suite.options.seeds=FILE gives those)"
    return (*shared_notes(config), *(() if config.options.get("seeds") else (seeds,)))


def check(config: SuiteConfig) -> None:
    """What can be wrong with a configuration, before anything is looked for.

    Raises:
        ValueError: something is.
    """
    check_arms(config, OPTIONS, chosen_tasks(config.name, config.task), who="RoboTwin")
    seeds_of(config)


def check_arms(config: SuiteConfig, options: set[str], tasks: Sequence[str], *, who: str) -> None:
    """What suites on RoboTwin's robot ask of a configuration; see `slots.check_slotted`."""
    states = STATES_PER_TASK * len(tasks)
    check_slotted(config, options, who=who, largest_image=MAX_IMAGE_SIZE, states=states, kind="evaluation states")
    for name, said, known in (("instructions", words(config), WORDS), ("shader", shader(config), SHADERS)):
        if said not in known:
            raise ValueError(f"suite.options.{name} is {said!r}; it must be one of {', '.join(known)}.")


def outline(config: SuiteConfig) -> dict[str, int]:
    """See `rlvla_envs.suites.outline`."""
    return dict.fromkeys(chosen_tasks(config.name, config.task), STATES_PER_TASK)


def check_ready(config: SuiteConfig) -> Ready:
    """See `rlvla_envs.suites.check_ready`. The note says that no score can be had."""
    check(config)
    ready = ready_at_home(config, HOME)
    if config.python is not None:
        return ready
    prefix = Path(sys.prefix) if HOME.is_here() else HOME.folder()
    assets = find_assets(prefix, config.name, chosen_tasks(config.name, config.task))
    if not assets.unscored:
        return ready
    official = f"{prefix / 'bin/robotwin-download-assets'} --output {prefix / OFFICIAL}"
    return Ready(("stand-in assets: it runs, and gives no score",), official)


def memory_mb(config: SuiteConfig, num_envs: int) -> int:
    """What one process with ``num_envs`` environments takes."""
    return MB_PER_PROCESS + MB_PER_WORLD * (num_envs + (len(chosen_tasks(config.name, config.task)) > 1))
