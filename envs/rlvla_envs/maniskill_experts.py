"""Scripted experts that solve ManiSkill tasks in the environment's own action space.

They read the simulator's privileged state, steer the tool centre point (TCP) with the same clipped deltas a policy
has, and vary from episode to episode (noise, speed, approach), because demonstrations that are all alike
teach a policy nothing about recovering.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

METRES_PER_UNIT = 0.1
OPEN, CLOSED = 1.0, -1.0


class Expert(Protocol):
    def act(self) -> np.ndarray:
        """The next action [A], not yet clipped."""
        ...


def make_expert(task: str, env: Any, rng: np.random.Generator) -> Expert:
    """The expert of a task, for one episode.

    Raises:
        ValueError: nobody wrote one for this task.
    """
    if task not in EXPERTS:
        raise ValueError(
            f"{task} has no scripted expert. Experts: {', '.join(EXPERTS)}. Bring your own demonstrations."
        )
    return EXPERTS[task](env, rng)


class _Expert:
    """Phases of TCP targets, a speed per episode, white noise on the translation."""

    noise = 0.2

    def __init__(self, env: Any, rng: np.random.Generator) -> None:
        self.env, self.rng = env, rng
        self.phase = 0
        self.speed = rng.uniform(0.7, 1.0)

    def tcp(self) -> np.ndarray:
        position: np.ndarray = self.env.agent.tcp.pose.p[0].cpu().numpy()
        return position

    def towards(self, target: np.ndarray, gripper: float, *, noise: float | None = None) -> np.ndarray:
        delta = np.clip((target - self.tcp()) / METRES_PER_UNIT, -self.speed, self.speed)
        delta = delta + (self.noise if noise is None else noise) * self.rng.normal(size=3)
        return np.concatenate([delta, np.zeros(3), [gripper]])


class PushCube(_Expert):
    """Go behind the cube, then push it along +x; the gripper stays closed."""

    def act(self) -> np.ndarray:
        cube = self.env.obj.pose.p[0].cpu().numpy()
        if self.phase == 0:
            behind = np.array([cube[0] - 0.06, cube[1], 0.03])
            if np.linalg.norm(self.tcp() - behind) < 0.02:
                self.phase = 1
            else:
                return self.towards(behind, CLOSED)
        ahead = np.array([self.tcp()[0] + METRES_PER_UNIT, cube[1], 0.03])
        return self.towards(ahead, CLOSED)


class PickCube(_Expert):
    """Above the cube, down, close, then to the goal and hold still there."""

    noise = 0.05

    def act(self) -> np.ndarray:
        cube = self.env.cube.pose.p[0].cpu().numpy()
        goal = self.env.goal_site.pose.p[0].cpu().numpy()
        tcp = self.tcp()
        if self.phase == 0:
            above = cube + np.array([0, 0, 0.08])
            if np.linalg.norm(tcp - above) < 0.02:
                self.phase = 1
            return self.towards(above, OPEN)
        if self.phase == 1:
            if np.linalg.norm(tcp - cube) < 0.012:
                self.phase, self.grasp_steps = 2, 0
            return self.towards(cube, OPEN, noise=0.02)
        if self.phase == 2:
            self.grasp_steps += 1
            if self.grasp_steps >= 3:
                self.phase = 3
            return self.towards(tcp, CLOSED, noise=0.0)
        # The goal is for the cube, and success needs the arm at rest: no noise near the end.
        offset = goal - cube
        near = float(np.linalg.norm(offset)) < 0.05
        return self.towards(tcp + offset, CLOSED, noise=0.0 if near else self.noise)


EXPERTS: dict[str, Callable[[Any, np.random.Generator], Expert]] = {
    "PushCube-v1": PushCube,
    "PickCube-v1": PickCube,
}
