"""SimplerEnv's WidowX tasks, and six out-of-distribution tasks on the same objects, as two suites.

Tasks: `simpler_tasks`; when they are solved: `simpler_rules`; asset files: `simpler_assets`; the simulated scene:
`simpler_twin`; experts: `simpler_experts`.
docs/how-to/simpler_env.md says what a user has to know.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlvla_envs.base import (
    ActionComponent,
    Camera,
    ChunkResult,
    Demonstration,
    EnvSpec,
    Observation,
    SuiteConfig,
)
from rlvla_envs.maniskill_common import building_simulator, check_options, record_expert
from rlvla_envs.simpler_assets import prepare_assets
from rlvla_envs.simpler_rules import RuleName
from rlvla_envs.simpler_tasks import chosen_tasks, configuration_of
from rlvla_envs.simpler_twin import CAMERA, make_twin

ACTION = (
    ActionComponent(name="translation", size=3, convention="delta, robot base frame, metres", low=-0.05, high=0.05),
    ActionComponent(
        name="rotation",
        size=3,
        convention="delta, Euler XYZ about base-aligned axes, radians",
        low=-0.5,
        high=0.5,
    ),
    ActionComponent(name="gripper", size=1, convention="absolute, 1 open, -1 closed", low=-1.0, high=1.0),
)
LOW = np.concatenate([np.full(c.size, c.low, np.float32) for c in ACTION])
HIGH = np.concatenate([np.full(c.size, c.high, np.float32) for c in ACTION])

NUM_JOINTS = 8
CONTROL_HZ = 5.0

OPTIONS = {"assets", "success", "render_every_step", "sim_backend", "render_backend", "image_width", "image_height"}
SUCCESS: tuple[RuleName, ...] = ("strict", "maniskill")

MB_PER_PROCESS = 1000
"""An estimate, on the safe side: Python, torch, SAPIEN, lavapipe, and one scene of each task."""
MB_PER_ENVIRONMENT = 12
"""An estimate for each scene more; meshes and textures are shared."""


@dataclass
class _Slot:
    """One running episode."""

    twin: Any = None
    task: int = 0
    elapsed: int = 0
    over: bool = True
    solved: dict[RuleName, bool] = field(default_factory=dict)
    """Which rules were met at some step."""


class SimplerEnv:
    """A `VecEnv` of WidowX tasks on ManiSkill's digital twins of the Bridge dataset's scenes.

    ``config.task`` is one task, several joined with ``+``, or ``all``. ``config.options``:
        success: the rule that ends an episode: "strict" (default) or "maniskill".
        assets: folder that holds ``data/``; MS_ASSET_DIR if absent.
        sim_backend, render_backend: "physx_cpu" and "cpu" by default.
        render_every_step: render after every action, for benchmarks only.
        image_width, image_height: another picture than image_size x image_size, for benchmarks only.
    """

    def __init__(self, config: SuiteConfig, num_envs: int) -> None:
        _check_options(config)
        self._tasks = chosen_tasks(config.name, config.task)
        self._rule: RuleName = config.options.get("success", "strict")
        for task in self._tasks:
            if self._rule not in task.rules:
                raise ValueError(
                    f"suite.options.success is {self._rule!r}, but {task.name} has the one rule that is ours; leave "
                    "the option away."
                )
        notes = prepare_assets(config.options.get("assets"), self._tasks)
        self.num_envs = num_envs
        self._instruction = config.instruction
        self._render_every_step = bool(config.options.get("render_every_step", False))
        self._settings = {
            "width": int(config.options.get("image_width", config.image_size)),
            "height": int(config.options.get("image_height", config.image_size)),
            "sim_backend": config.options.get("sim_backend", "physx_cpu"),
            "render_backend": config.options.get("render_backend", "cpu"),
        }
        self._slots = [_Slot() for _ in range(num_envs)]
        self._free: dict[int, list[Any]] = {index: [] for index in range(len(self._tasks))}
        self._limits = [min(task.max_steps, config.max_episode_steps) for task in self._tasks]
        self.spec = EnvSpec(
            suite=config.name,
            task=config.task,
            robot="WidowX 250S",
            action=ACTION,
            cameras=(Camera(name=CAMERA, height=self._settings["height"], width=self._settings["width"]),),
            state_names=tuple(f"qpos.{i}" for i in range(NUM_JOINTS)),
            control_hz=CONTROL_HZ,
            chunk_size=config.chunk_size,
            max_episode_steps=max(self._limits),
            num_evaluation_states=sum(len(task.configurations) for task in self._tasks),
            tasks=tuple(task.name for task in self._tasks),
            evaluation_states_per_task=tuple(len(task.configurations) for task in self._tasks),
            variant=f"success={self._rule}",
            notes=notes,
        )
        if config.num_evaluation_states < self.spec.num_evaluation_states:
            raise ValueError(
                f"suite.num_evaluation_states is {config.num_evaluation_states}, but {config.task} has "
                f"{self.spec.num_evaluation_states} enumerated configurations, and a part of them would favour a "
                "task. Leave it away, and use eval.trials to visit fewer."
            )
        # Whatever is wrong with the simulator shows now rather than in the first rollout.
        self._free[0].append(self._make(0))

    def reset(self, slots: Sequence[int], initial_states: Sequence[int]) -> Observation:
        for slot, state in zip(slots, initial_states, strict=True):
            index, configuration = configuration_of(self._tasks, int(state))
            twin = self._exchange(slot, index)
            self._slots[slot] = _Slot(twin, index, elapsed=0, over=False, solved=dict.fromkeys(twin.task.rules, False))
            if configuration is not None:
                twin.start(twin.task.layout(configuration)[None])
            else:
                _start_training(twin, int(state))
        return Observation.concatenate([self._observe(slot) for slot in slots])

    def step_chunk(self, slots: Sequence[int], actions: np.ndarray) -> ChunkResult:
        return ChunkResult.concatenate(
            [self._step_one(slot, chunk) for slot, chunk in zip(slots, actions, strict=True)]
        )

    def close(self) -> None:
        for twin in [slot.twin for slot in self._slots] + [twin for free in self._free.values() for twin in free]:
            if twin is not None:
                twin.close()
        self._slots, self._free = [_Slot() for _ in self._slots], {index: [] for index in self._free}

    def film(self, slot: int) -> np.ndarray:
        frame: np.ndarray = self._slots[slot].twin.film()[0]
        return frame

    def demonstrate(self, initial_state: int, seed: int) -> Demonstration:
        """An expert episode in slot 0, with a frame before every action. See `simpler_experts`."""
        from rlvla_envs.simpler_experts import make_expert

        observation = self.reset([0], [initial_state])
        expert = make_expert(self._slots[0].twin, np.random.default_rng(seed))
        return record_expert(self, observation, expert.act, LOW, HIGH)

    # --- one slot

    def _step_one(self, number: int, chunk: np.ndarray) -> ChunkResult:
        slot = self._slots[number]
        if slot.over:
            raise RuntimeError(f"slot {number} of {self.spec.task} has no running episode; reset it first.")
        twin, limit = slot.twin, self._limits[slot.task]
        executed, success = 0, False
        for action in np.clip(chunk, LOW, HIGH).astype(np.float32):
            # ManiSkill's own step() would render, which costs more than the physics.
            twin._step_action(action)
            slot.elapsed += 1
            executed += 1
            situation = twin.situation()
            for name, rule in twin.task.rules.items():
                slot.solved[name] |= bool(rule(situation)[0])
            success = slot.solved[self._rule]
            if success or slot.elapsed >= limit:
                break
            if self._render_every_step and executed < len(chunk):
                twin.picture()
        truncated = not success and slot.elapsed >= limit
        slot.over = success or truncated
        return ChunkResult(
            observation=self._observe(number, blank=success),
            reward=np.array([float(success)], dtype=np.float32),
            terminated=np.array([success]),
            truncated=np.array([truncated]),
            success=np.array([success]),
            executed_steps=np.array([executed], dtype=np.int64),
            metrics={
                f"success_{name}": np.array([met], dtype=np.float32)
                for name, met in slot.solved.items()
                if len(slot.solved) > 1
            },
        )

    def _observe(self, number: int, *, blank: bool = False) -> Observation:
        twin = self._slots[number].twin
        camera = self.spec.cameras[0]
        image = np.zeros((1, camera.height, camera.width, 3), dtype=np.uint8) if blank else twin.picture()
        state = np.array(twin.agent.robot.get_qpos().cpu().numpy(), dtype=np.float32)
        return Observation({CAMERA: image}, [self._instruction or twin.task.instruction], state)

    # --- the pool of simulators

    def _exchange(self, number: int, index: int) -> Any:
        """Give the slot's simulator back and take one of another task.

        The pool grows to what was needed at once and no further; switching costs nothing, building one 0.3 s.
        """
        slot = self._slots[number]
        if slot.twin is not None:
            self._free[slot.task].append(slot.twin)
            slot.twin = None
        return self._free[index].pop() if self._free[index] else self._make(index)

    def _make(self, index: int) -> Any:
        with building_simulator():
            return make_twin(self._tasks[index], **self._settings)


def _start_training(twin: Any, state: int) -> None:
    """Start from the neighbourhood of a configuration; where the objects do not stay, from the next draw."""
    for attempt in range(10):
        twin.start(twin.task.training_layout(state, attempt)[None])
        if twin.at_rest():
            return
    raise RuntimeError(f"{twin.task.name}: nothing came to rest in ten draws of training state {state}.")


def _check_options(config: SuiteConfig) -> None:
    check_options(config, OPTIONS)
    success = config.options.get("success", "strict")
    if success not in SUCCESS:
        raise ValueError(f"suite.options.success is {success!r}; it must be one of {', '.join(SUCCESS)}.")
    backend = config.options.get("sim_backend", "physx_cpu")
    if backend != "physx_cpu":
        raise ValueError(
            f"suite.options.sim_backend is {backend!r}; {config.name} runs on physx_cpu only so far, one scene an "
            "environment and one process a core (workers.num_actors)."
        )


def memory_mb(config: SuiteConfig, num_envs: int) -> int:
    """What one process with ``num_envs`` environments takes when every slot has played every task."""
    return MB_PER_PROCESS + num_envs * len(chosen_tasks(config.name, config.task)) * MB_PER_ENVIRONMENT
