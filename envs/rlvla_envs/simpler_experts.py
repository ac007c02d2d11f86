"""Scripted experts for the ten WidowX tasks, in the environment's own action space.

They read privileged poses, grasp with the fingers down, carry, release and retreat. Speed, heights, grasp point, yaw
and place vary from episode to episode and free motion is noisy, because demonstrations that are all alike teach nothing
about recovering. Grasp heights and clearances were found by hand. World frame, metres, radians, 3 x 3 rotations.
"""

import math
from dataclasses import dataclass
from enum import IntEnum, auto
from typing import Any

import numpy as np
from jaxtyping import Float

from rlvla_envs.simpler_geometry import (
    Rotation,
    Vector,
    direction_of,
    euler_xyz,
    matrix_of,
    pose_of,
    rotate_flat,
    rotation_by,
    rotation_vector,
    rotation_z,
)
from rlvla_envs.simpler_tasks import (
    BASKET,
    CARROT,
    EGGPLANT,
    GREEN_CUBE,
    PLATE,
    SPOON,
    TABLE_HEIGHT,
    TOWEL,
    YELLOW_CUBE,
)

OPEN, CLOSED = 1.0, -1.0


@dataclass(frozen=True)
class Grasp:
    """How to take an object: the fingers close across its x axis."""

    along: float
    """Grasp point on the object's x axis."""
    spread: float
    """How far the grasp point may be from there."""
    height: float
    """Of the end effector above the object's origin."""
    bottom: float
    """Of the object below its origin."""
    symmetry: float = math.pi
    """Turning the object by this changes nothing."""
    turn_spread: float = 0.06


@dataclass(frozen=True)
class Place:
    """How to put something onto an object."""

    top: float
    """Surface above the object's origin."""
    clearance: tuple[float, float]
    """Height of the drop."""
    spread: float


_CUBE = Grasp(along=0.0, spread=0.002, height=0.005, bottom=0.015, symmetry=math.pi / 2, turn_spread=0.03)
GRASPS = {
    CARROT: Grasp(along=0.0, spread=0.012, height=0.0, bottom=0.0178),
    SPOON: Grasp(along=0.005, spread=0.010, height=0.008, bottom=0.0117),
    GREEN_CUBE: _CUBE,
    YELLOW_CUBE: _CUBE,
    EGGPLANT: Grasp(along=-0.004, spread=0.006, height=0.004, bottom=0.020),
}
PLACES = {
    PLATE: Place(top=0.006, clearance=(0.006, 0.015), spread=0.012),
    TOWEL: Place(top=0.006, clearance=(0.006, 0.015), spread=0.015),
    GREEN_CUBE: Place(top=0.015, clearance=(0.002, 0.005), spread=0.001),
    YELLOW_CUBE: Place(top=0.015, clearance=(0.002, 0.005), spread=0.001),
    BASKET: Place(top=0.001, clearance=(0.03, 0.05), spread=0.008),
}
ON_TABLE = Place(top=0.0, clearance=(0.006, 0.012), spread=0.004)

LOWEST = TABLE_HEIGHT + 0.0175
"""Of the end effector; the fingertips reach 16 mm below it."""
SINK_RIM = 0.937
MAX_RETRIES = 3


class Phase(IntEnum):
    ABOVE = auto()
    DESCEND = auto()
    CLOSE = auto()
    LIFT = auto()
    CARRY = auto()
    LOWER = auto()
    RELEASE = auto()
    RETREAT = auto()


def make_expert(twin: Any, rng: np.random.Generator) -> "PickAndPlace":
    """The expert for the episode that ``twin`` has just started."""
    source, target = twin.source_start[0], twin.target_start[0]
    goal = goal_of(twin.task.name, source[:2], target[:2], direction_of(pose_of(twin.objs[twin.task.source])[1]), rng)
    return PickAndPlace(twin, rng, goal)


def goal_of(
    task: str,
    source: Float[np.ndarray, "2"],
    target: Float[np.ndarray, "2"],
    axis: Float[np.ndarray, "2"],
    rng: np.random.Generator,
) -> Float[np.ndarray, "2"] | None:
    """Where on the table the source goes, xy; None puts it onto the target, wherever that is.

    Args:
        axis: unit vector along the source, seen from above.
    """
    if task == "move_away":
        direction = (source - target) / np.linalg.norm(source - target)
        angles = np.array([0.0, 0.5, -0.5, 0.9, -0.9])
        options = np.array([source + 0.06 * rotate_flat(direction, angle) for angle in angles])
        # The one at a comfortable distance from the robot's base.
        distance = np.linalg.norm(options - (0.147, 0.028), axis=1)
        return np.asarray(options[np.argmin(np.abs(distance - 0.30))])
    if task == "move_right":
        # A spoon across the towel needs more room than one along its edge.
        return np.array([target[0] + rng.uniform(-0.02, 0.02), target[1] + 0.09 + 0.03 * abs(axis[1])])
    if task == "place_right":
        return np.array([target[0], target[1] + 0.027])
    if task == "place_near":
        # Beside the plate with its side, not its end, towards it; on the side where the table is.
        across = np.array([-axis[1], axis[0]])
        options = np.array([target + 0.095 * across, target - 0.095 * across])
        return np.asarray(options[np.argmin(np.linalg.norm(options - (-0.16, 0.0), axis=1))])
    if task == "put_in_front":
        return np.array([target[0] + 0.095 + 0.03 * abs(axis[0]), target[1]])
    return None


