"""What a world is: the `VecEnv` Protocol, the conventions it declares, and the records that cross its border.

Axes: B rows (the slots named in a call), H actions in a chunk, A action channels, S state channels, h and w
pixels. Everything that travels is numpy, so a world may live in another process or another interpreter: this file
needs numpy and Python 3.10, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float32, Int64, UInt8

FIRST_TRAINING_STATE = 1_000_000
"""Initial states are integers. Those below are the enumerated, held-back evaluation states of a suite;
training draws its states from here to `LAST_TRAINING_STATE`, so the two never meet."""

LAST_TRAINING_STATE = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class ActionComponent:
    """A run of action channels with one meaning. Compared between policy and world before anything runs."""

    name: str
    size: int
    convention: str
    """What a number means: "delta" or "absolute", frame, rotation convention, sign of the gripper."""
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Camera:
    name: str
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class EnvSpec:
    """The conventions of a world. A policy trained under others would waste days; so they are compared."""

    suite: str
    task: str
    robot: str
    """In the words of the embodiment prompt, for example "Franka Panda"."""
    arms: str = "single arm"
    action: tuple[ActionComponent, ...]
    cameras: tuple[Camera, ...]
    state_names: tuple[str, ...] = ()
    control_hz: float
    chunk_size: int
    """H: actions the policy commits to at each decision."""
    max_episode_steps: int
    num_evaluation_states: int
    tasks: tuple[str, ...] = ()
    """Of a suite that mixes tasks: their names. Empty means ``task`` alone."""
    evaluation_states_per_task: tuple[int, ...] = ()
    """How many of the evaluation states belong to each of ``tasks``; they are numbered task after task."""
    deterministic: bool = True
    """Whether initial state and actions fix the episode bit for bit."""
    variant: str = ""
    """Which of the suite's options changed what a success is, for example "success=strict". Measurements of different
    variants are not compared."""
    notes: tuple[str, ...] = ()
    """What a reader of any number obtained here has to know, for example "stand-in: ..." for a replaced asset."""
    unscored: str = ""
    """Why no success rate may come from here, and what would change that: assets that were generated so that the suite
    starts. Empty where results count."""

    def __post_init__(self) -> None:
        if self.tasks and (
            len(self.tasks) != len(self.evaluation_states_per_task)
            or sum(self.evaluation_states_per_task) != self.num_evaluation_states
        ):
            raise ValueError(
                f"{self.suite}: evaluation_states_per_task {self.evaluation_states_per_task} must be one number for "
                f"each of {len(self.tasks)} tasks and sum to num_evaluation_states ({self.num_evaluation_states})."
            )

    def task_names(self) -> tuple[str, ...]:
        return self.tasks or (self.task,)

    def task_of(self, initial_state: int) -> int:
        """Index into `task_names` of the task that an initial state belongs to.

        Training states belong to task ``initial_state % number of tasks``.
        """
        if not self.tasks:
            return 0
        if initial_state >= FIRST_TRAINING_STATE:
            return initial_state % len(self.tasks)
        if not 0 <= initial_state < self.num_evaluation_states:
            raise ValueError(
                f"initial state {initial_state} of {self.suite} is neither an evaluation state "
                f"(0 to {self.num_evaluation_states - 1}) nor a training state (from {FIRST_TRAINING_STATE})."
            )
        return int(np.searchsorted(np.cumsum(self.evaluation_states_per_task), initial_state, side="right"))

    @property
    def action_size(self) -> int:
        return sum(component.size for component in self.action)

    @property
    def state_size(self) -> int:
        return len(self.state_names)

    @property
    def max_decisions(self) -> int:
        """T: decisions in the longest episode."""
        return -(-self.max_episode_steps // self.chunk_size)

    def action_names(self) -> list[str]:
        return [f"{c.name}.{i}" if c.size > 1 else c.name for c in self.action for i in range(c.size)]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, for policy folders and datasets."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> EnvSpec:
        return EnvSpec(
            **{
                **data,
                "action": tuple(ActionComponent(**c) for c in data["action"]),
                "cameras": tuple(Camera(**c) for c in data["cameras"]),
                "state_names": tuple(data["state_names"]),
                "tasks": tuple(data.get("tasks", ())),
                "evaluation_states_per_task": tuple(data.get("evaluation_states_per_task", ())),
                "notes": tuple(data.get("notes", ())),
            }
        )


@dataclass(frozen=True)
class Observation:
    """What the policy sees at a decision."""

    images: dict[str, UInt8[np.ndarray, "B h w 3"]]
    instruction: list[str]
    state: Float32[np.ndarray, "B S"] | None = None

    def __len__(self) -> int:
        return len(self.instruction)

    def row(self, i: int) -> Observation:
        """One row, from 0; a view, not a copy."""
        rows = slice(i, i + 1)
        return Observation(
            images={name: image[rows] for name, image in self.images.items()},
            instruction=self.instruction[rows],
            state=None if self.state is None else self.state[rows],
        )

    def take(self, rows: Sequence[int] | np.ndarray) -> Observation:
        index = np.asarray(rows, dtype=np.int64)
        return Observation(
            images={name: image[index] for name, image in self.images.items()},
            instruction=[self.instruction[i] for i in index],
            state=None if self.state is None else self.state[index],
        )

    def views(self, cameras: Sequence[str]) -> UInt8[np.ndarray, "B views h w 3"]:
        """Images of cameras, in this order, that may be written to; of one camera the memory they are in, if it may."""
        images = [self.images[name] for name in cameras]
        own = len(images) == 1 and images[0].flags.writeable and images[0].flags.c_contiguous
        return images[0][:, None] if own else np.stack(images, axis=1)

    @staticmethod
    def concatenate(parts: Sequence[Observation]) -> Scattered:
        """All rows in one; nothing is copied before somebody looks (`Scattered`)."""
        return Scattered([(part, i) for part in parts for i in range(len(part))])


class Scattered(Observation):
    """Rows of several observations, left where they are until somebody looks at them.

    So rows that meet on their way, from one process or another, first or later ones of their episodes, are copied once,
    when all of them are together. Rows that are all of one observation, in their order, are in its memory, unless that
    is not to be written to.
    """

    def __init__(self, rows: Sequence[tuple[Observation, int]]) -> None:
        """
        Args:
            rows: observations, and which of their rows; at least one.
        """
        rows = [seen.rows[i] if isinstance(seen, Scattered) else (seen, int(i)) for seen, i in rows]
        # The fields that are not looked up; the class is frozen.
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "instruction", [seen.instruction[i] for seen, i in rows])

    rows: Sequence[tuple[Observation, int]]

    @cached_property
    def images(self) -> dict[str, UInt8[np.ndarray, "B h w 3"]]:
        return {name: self.views([name])[:, 0] for name in self.rows[0][0].images}

    @cached_property
    def state(self) -> Float32[np.ndarray, "B S"] | None:
        if self.rows[0][0].state is None:
            return None
        return np.stack([seen.state[i] for seen, i in self.rows if seen.state is not None])

    def views(self, cameras: Sequence[str]) -> UInt8[np.ndarray, "B views h w 3"]:
        if self._single is not None:
            return self._single.views(cameras)
        return stack_views(self.rows, cameras)

    @cached_property
    def _single(self) -> Observation | None:
        """What these are all rows of, in their order; else None."""
        first = self.rows[0][0]
        whole = len(self) == len(first) and all(seen is first and i == at for at, (seen, i) in enumerate(self.rows))
        return first if whole else None


def stack_views(rows: Sequence[tuple[Observation, int]], cameras: Sequence[str]) -> UInt8[np.ndarray, "B views h w 3"]:
    """A copy of the images of some rows of observations, of cameras in this order."""
    images = np.stack([seen.images[name][i] for seen, i in rows for name in cameras])
    return images.reshape(len(rows), len(cameras), *images.shape[1:])


@dataclass(frozen=True)
class ChunkResult:
    """What happened while one chunk ran in each named slot."""

    observation: Observation
    """At the chunk boundary, before any reset: of an episode that ended it is the final observation.

    Rows that terminated may hold zero images, because nothing bootstraps from them and a render costs more
    than the physics of a whole chunk. Rows that were truncated are always rendered.
    """
    reward: Float32[np.ndarray, " B"]
    terminated: Bool[np.ndarray, " B"]
    truncated: Bool[np.ndarray, " B"]
    success: Bool[np.ndarray, " B"]
    executed_steps: Int64[np.ndarray, " B"]
    """Actions that ran before the episode ended, in [1, H]."""
    metrics: dict[str, Float32[np.ndarray, " B"]] = field(default_factory=dict)
    """What else the suite measures, up to and including the last step: for example "success_maniskill" beside
    another success rule. The same keys in every result of a suite; none for most."""

    def take(self, rows: Sequence[int] | np.ndarray) -> ChunkResult:
        index = np.asarray(rows, dtype=np.int64)
        return ChunkResult(
            observation=self.observation.take(index),
            reward=self.reward[index],
            terminated=self.terminated[index],
            truncated=self.truncated[index],
            success=self.success[index],
            executed_steps=self.executed_steps[index],
            metrics={name: values[index] for name, values in self.metrics.items()},
        )

    @property
    def done(self) -> Bool[np.ndarray, " B"]:
        done: np.ndarray = self.terminated | self.truncated
        return done

    @staticmethod
    def concatenate(parts: Sequence[ChunkResult]) -> ChunkResult:
        return ChunkResult(
            observation=Observation.concatenate([p.observation for p in parts]),
            reward=np.concatenate([p.reward for p in parts]),
            terminated=np.concatenate([p.terminated for p in parts]),
            truncated=np.concatenate([p.truncated for p in parts]),
            success=np.concatenate([p.success for p in parts]),
            executed_steps=np.concatenate([p.executed_steps for p in parts]),
            metrics={name: np.concatenate([p.metrics[name] for p in parts]) for name in parts[0].metrics},
        )


class Demonstration(NamedTuple):
    """One episode of a scripted expert, a frame before every action."""

    images: dict[str, UInt8[np.ndarray, "L h w 3"]]
    state: Float32[np.ndarray, "L S"] | None
    action: Float32[np.ndarray, "L A"]
    instruction: str
    success: bool


@runtime_checkable
class VecEnv(Protocol):
    """A fixed number of simulators ("slots") of one suite. Episodes are restarted by the caller, never here.

    Arrays that were handed out are the caller's, who keeps them without a copy: they are never written to again.
    """

    spec: EnvSpec
    num_envs: int

    def reset(self, slots: Sequence[int], initial_states: Sequence[int]) -> Observation:
        """Start an episode in each named slot. Equal initial states give equal episodes, in any slot."""
        ...

    def step_chunk(self, slots: Sequence[int], actions: Float[np.ndarray, "B H A"]) -> ChunkResult:
        """Run one chunk in each named slot, in env units; stops at the step that ends the episode.

        Actions are clipped to the declared range. Raises RuntimeError for a slot whose episode is over.
        """
        ...

    def close(self) -> None: ...


@runtime_checkable
class Demonstrator(Protocol):
    """A world that has a scripted expert."""

    def demonstrate(self, initial_state: int, seed: int) -> Demonstration:
        """One noisy expert episode from a training state; may fail, and says so."""
        ...


@runtime_checkable
class Grouped(Protocol):
    """A world whose slots restart only together: a simulation that steps all its scenes at once, as on a GPU.

    Slots 0 to group_size - 1 are the first group, and so on. `VecEnv.reset` names slots of one group while none of it
    runs, with initial states of one task; slots of the group that are left out stay idle.
    """

    group_size: int


@runtime_checkable
class Timed(Protocol):
    """A world that knows what its pictures cost."""

    render_s: float
    """Seconds spent rendering what the policy sees, so far."""


@runtime_checkable
class DrawsInto(Protocol):
    """A world that draws into memory it is given, so that a picture leaves the renderer's buffer in one copy."""

    room: dict[str, UInt8[np.ndarray, "B h w 3"]] | None
    """For the next `VecEnv.reset` or `VecEnv.step_chunk`, as many rows as it names slots; None: the world's own."""


