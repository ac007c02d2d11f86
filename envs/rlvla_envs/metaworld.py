"""Meta-World's tasks for a Sawyer arm, drawn only where the policy looks.

Tasks and words: `metaworld_tasks`; one simulation: `metaworld_world`; experts: `metaworld_experts`. The suites live in
an interpreter of their own (`HOME`); docs/how-to/metaworld.md says what a user has to know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rlvla_envs.base import ActionComponent, Camera, Demonstration, EnvSpec, SuiteConfig
from rlvla_envs.common import record_expert
from rlvla_envs.metaworld_tasks import STATE_NAMES, STATES_PER_TASK, WORDS, chosen_tasks
from rlvla_envs.slots import Slot, SlottedEnv, check_slotted, ready_at_home
from rlvla_envs.suite_home import Home
from rlvla_envs.suites import Ready

if TYPE_CHECKING:
    from rlvla_envs.metaworld_world import World

VERSION = "2"
"""2: to close a simulation frees no other one's meshes."""

HOME = Home(
    name="metaworld",
    modules=("metaworld", "mujoco"),
    python=(3, 11),
    megabytes=400,
    download_megabytes=120,
)

ACTION = (
    ActionComponent(name="translation", size=3, convention="delta, world frame, 1 is 0.01 m", low=-1.0, high=1.0),
    ActionComponent(name="gripper", size=1, convention="effort, -1 opens, 1 closes", low=-1.0, high=1.0),
)
CAMERAS = ("corner2", "corner4")
"""corner4 is where LeRobot and others move corner2 to: the same direction from half the distance."""
CONTROL_HZ = 80.0
MAX_IMAGE_SIZE = 1024
"""Pixels."""

OPTIONS = {"camera", "render_every_step"}

RENDERER = "mujoco"
PACKAGES = ("metaworld", "mujoco", "gymnasium")

MB_PER_PROCESS = 400
"""Python, MuJoCo, the benchmark, and the process that speaks to them."""
MB_PER_WORLD = 250
"""One simulation, its meshes and its picture buffers."""


class MetaWorldEnv(SlottedEnv["World"]):
    """A `VecEnv` of Meta-World's tasks.

    ``config.task`` is ``all``, one task, or several joined with ``+``.
    ``config.options``:
        camera: ``corner2`` (the default) or ``corner4``.
        render_every_step: draw after every action as the benchmark does, for benchmarks and tests only.
    """

    def __init__(self, config: SuiteConfig, num_envs: int) -> None:
        _check(config)
        self._tasks = chosen_tasks(config.name, config.task)
        self._camera = _camera(config)
        spec = EnvSpec(
            suite=config.name,
            task=config.task,
            robot="Sawyer",
            action=ACTION,
            cameras=(Camera(name=self._camera, height=config.image_size, width=config.image_size),),
            state_names=STATE_NAMES,
            control_hz=CONTROL_HZ,
            chunk_size=config.chunk_size,
            max_episode_steps=config.max_episode_steps,
            num_evaluation_states=STATES_PER_TASK * len(self._tasks),
            tasks=self._tasks,
            evaluation_states_per_task=(STATES_PER_TASK,) * len(self._tasks),
        )
        self._size = config.image_size
        super().__init__(config, num_envs, spec, render_every_step=bool(config.options.get("render_every_step", False)))

    def demonstrate(self, initial_state: int, seed: int) -> Demonstration:
        """An episode of the benchmark's scripted policy in slot 0, with a frame before every action."""
        from rlvla_envs.metaworld_experts import Expert

        observation = self.reset([0], [initial_state])
        slot = self._slots[0]
        assert slot.world is not None
        expert = Expert(self._tasks[slot.task], slot.world, np.random.default_rng(seed))
        return record_expert(self, observation, expert.act, -1.0, 1.0)

    def _make(self, task: int) -> World:
        from rlvla_envs.metaworld_world import World

        return World(self._tasks[task], self._size, self._camera)

    def _worded(self, slot: Slot[World]) -> str:
        return WORDS[self._tasks[slot.task]]


def _camera(config: SuiteConfig) -> str:
    return str(config.options.get("camera", CAMERAS[0]))


def _check(config: SuiteConfig) -> None:
    states = STATES_PER_TASK * len(chosen_tasks(config.name, config.task))
    check_slotted(
        config, OPTIONS, who="Meta-World", largest_image=MAX_IMAGE_SIZE, states=states, kind="evaluation states"
    )
    if _camera(config) not in CAMERAS:
        raise ValueError(f"suite.options.camera is {_camera(config)!r}; it must be one of {', '.join(CAMERAS)}.")


def outline(config: SuiteConfig) -> dict[str, int]:
    """See `rlvla_envs.suites.outline`."""
    return dict.fromkeys(chosen_tasks(config.name, config.task), STATES_PER_TASK)


def check_ready(config: SuiteConfig) -> Ready:
    """See `rlvla_envs.suites.check_ready`."""
    _check(config)
    return ready_at_home(config, HOME)


def memory_mb(config: SuiteConfig, num_envs: int) -> int:
    """What one process with ``num_envs`` environments takes."""
    tasks = len(chosen_tasks(config.name, config.task))
    return MB_PER_PROCESS + MB_PER_WORLD * (num_envs + (tasks > 1))
