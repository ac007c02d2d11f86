"""When a WidowX task is solved: predicates over what a step left behind.

World frame: z up, metres. Axes: B environments.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float


class Contacts(NamedTuple):
    """Who touches the source object."""

    target_force: Float[np.ndarray, " B"]
    """Between source and target, newtons."""
    others: Bool[np.ndarray, " B"]
    """Whether anything presses on the source that is neither the target nor the robot."""
    robot: Bool[np.ndarray, " B"]
    """Whether any part of the robot presses on it. ManiSkill's ``is_grasping`` asks for 0.5 N of both fingers, and a
    spoon that is being carried drops below that now and then."""


class Situation(NamedTuple):
    """Where things are, after a step and at the start of the episode. What the rules below read."""

    source: Float[np.ndarray, "B 3"]
    target: Float[np.ndarray, "B 3"]
    source_start: Float[np.ndarray, "B 3"]
    target_start: Float[np.ndarray, "B 3"]
    source_half: Float[np.ndarray, "B 3"]
    """Half of the bounding box, turned by the rotation at the start as ManiSkill does it."""
    target_half: Float[np.ndarray, "B 3"]
    speed: Float[np.ndarray, " B"]
    """Of the source, m/s."""
    contacts: Callable[[], Contacts]
    """Asked last: reading the contacts costs more than everything else here."""

    @property
    def offset(self) -> Float[np.ndarray, "B 3"]:
        difference: np.ndarray = self.source - self.target
        return difference


Rule = Callable[[Situation], Bool[np.ndarray, " B"]]
RuleName = Literal["strict", "maniskill"]


def over_target(s: Situation, *, height: float) -> Bool[np.ndarray, " B"]:
    """The geometric part that the original SimplerEnv and ManiSkill share: above the target and not far above."""
    near = np.linalg.norm(s.offset[:, :2], axis=1) <= np.linalg.norm(s.target_half[:, :2], axis=1) + 0.003
    gap = s.offset[:, 2] - s.target_half[:, 2] - s.source_half[:, 2]
    over: np.ndarray = near & (s.offset[:, 2] > 0) & (gap <= height)
    return over


def put_on(*, height: float = 0.02, contact: bool = True) -> dict[RuleName, Rule]:
    """Both success rules of putting the source on the target.

    Args:
        height: how far above the target still counts, metres.
        contact: whether the source must touch the target; spoon and eggplant need not, in either benchmark.
    """

    def maniskill(s: Situation) -> np.ndarray:
        over = over_target(s, height=height)
        if not contact or not over.any():
            return over
        return np.asarray(over & (s.contacts().target_force > 0.05))

    def strict(s: Situation) -> np.ndarray:
        over = over_target(s, height=height)
        if not over.any():
            return over
        touch = s.contacts()
        rests = (touch.target_force > 0.05) & ~touch.others if contact else np.ones_like(over)
        return np.asarray(over & rests & ~touch.robot)

    return {"strict": strict, "maniskill": maniskill}


def relation(holds: Callable[[Situation], np.ndarray], *, touching: bool) -> dict[RuleName, Rule]:
    """The rule of an out-of-distribution task. The thresholds are ours: the paper publishes none.

    Args:
        holds: the spatial relation that the instruction asks for.
        touching: True when the source must touch the target; False when it must lie on the table, clear of it.
    """

    def strict(s: Situation) -> np.ndarray:
        moved = np.linalg.norm((s.source - s.source_start)[:, :2], axis=1) > 0.03
        target_stayed = np.linalg.norm((s.target - s.target_start)[:, :2], axis=1) < 0.03
        # A carrot that lies still rocks at up to 36 mm/s.
        solved = moved & target_stayed & (s.speed < 0.05) & holds(s)
        if not touching:
            solved &= np.abs(s.source[:, 2] - s.source_start[:, 2]) < 0.015
        if not solved.any():
            return np.asarray(solved)
        touch = s.contacts()
        return np.asarray(solved & ~touch.robot & ((touch.target_force > 0.05) == touching))

    return {"strict": strict}