def black_images(
    cameras: Sequence[Camera], rows: int, room: dict[str, np.ndarray] | None = None
) -> dict[str, UInt8[np.ndarray, "rows h w 3"]]:
    """Images of each camera to draw into; in ``room`` if there is some."""
    if room is None:
        return {c.name: np.zeros((rows, c.height, c.width, 3), dtype=np.uint8) for c in cameras}
    for camera in cameras:
        assert len(room[camera.name]) == rows
        room[camera.name].fill(0)
    return dict(room)


@runtime_checkable
class Filmable(Protocol):
    """A world that can be watched: a frame for people, of any size, at every step."""

    def film(self, slot: int) -> UInt8[np.ndarray, "h w 3"]: ...


@dataclass(frozen=True)
class Mismatch:
    """One convention on which two sides differ."""

    field: str
    expected: str
    found: str


def compare_specs(policy: EnvSpec, world: EnvSpec) -> list[Mismatch]:
    """Every convention that must be equal for a policy to act in a world, and is not.

    Task, suite, step limit and robot name may differ: transfer is what evaluation measures.
    """
    found: list[Mismatch] = []

    def check(name: str, a: object, b: object) -> None:
        if a != b:
            found.append(Mismatch(name, str(a), str(b)))

    check("number of action channels", policy.action_size, world.action_size)
    if policy.action_size == world.action_size:
        check("action components", [c.name for c in policy.action], [c.name for c in world.action])
        for a, b in zip(policy.action, world.action, strict=False):
            if a.name == b.name:
                check(f"action {a.name}: convention", a.convention, b.convention)
                check(f"action {a.name}: range", (a.low, a.high), (b.low, b.high))
    check("cameras", [c.name for c in policy.cameras], [c.name for c in world.cameras])
    for ours, theirs in zip(policy.cameras, world.cameras, strict=False):
        check(
            f"camera {ours.name}: height x width",
            (ours.height, ours.width),
            (theirs.height, theirs.width),
        )
    check("state channels", list(policy.state_names), list(world.state_names))
    check("control frequency (Hz)", policy.control_hz, world.control_hz)
    check("chunk size H", policy.chunk_size, world.chunk_size)
    return found


