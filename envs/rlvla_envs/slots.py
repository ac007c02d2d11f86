"""Suites of which every slot holds one simulation of one task: running chunks, and who has which simulation.

A suite derives from `SlottedEnv` and says how a simulation is built and what a policy is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from rlvla_envs.base import ChunkResult, EnvSpec, Observation, SuiteConfig
from rlvla_envs.common import check_options, place_of
from rlvla_envs.suite_home import Home
from rlvla_envs.suites import NotReadyError, Ready

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8


class Look(NamedTuple):
    """What is to be seen after a step."""

    images: tuple[UInt8[np.ndarray, "h w 3"], ...] | None
    """In the order of the spec's cameras; None where nothing was drawn."""
    state: Float[np.ndarray, " S"]


class After(NamedTuple):
    """What a step did beside solving the task."""

    cut: bool = False
    """The policy has to look before it goes on: the rest of its chunk is not played."""
    lost: bool = False
    """The episode is over, and not solved."""
    metrics: Mapping[str, float] = {}
    """See `ChunkResult.metrics`."""


class World(Protocol):
    """One simulation of one task."""

    def start_stored(self, index: int) -> Look:
        """Begin the evaluation episode of this number."""
        ...

    def start_drawn(self, seed: int) -> Look:
        """Begin a training episode."""
        ...

    def step(self, action: Float[np.ndarray, " A"], *, draw: bool) -> tuple[bool, Look]:
        """One control step; whether the task is solved, and what is seen."""
        ...

    def film(self) -> UInt8[np.ndarray, "h w 3"]:
        """A picture for people."""
        ...

    def close(self) -> None: ...


class TellingWorld(World, Protocol):
    """One that itself knows what the policy is told, and what a step did beside solving the task."""

    @property
    def language(self) -> str: ...

    @property
    def after(self) -> After: ...


W = TypeVar("W", bound=World)
T = TypeVar("T", bound=TellingWorld)


@dataclass
class Slot(Generic[W]):
    """One running episode."""

    world: W | None = None
    task: int = 0
    elapsed: int = 0
    over: bool = True


