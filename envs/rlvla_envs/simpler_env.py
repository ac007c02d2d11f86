"""SimplerEnv's WidowX tasks, and six out-of-distribution tasks on the same objects, as two suites.

Tasks: `simpler_tasks`; when they are solved: `simpler_rules`; asset files: `simpler_assets`; the simulated scene:
`simpler_twin`; experts: `simpler_experts`.
docs/how-to/simpler_env.md says what a user has to know.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
    black_images,
)
from rlvla_envs.common import check_options, record_expert
from rlvla_envs.maniskill_common import require_maniskill
from rlvla_envs.simpler_assets import DOWNLOAD, asset_root, check_assets, prepare_assets
from rlvla_envs.simpler_rules import RuleName
from rlvla_envs.simpler_tasks import chosen_tasks, configuration_of
from rlvla_envs.simpler_twin import CAMERA, make_twin
from rlvla_envs.suites import NotReadyError, Ready
from rlvla_envs.vulkan_drawing import building_simulator

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

HOLD = np.array([0, 0, 0, 0, 0, 0, 1], dtype=np.float32)
"""The action of a scene whose episode is over: the arm stays, the gripper opens."""

NUM_JOINTS = 8
CONTROL_HZ = 5.0

OPTIONS = {"assets", "success", "render_every_step", "sim_backend", "render_backend", "image_width", "image_height"}
BATCHED = "physx_cuda"
BACKENDS = ("physx_cpu", BATCHED)
SUCCESS: tuple[RuleName, ...] = ("strict", "maniskill")

RENDERER = "vulkan"
PACKAGES = ("mani-skill", "sapien")

MB_PER_PROCESS = 1000
"""An estimate, on the safe side: Python, torch, SAPIEN, lavapipe, and one scene of each task."""
MB_PER_ENVIRONMENT = 12
"""An estimate for each scene more; meshes and textures are shared."""

MAX_DRAWS = 10
"""Of a training state whose objects do not stay where they were put."""


@dataclass
class _Slot:
    """One running episode."""

    twin: Any = None
    row: int = 0
    """Which of the twin's scenes."""
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
        sim_backend: "physx_cpu" (default), a simulation for each slot; or "physx_cuda", one for all of them, which is
            `Grouped`: its slots restart together, with episodes of one task.
        render_backend: "cpu", or "gpu" where the simulation is on one.
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
        self.render_s = 0.0
        self.room: dict[str, np.ndarray] | None = None
        self._instruction = config.instruction
        self._render_every_step = bool(config.options.get("render_every_step", False))
        backend = config.options.get("sim_backend", "physx_cpu")
        self.group_size = num_envs if backend == BATCHED else 1
        self._settings = {
            "width": int(config.options.get("image_width", config.image_size)),
            "height": int(config.options.get("image_height", config.image_size)),
            "sim_backend": backend,
            "render_backend": config.options.get("render_backend", "gpu" if backend == BATCHED else "cpu"),
            "num": self.group_size,
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
            # What ran on a GPU is compared with nothing that did not.
            variant=f"success={self._rule}" + (f",sim={BATCHED}" if backend == BATCHED else ""),
            deterministic=backend != BATCHED,
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
        """Also raises RuntimeError for a part of a group: other slots' episodes would end with it, or be of a task that
        the group does not simulate."""
        states = [int(state) for state in initial_states]
        tasks = [configuration_of(self._tasks, state)[0] for state in states]
        if self.group_size > 1:
            running = [i for i, slot in enumerate(self._slots) if not slot.over and i not in slots]
            if running or len(set(tasks)) > 1:
                raise RuntimeError(
                    f"slots {list(slots)} cannot start episodes of {len(set(tasks))} tasks while {len(running)} others "
                    "run: scenes of one simulation restart together, with one task."
                )
            self._start(slots, states, tasks[0])
        else:
            for slot, state, task in zip(slots, states, tasks, strict=True):
                self._start([slot], [state], task)
        return self._observe(slots, black_images(self.spec.cameras, len(slots), self.room))

    def step_chunk(self, slots: Sequence[int], actions: np.ndarray) -> ChunkResult:
        size = len(slots) if self.group_size > 1 else 1
        images = black_images(self.spec.cameras, len(slots), self.room)
        whole = ChunkResult.concatenate(
            [
                self._step(slots[i : i + size], actions[i : i + size], {CAMERA: images[CAMERA][i : i + size]})
                for i in range(0, len(slots), size)
            ]
        )
        told = whole.observation
        return replace(whole, observation=Observation(images, told.instruction, told.state))

    def close(self) -> None:
        used = {slot.twin for slot in self._slots if slot.twin is not None}
        for twin in (*used, *(twin for free in self._free.values() for twin in free)):
            twin.close()
        self._slots, self._free = [_Slot() for _ in self._slots], {index: [] for index in self._free}

    def film(self, slot: int) -> np.ndarray:
        frame: np.ndarray = self._slots[slot].twin.film()[self._slots[slot].row]
        return frame

    def demonstrate(self, initial_state: int, seed: int) -> Demonstration:
        """An expert episode in slot 0, with a frame before every action. See `simpler_experts`."""
        from rlvla_envs.simpler_experts import make_expert

        if self._settings["sim_backend"] == BATCHED:
            raise ValueError(
                f"the experts of {self.spec.suite} act in one scene; collect with suite.options.sim_backend=physx_cpu."
            )
        observation = self.reset([0], [initial_state])
        expert = make_expert(self._slots[0].twin, np.random.default_rng(seed))
        return record_expert(self, observation, expert.act, LOW, HIGH)

    # --- the slots of one simulation

    def _start(self, slots: Sequence[int], states: Sequence[int], task: int) -> None:
        """Start episodes of one task in the scenes of one simulation."""
        twin = self._exchange(slots[0], task)
        rows = [slot % self.group_size for slot in slots]
        for slot, row in zip(slots, rows, strict=True):
            solved = dict.fromkeys(twin.task.rules, False)
            self._slots[slot] = _Slot(twin, row, task, elapsed=0, over=False, solved=solved)
        # Scenes without an episode show any configuration; nobody looks.
        layouts = np.stack([twin.task.layout(twin.task.configurations[0])] * self.group_size)
        draws = dict.fromkeys(rows, 0)
        for _ in range(MAX_DRAWS):
            for row, state in zip(rows, states, strict=True):
                configuration = configuration_of(self._tasks, state)[1]
                if configuration is not None:
                    layouts[row] = twin.task.layout(configuration)
                else:
                    layouts[row] = twin.task.training_layout(state, draws[row])
            twin.start(layouts)
            resting = twin.at_rest()
            # A training state whose objects did not stay is drawn again; a configuration is what it is.
            fallen = [
                (row, state)
                for row, state in zip(rows, states, strict=True)
                if configuration_of(self._tasks, state)[1] is None and not resting[row]
            ]
            if not fallen:
                return
            for row, _ in fallen:
                draws[row] += 1
        raise RuntimeError(
            f"{twin.task.name}: nothing came to rest in {MAX_DRAWS} draws of training state {fallen[0][1]}."
        )

    def _step(self, numbers: Sequence[int], chunks: np.ndarray, images: dict[str, np.ndarray]) -> ChunkResult:
        """Run a chunk in slots of one simulation, until the last of them ends, and draw into ``images``."""
        slots = [self._slots[number] for number in numbers]
        for number, slot in zip(numbers, slots, strict=True):
            if slot.over:
                raise RuntimeError(f"slot {number} of {self.spec.task} has no running episode; reset it first.")
        twin, limit = slots[0].twin, self._limits[slots[0].task]
        chunks = np.clip(chunks, LOW, HIGH).astype(np.float32)
        # Scenes whose episode is over hold still while the others act.
        actions = np.tile(HOLD, (self.group_size, 1))
        executed = np.zeros(len(slots), dtype=np.int64)
        success = np.zeros(len(slots), dtype=np.bool_)
        for h in range(chunks.shape[1]):
            for slot, chunk in zip(slots, chunks, strict=True):
                actions[slot.row] = HOLD if slot.over else chunk[h]
            # ManiSkill's own step() would render, which costs more than the physics.
            twin._step_action(actions)
            situation = twin.situation()
            met = {name: rule(situation) for name, rule in twin.task.rules.items()}
            for i, slot in enumerate(slots):
                if slot.over:
                    continue
                slot.elapsed += 1
                executed[i] += 1
                for name in slot.solved:
                    slot.solved[name] |= bool(met[name][slot.row])
                success[i] = slot.solved[self._rule]
                slot.over = bool(success[i]) or slot.elapsed >= limit
            if all(slot.over for slot in slots):
                break
            if self._render_every_step and h + 1 < chunks.shape[1]:
                twin.picture()
        over = np.array([slot.over for slot in slots])
        return ChunkResult(
            observation=self._observe(numbers, images, blank=bool(success.all())),
            reward=success.astype(np.float32),
            terminated=success,
            truncated=over & ~success,
            success=success.copy(),
            executed_steps=executed,
            metrics={
                f"success_{name}": np.array([slot.solved[name] for slot in slots], dtype=np.float32)
                for name in slots[0].solved
                if len(slots[0].solved) > 1
            },
        )

    def _observe(self, numbers: Sequence[int], images: dict[str, np.ndarray], *, blank: bool = False) -> Observation:
        """What the slots see, drawn into black ``images`` unless they stay so: a picture costs more than the physics of
        a chunk."""
        state = np.zeros((len(numbers), NUM_JOINTS), dtype=np.float32)
        pictures: dict[int, np.ndarray] = {}
        for i, number in enumerate(numbers):
            twin, row = self._slots[number].twin, self._slots[number].row
            if not blank:
                if id(twin) not in pictures:
                    began = time.perf_counter()
                    pictures[id(twin)] = twin.picture()
                    self.render_s += time.perf_counter() - began
                # Out of the renderer's buffer before it is used again: this is the one copy.
                images[CAMERA][i] = pictures[id(twin)][row]
            state[i] = twin.agent.robot.get_qpos()[row].cpu().numpy()
        told = [self._instruction or self._slots[number].twin.task.instruction for number in numbers]
        return Observation(images, told, state)

    # --- the pool of simulators

    def _exchange(self, number: int, index: int) -> Any:
        """Give the simulation of the slot's group back and take one of another task.

        The pool grows to what was needed at once and no further; switching costs nothing, building one 0.3 s.
        """
        first = number - number % self.group_size
        group = self._slots[first : first + self.group_size]
        for twin, task in {(slot.twin, slot.task) for slot in group if slot.twin is not None}:
            self._free[task].append(twin)
        for slot in group:
            slot.twin, slot.over = None, True
        return self._free[index].pop() if self._free[index] else self._make(index)

    def _make(self, index: int) -> Any:
        with building_simulator():
            return make_twin(self._tasks[index], **self._settings)


def _check_options(config: SuiteConfig) -> None:
    check_options(config, OPTIONS)
    success = config.options.get("success", "strict")
    if success not in SUCCESS:
        raise ValueError(f"suite.options.success is {success!r}; it must be one of {', '.join(SUCCESS)}.")
    backend = config.options.get("sim_backend", "physx_cpu")
    if backend not in BACKENDS:
        raise ValueError(f"suite.options.sim_backend is {backend!r}; it must be one of {', '.join(BACKENDS)}.")
    if backend == BATCHED and not _gpu_is_usable():
        raise ValueError(
            f"suite.options.sim_backend is {BATCHED}, but torch sees no GPU here. Leave the option away to simulate on "
            "the CPU, one scene an environment and one process a core (workers.num_actors)."
        )


def _gpu_is_usable() -> bool:
    import torch

    return torch.cuda.is_available()


def outline(config: SuiteConfig) -> dict[str, int]:
    """See `rlvla_envs.suites.outline`."""
    return {task.name: len(task.configurations) for task in chosen_tasks(config.name, config.task)}


def check_ready(config: SuiteConfig) -> Ready:
    """See `rlvla_envs.suites.check_ready`. The notes name stand-ins for assets."""
    check_options(config, OPTIONS)
    require_maniskill()
    root = asset_root(config.options.get("assets"))
    tasks = chosen_tasks(config.name, config.task)
    download = f"MS_ASSET_DIR={root} {DOWNLOAD}"
    try:
        return Ready(check_assets(root, tasks), download)
    except ValueError as error:
        first = str(error).splitlines()[0].removesuffix(" Download them with")
        raise NotReadyError(first, fix=download) from error


def memory_mb(config: SuiteConfig, num_envs: int) -> int:
    """What one process with ``num_envs`` environments takes when every slot has played every task."""
    return MB_PER_PROCESS + num_envs * len(chosen_tasks(config.name, config.task)) * MB_PER_ENVIRONMENT
