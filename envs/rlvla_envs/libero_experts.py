"""Scripted experts of libero_object and libero_spatial: they know where things are, and vary as people do.

An expert is a plan that yields an action and, when it is asked for the next, looks at the world again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlvla_envs.libero_tasks import PRO, Task

if TYPE_CHECKING:
    from jaxtyping import Float

    from rlvla_envs.libero_world import World

    Vector = Float[np.ndarray, "3"]

OPEN, CLOSED = -1.0, 1.0
METRES_PER_ACTION = 0.05
CLOSING_STEPS, OPENING_STEPS = 8, 25


@dataclass(frozen=True)
class Grip:
    """How a suite's objects are taken and put down; metres."""

    offset: tuple[float, float, float]
    """From the object's origin to where the fingers close."""
    spread: float
    """Of that place between episodes, along x and y."""
    release: float
    """Height of the object's origin above the destination's, when the fingers open."""


GRIPS = {
    "libero_object": Grip(offset=(0.0, 0.0, -0.005), spread=0.003, release=0.08),
    # Bowls are wider than the hand: by their rim.
    "libero_spatial": Grip(offset=(0.0, 0.045, 0.02), spread=0.003, release=0.05),
}


def make_expert(suite: str, task: Task, world: World, rng: np.random.Generator) -> PickAndPlace:
    """An expert for the episode that has just begun in ``world``.

    Raises:
        ValueError: the suite has none.
    """
    grip = GRIPS.get(suite.removesuffix(PRO))
    if grip is None:
        known = ", ".join(GRIPS)
        raise ValueError(f"{suite} has no scripted expert ({task.name}). Experts: {known}. Bring your own data.")
    return PickAndPlace(world, grip, rng)


class PickAndPlace:
    """Takes the first object of interest and puts it down on the second."""

    def __init__(self, world: World, grip: Grip, rng: np.random.Generator) -> None:
        self._world, self._rng = world, rng
        self._source, self._target = world.objects_of_interest()[:2]
        self._offset = np.array(grip.offset) + np.array([*rng.uniform(-grip.spread, grip.spread, 2), 0.0])
        self._release = grip.release + rng.uniform(-0.01, 0.01)
        self._above = rng.uniform(0.10, 0.14)
        self._lift = rng.uniform(0.18, 0.22)
        self._speed = rng.uniform(0.75, 1.0)
        self._plan = self._pick_and_place()

    def act(self) -> Float[np.ndarray, "7"]:
        """The next action, not yet clipped."""
        return next(self._plan)

    def _pick_and_place(self) -> Iterator[np.ndarray]:
        grasp = self._world.position_of(self._source) + self._offset
        yield from self._go(_raised(grasp, self._above), OPEN, noise=0.08)
        yield from self._go(grasp, OPEN, tolerance=0.004)
        yield from self._hold(CLOSED, CLOSING_STEPS)
        closed_at = self._world.hand()
        yield from self._go(_raised(closed_at, self._lift), CLOSED, noise=0.05)
        held = self._world.position_of(self._source) - self._world.hand()
        target = self._world.position_of(self._target)
        over = np.array([*(target - held)[:2], closed_at[2] + self._lift])
        yield from self._go(over, CLOSED, limit=80, noise=0.05)
        down = np.array([*over[:2], target[2] + self._release - held[2]])
        yield from self._go(down, CLOSED)
        yield from self._hold(OPEN, OPENING_STEPS)
        # Nothing more is known; the arm leaves, and waits for the end of the episode.
        left_at = self._world.hand()
        yield from self._go(_raised(left_at, self._above), OPEN)
        while True:
            yield from self._hold(OPEN, 1)

    def _go(
        self, goal: Vector, gripper: float, *, limit: int = 60, noise: float = 0.01, tolerance: float = 0.008
    ) -> Iterator[np.ndarray]:
        """Move the hand to within ``tolerance`` metres, or for ``limit`` steps."""
        for _ in range(limit):
            missing = goal - self._world.hand()
            if np.linalg.norm(missing) < tolerance:
                return
            move = np.clip(missing / METRES_PER_ACTION, -self._speed, self._speed)
            yield np.array([*(move + self._rng.normal(0, noise, 3)), 0, 0, 0, gripper])

    def _hold(self, gripper: float, steps: int) -> Iterator[np.ndarray]:
        for _ in range(steps):
            yield np.array([0, 0, 0, 0, 0, 0, gripper], dtype=np.float64)


def _raised(point: Vector, height: float) -> Vector:
    raised: Vector = point + np.array([0, 0, height])
    return raised