class SlottedEnv(Generic[W]):
    """A `VecEnv` with ``spec.tasks`` of equally many evaluation states; actions are clipped to ``spec.action``.

    Pictures are drawn at the last step of a chunk or an episode only, unless ``render_every_step``.

    A slot has one simulation at a time; another task takes one that is free, or builds it.
    """

    spec: EnvSpec
    num_envs: int

    def __init__(self, config: SuiteConfig, num_envs: int, spec: EnvSpec, *, render_every_step: bool) -> None:
        self.spec, self.num_envs = spec, num_envs
        self._instruction = config.instruction
        self._render_every_step = render_every_step
        self._low = np.concatenate([np.full(part.size, part.low) for part in spec.action])
        self._high = np.concatenate([np.full(part.size, part.high) for part in spec.action])
        self._slots: list[Slot[W]] = [Slot() for _ in range(num_envs)]
        # Whatever is wrong with the simulator shows now rather than in the first rollout.
        self._free: list[tuple[int, W]] = [(0, self._make(0))]

    def _make(self, task: int) -> W:
        """Build a simulation of a task."""
        raise NotImplementedError

    def _step_limit(self, slot: Slot[W]) -> int:
        """Steps after which a running episode is cut off; of a suite whose tasks differ, those of its task."""
        return self.spec.max_episode_steps

    def _worded(self, slot: Slot[W]) -> str:
        """What the policy is told in a running episode."""
        raise NotImplementedError

    def _after(self, slot: Slot[W]) -> After:
        """Asked after every step."""
        return After()

    def _see(self, slot: Slot[W]) -> Look:
        """Draw what is there now; asked of suites that cut chunks."""
        raise NotImplementedError

    def reset(self, slots: Sequence[int], initial_states: Sequence[int]) -> Observation:
        looks = []
        for number, state in zip(slots, initial_states, strict=True):
            task, stored = self._place_of(int(state))
            world = self._exchange(number, task)
            looks.append(world.start_stored(stored) if stored is not None else world.start_drawn(int(state)))
            self._slots[number] = Slot(world, task, elapsed=0, over=False)
        return self._observation(slots, looks)

    def step_chunk(self, slots: Sequence[int], actions: np.ndarray) -> ChunkResult:
        return ChunkResult.concatenate([self._step(s, chunk) for s, chunk in zip(slots, actions, strict=True)])

    def close(self) -> None:
        for world in (*(slot.world for slot in self._slots), *(world for _, world in self._free)):
            if world is not None:
                world.close()
        self._slots, self._free = [Slot() for _ in self._slots], []

    def film(self, slot: int) -> np.ndarray:
        world = self._slots[slot].world
        if world is None:
            raise RuntimeError(f"slot {slot} of {self.spec.suite} has no episode to film; reset it first.")
        return world.film()

    def _place_of(self, initial_state: int) -> tuple[int, int | None]:
        return place_of(len(self.spec.tasks), self.spec.evaluation_states_per_task[0], initial_state)

    def _step(self, number: int, chunk: np.ndarray) -> ChunkResult:
        slot = self._slots[number]
        if slot.over or slot.world is None:
            raise RuntimeError(f"slot {number} of {self.spec.task} has no running episode; reset it first.")
        limit = self._step_limit(slot)
        success, executed, after = False, 0, After()
        look: Look | None = None
        for action in np.clip(chunk.astype(np.float64), self._low, self._high):
            slot.elapsed += 1
            executed += 1
            # Some simulators take pictures inside a step: that this one is the last has to be known before it.
            last = executed == len(chunk) or slot.elapsed >= limit
            success, look = slot.world.step(action, draw=last or self._render_every_step)
            after = self._after(slot)
            if success or last or after.cut or after.lost:
                break
        terminated = success or after.lost
        truncated = not terminated and slot.elapsed >= limit
        slot.over = terminated or truncated
        assert look is not None
        if after.cut and look.images is None and not slot.over:
            look = self._see(slot)
        return ChunkResult(
            observation=self._observation([number], [look]),
            reward=np.array([float(success)], dtype=np.float32),
            terminated=np.array([terminated]),
            truncated=np.array([truncated]),
            success=np.array([success]),
            executed_steps=np.array([executed], dtype=np.int64),
            metrics={name: np.array([value], dtype=np.float32) for name, value in after.metrics.items()},
        )

    def _observation(self, slots: Sequence[int], looks: Sequence[Look]) -> Observation:
        """What the slots see; black where nothing was drawn."""
        images = {}
        for i, camera in enumerate(self.spec.cameras):
            blank = np.zeros((camera.height, camera.width, 3), dtype=np.uint8)
            images[camera.name] = np.stack([blank if look.images is None else look.images[i] for look in looks])
        told = [self._instruction or self._worded(self._slots[number]) for number in slots]
        return Observation(images, told, np.stack([look.state for look in looks]))

    def _exchange(self, number: int, task: int) -> W:
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


class TellingEnv(SlottedEnv[T]):
    """A `SlottedEnv` of worlds that know it themselves."""

    def _worded(self, slot: Slot[T]) -> str:
        assert slot.world is not None
        return slot.world.language

    def _after(self, slot: Slot[T]) -> After:
        assert slot.world is not None
        return slot.world.after


def check_slotted(
    config: SuiteConfig, options: set[str], *, who: str, largest_image: int, states: int, kind: str
) -> None:
    """What such suites ask of a configuration.

    Args:
        options: those of ``config.options`` that there are.
        who: the simulator's name, for readers.
        largest_image: pixels that it can draw.
        states: evaluation states of the chosen tasks.
        kind: what these are: "stored states".

    Raises:
        ValueError: an unknown option, a picture too small or too large, or a part of the states.
    """
    check_options(config, options)
    if not 8 <= config.image_size <= largest_image:
        raise ValueError(f"suite.image_size is {config.image_size}; {who} draws 8 to {largest_image} pixels.")
    if config.num_evaluation_states < states:
        raise ValueError(
            f"suite.num_evaluation_states is {config.num_evaluation_states}, but {config.task} has {states} {kind}, "
            "and a part of them would favour a task. Leave it away, and use eval.trials to visit fewer."
        )


def ready_at_home(config: SuiteConfig, home: Home) -> Ready:
    """Whether a suite's environment is there; one that the user names is for the user to check.

    Raises:
        NotReadyError: it is not, or has other versions.
    """
    complaint = home.complaint() if config.python is None else ""
    if complaint:
        raise NotReadyError(complaint, fix=home.cure)
    return Ready()