class PickAndPlace:
    """Steers the controller's own target pose, which the arm follows within a step."""

    def __init__(self, twin: Any, rng: np.random.Generator, goal: Float[np.ndarray, "2"] | None) -> None:
        self.twin, self.rng, self.goal = twin, rng, goal
        self.grasp = GRASPS[twin.task.source]
        onto_right_half = twin.task.name == "place_right"
        self.place = PLACES[twin.task.target] if goal is None or onto_right_half else ON_TABLE
        spread = 0.005 if onto_right_half else self.place.spread
        self.on_target = self.place is not ON_TABLE
        sink = twin.task.scene == "sink"
        self.floor = SINK_RIM if sink else TABLE_HEIGHT + self.grasp.bottom
        self.speed = rng.uniform(0.026, 0.040)
        self.turn_speed = rng.uniform(0.22, 0.38)
        self.approach_height = rng.uniform(0.04, 0.07)
        self.lift_height = rng.uniform(0.10, 0.13) if sink else rng.uniform(0.065, 0.095)
        self.clearance = rng.uniform(*self.place.clearance)
        self.place_offset = np.clip(rng.normal(0, 0.5, 2), -1, 1) * spread
        self.precise = self.place.spread < 0.002
        self.home = self._target()[1]
        self.retries = 0
        self._aim(spread=self.grasp.spread)

    def act(self) -> Float[np.ndarray, "7"]:
        """The next action, not yet clipped."""
        position, rotation = self._target()
        if self.phase is Phase.ABOVE:
            return self._above(position, rotation)
        if self.phase is Phase.DESCEND:
            return self._descend(position, rotation)
        if self.phase is Phase.CLOSE:
            self._wait(3, then=Phase.LIFT)
            return self._action(position, rotation, position, None, CLOSED)
        if self.phase is Phase.LIFT:
            return self._lift(position, rotation)
        if self.phase is Phase.CARRY:
            return self._carry(position, rotation)
        if self.phase is Phase.LOWER:
            return self._lower(position, rotation)
        if self.phase is Phase.RELEASE:
            self._wait(3, then=Phase.RETREAT)
            self.retreat_height = position[2] + 0.07
            return self._action(position, rotation, position, None, OPEN)
        return self._action(position, rotation, _at(position, z=self.retreat_height), None, OPEN)

    # --- phases: each returns an action and may move on

    def _above(self, position: Vector, rotation: Rotation) -> np.ndarray:
        self._track()
        point = self._grasp_point()
        goal = _at(point, z=point[2] + self.approach_height)
        near = np.linalg.norm((position - goal)[:2]) < 0.008 and abs(position[2] - goal[2]) < 0.02
        if near and abs(self._turn_left(rotation)) < 0.08:
            self._enter(Phase.DESCEND)
            return self._descend(position, rotation)
        return self._action(position, rotation, goal, self.yaw, OPEN)

    def _descend(self, position: Vector, rotation: Rotation) -> np.ndarray:
        point = self._grasp_point()
        if abs(position[2] - point[2]) < 0.003:
            self._wait(2, then=Phase.CLOSE)
        return self._action(position, rotation, point, self.yaw, OPEN, speed=0.030)

    def _lift(self, position: Vector, rotation: Rotation) -> np.ndarray:
        height = self.floor + self.lift_height
        if abs(position[2] - height) < 0.015:
            self.waited += 1  # the hand is most of a step behind its target
        if self.waited > 1:
            lifted = self._source()[0][2] > self.twin.source_start[0, 2] + 0.02
            if not lifted and self.retries < MAX_RETRIES:
                return self._retry(position, rotation)
            self._enter(Phase.CARRY)
        return self._action(position, rotation, _at(position, z=height), self.yaw, CLOSED)

    def _carry(self, position: Vector, rotation: Rotation) -> np.ndarray:
        source, goal = self._source()[0], self._goal()
        hand = self._hand() - source
        if self.twin.task.scene == "table" and source[2] < TABLE_HEIGHT + 0.03 and self.retries < MAX_RETRIES:
            return self._retry(position, rotation)  # it slipped
        height = max(self.floor + self.lift_height, goal[2] + hand[2] + 0.02)
        waypoint = _at(goal + hand, z=height)
        arrived = np.linalg.norm((source - goal)[:2]) < (0.006 if self.precise else 0.014)
        if arrived or np.linalg.norm((position - waypoint)[:2]) < 0.003:
            self._enter(Phase.LOWER)
        return self._action(position, rotation, waypoint, self.yaw, CLOSED)

    def _lower(self, position: Vector, rotation: Rotation) -> np.ndarray:
        source, goal = self._source()[0], self._goal()
        if source[2] - goal[2] < 0.005:
            self._wait(2 if self.precise else 1, then=Phase.RELEASE)
        return self._action(position, rotation, goal + self._hand() - source, self.yaw, CLOSED, speed=0.028)

    def _retry(self, position: Vector, rotation: Rotation) -> np.ndarray:
        self.retries += 1
        self._aim(spread=self.grasp.spread / 2)
        return self._action(position, rotation, _at(position, z=position[2] + 0.02), None, OPEN)

    def _enter(self, phase: Phase) -> None:
        self.phase, self.waited = phase, 0

    def _wait(self, steps: int, *, then: Phase) -> None:
        self.waited += 1
        if self.waited >= steps:
            self._enter(then)

    # --- where to

    def _aim(self, *, spread: float) -> None:
        """Choose a grasp and start over."""
        self.along = self.grasp.along + self.rng.uniform(-1, 1) * spread
        self.turn_offset = self.rng.normal(0, self.grasp.turn_spread)
        self.yaw = 0.0
        self._track()
        self._enter(Phase.ABOVE)

    def _track(self) -> None:
        """Turn with the object: of the rotations that grasp it equally, to the nearest."""
        forward, closing = direction_of(self._source()[1]), self.home[:2, 1]
        across = math.atan2(forward[1], forward[0]) + math.pi / 2 - math.atan2(closing[1], closing[0])
        half = self.grasp.symmetry / 2
        self.yaw += (across + self.turn_offset - self.yaw + half) % self.grasp.symmetry - half

    def _grasp_point(self) -> Vector:
        position, rotation = self._source()
        point = position + self.along * np.array([*direction_of(rotation), 0.0])
        return _at(point, z=max(position[2] + self.grasp.height, LOWEST))

    def _goal(self) -> Vector:
        """Where the source's origin should be when the gripper opens."""
        target = pose_of(self.twin.objs[self.twin.task.target])[0]
        surface = target[2] + self.place.top if self.on_target else TABLE_HEIGHT
        centre = target[:2] if self.goal is None else self.goal
        return np.array([*(centre + self.place_offset), surface + self.grasp.bottom + self.clearance])

    # --- what is

    def _source(self) -> tuple[Vector, Rotation]:
        return pose_of(self.twin.objs[self.twin.task.source])

    def _hand(self) -> Vector:
        return pose_of(self.twin.agent.robot.links_map["ee_gripper_link"])[0]

    def _target(self) -> tuple[Vector, Rotation]:
        """The pose the controller steers to; actions add to it."""
        base_position, base_rotation = pose_of(self.twin.agent.robot)
        pose = self.twin.agent.controller.controllers["arm"]._target_pose.raw_pose[0].cpu().numpy().astype(np.float64)
        return base_position + base_rotation @ pose[:3], base_rotation @ matrix_of(pose[3:])

    def _turn_left(self, rotation: Rotation) -> float:
        """Angle about z that is missing."""
        missing = rotation_z(self.yaw) @ self.home @ rotation.T
        return math.atan2(missing[1, 0] - missing[0, 1], missing[0, 0] + missing[1, 1])

    def _action(
        self,
        position: Vector,
        rotation: Rotation,
        goal: Vector,
        yaw: float | None,
        gripper: float,
        *,
        speed: float = math.inf,
    ) -> Float[np.ndarray, "7"]:
        """One step of at most the episode's speed towards a position and a yaw (None: keep it)."""
        step = goal - position
        step *= min(1.0, min(speed, self.speed) / max(float(np.linalg.norm(step)), 1e-9))
        turn = np.zeros(3)
        if yaw is not None:
            turn = rotation_vector(rotation_z(yaw) @ self.home @ rotation.T)
            turn *= min(1.0, self.turn_speed / max(float(np.linalg.norm(turn)), 1e-9))
        if self.phase in (Phase.ABOVE, Phase.LIFT, Phase.CARRY, Phase.RETREAT):
            step, turn = step + self.rng.normal(0, 0.003, 3), turn + self.rng.normal(0, 0.012, 3)
        elif self.phase in (Phase.DESCEND, Phase.LOWER):
            step = step + self.rng.normal(0, 0.001, 3)
        base = pose_of(self.twin.agent.robot)[1]
        return np.concatenate([base.T @ step, euler_xyz(rotation_by(base.T @ turn)), [gripper]])


def _at(point: Vector, *, z: float) -> Vector:
    return np.array([point[0], point[1], z])