def require_match(policy: EnvSpec, world: EnvSpec, *, left: str = "policy", right: str = "suite") -> None:
    """Raise ValueError with both sides as a table when `compare_specs` finds a difference."""
    mismatches = compare_specs(policy, world)
    if not mismatches:
        return
    rows = [("convention", left, right), *((m.field, m.expected, m.found) for m in mismatches)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    table = "\n".join("  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
    raise ValueError(
        f"the {left} and the {right} use different conventions:\n{table}\n"
        f"Choose a suite with the {left}'s conventions, or train a {left} under the {right}'s."
    )


def require_score(spec: EnvSpec) -> None:
    """Raise ValueError where a world can be played but not measured in."""
    if spec.unscored:
        raise ValueError(f"{spec.suite} cannot give a success rate here: {spec.unscored}")


@dataclass(kw_only=True)
class SuiteConfig:
    """What every suite is configured with. YAML values: configs/suite/*.yaml."""

    name: str = "toy"
    """Key of `rlvla_envs.suites.SUITES`."""
    task: str = "gate"
    instruction: str | None = None
    """Replaces the task's own instruction."""
    chunk_size: int = 8
    """H: actions between two looks of the policy. Longer is cheaper to simulate and reacts later."""
    max_episode_steps: int = 48
    """Step limit; reaching it truncates the episode."""
    image_size: int = 64
    """Height and width in pixels of what the policy sees."""
    num_evaluation_states: int = 1000
    """How many enumerated, held-back initial states the suite offers."""
    python: str | None = None
    """Another Python interpreter that hosts the simulator, for example /home/me/robotwin/bin/python. null: this one."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of this suite alone; each suite names and checks its own."""

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ValueError(f"suite.chunk_size is {self.chunk_size}; it must be at least 1. Usual: 8 or 16.")
        if self.max_episode_steps < 1:
            raise ValueError(f"suite.max_episode_steps is {self.max_episode_steps}; it must be at least 1.")
        if self.image_size < 1:
            raise ValueError(f"suite.image_size is {self.image_size}; it must be at least 1 pixel. Usual: 64 to 256.")
        if not 1 <= self.num_evaluation_states <= FIRST_TRAINING_STATE:
            raise ValueError(
                f"suite.num_evaluation_states is {self.num_evaluation_states}; it must lie in "
                f"[1, {FIRST_TRAINING_STATE}], above which training states begin."
            )
