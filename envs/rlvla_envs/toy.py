"""A 2-D world that runs in microseconds: fly through a gap in a wall and reach the goal.

It has everything a robot suite has (rendered images, a state, an instruction, chunks, a sparse success, an
expert, enumerated initial states), so that the whole system can be tested and ablated in seconds.
"""

from collections.abc import Sequence

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
from rlvla_envs.common import check_options

STEP_LENGTH = 0.12
GAP_HALF_WIDTH = 0.10
GOAL_RADIUS = 0.08
MIN_THROTTLE = 0.25
INSTRUCTION = "fly through the gap and reach the green goal"
TASKS = ("gate",)
OPTIONS = {"throttle"}

TRANSLATION = ActionComponent(name="translation", size=2, convention=f"delta, 1 is {STEP_LENGTH}", low=-1.0, high=1.0)
THROTTLE = ActionComponent(
    name="throttle", size=1, convention="absolute, share of a full step", low=MIN_THROTTLE, high=1.0
)
STATE_NAMES = ("x", "y", "goal_x", "goal_y", "gap_y")


class ToyEnv:
    """A `VecEnv` on the square [-1, 1]^2, in numpy.

    The point starts at the left, the wall stands at x = 0, the goal at the right. Hitting the wall ends the
    episode without success; entering the goal ends it with. Actions are displacements, 1 is `STEP_LENGTH`.

    ``config.options``:
        throttle: another robot, with a third action channel: the share of a full step that it goes, from
            `MIN_THROTTLE` to 1. Its state has the last one. 20 Hz.
    """

    def __init__(self, config: SuiteConfig, num_envs: int) -> None:
        check_options(config, OPTIONS)
        self._has_throttle = bool(config.options.get("throttle", False))
        if config.task not in TASKS:
            raise ValueError(f"suite.task is {config.task!r}; the toy suite has {', '.join(TASKS)}.")
        self.num_envs = num_envs
        self._instruction = config.instruction or INSTRUCTION
        self._size = config.image_size
        self._max_steps = config.max_episode_steps
        self._position = np.zeros((num_envs, 2), dtype=np.float32)
        self._goal = np.zeros((num_envs, 2), dtype=np.float32)
        self._gap = np.zeros(num_envs, dtype=np.float32)
        self._throttle = np.ones(num_envs, dtype=np.float32)
        self._elapsed = np.zeros(num_envs, dtype=np.int64)
        self._over = np.ones(num_envs, dtype=np.bool_)
        self.spec = EnvSpec(
            suite=config.name,
            task=config.task,
            robot="point with a throttle" if self._has_throttle else "point",
            action=(TRANSLATION, THROTTLE) if self._has_throttle else (TRANSLATION,),
            cameras=(Camera(name="top", height=self._size, width=self._size),),
            state_names=STATE_NAMES + ("throttle",) * self._has_throttle,
            control_hz=20.0 if self._has_throttle else 10.0,
            chunk_size=config.chunk_size,
            max_episode_steps=config.max_episode_steps,
            num_evaluation_states=config.num_evaluation_states,
        )

    def reset(self, slots: Sequence[int], initial_states: Sequence[int]) -> Observation:
        for slot, state in zip(slots, initial_states, strict=True):
            u = np.random.default_rng(state).random(4, dtype=np.float32)
            self._position[slot] = (-0.9 + 0.1 * u[0], 1.6 * (u[1] - 0.5))
            self._goal[slot] = (0.85, 1.6 * (u[2] - 0.5))
            self._gap[slot] = u[3] - 0.5
        self._throttle[list(slots)] = 1.0
        self._elapsed[list(slots)] = 0
        self._over[list(slots)] = False
        return self._observe(np.asarray(slots))

    def step_chunk(self, slots: Sequence[int], actions: np.ndarray) -> ChunkResult:
        rows = np.asarray(slots)
        if self._over[rows].any():
            slot = rows[self._over[rows]][0]
            raise RuntimeError(f"slot {slot} of the toy has no running episode; reset it first.")
        success = np.zeros(len(rows), dtype=np.bool_)
        terminated = np.zeros(len(rows), dtype=np.bool_)
        truncated = np.zeros(len(rows), dtype=np.bool_)
        executed = np.zeros(len(rows), dtype=np.int64)
        for h in range(actions.shape[1]):
            live = ~(terminated | truncated)
            if not live.any():
                break
            hit, reached = self._move(rows[live], actions[live, h])
            success[live] = reached
            terminated[live] = hit | reached
            executed += live
            truncated |= live & ~terminated & (self._elapsed[rows] >= self._max_steps)
        self._over[rows] = terminated | truncated
        return ChunkResult(self._observe(rows), success.astype(np.float32), terminated, truncated, success, executed)

    def close(self) -> None:
        pass

    def film(self, slot: int) -> np.ndarray:
        frame: np.ndarray = _draw(self._position[[slot]], self._goal[[slot]], self._gap[[slot]], 128)[0]
        return frame

    def demonstrate(self, initial_state: int, seed: int) -> Demonstration:
        """Line up with the gap, go through, go to the goal, with noise of 0.3 on every action."""
        rng = np.random.default_rng(seed)
        frames, actions = [self.reset([0], [initial_state])], []
        while True:
            x, y = self._position[0]
            if x < -0.12:
                waypoint = np.array([-0.1, self._gap[0]])
            elif x < 0.05:
                waypoint = np.array([0.15, self._gap[0]])
            else:
                waypoint = self._goal[0]
            action = (waypoint - (x, y)) / STEP_LENGTH
            action = action / max(1.0, float(np.abs(action).max())) + 0.3 * rng.normal(size=2)
            if self._has_throttle:
                action = np.append(action, rng.uniform(0.6, 1.0))
            actions.append(np.clip(action, -1, 1).astype(np.float32))
            result = self.step_chunk([0], actions[-1][None, None])
            if result.done[0]:
                break
            frames.append(result.observation)
        episode = Observation.concatenate(frames)
        return Demonstration(
            episode.images, episode.state, np.stack(actions), self._instruction, bool(result.success[0])
        )

    def _move(self, rows: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        start = self._position[rows]
        length: float | np.ndarray = STEP_LENGTH
        if self._has_throttle:
            self._throttle[rows] = np.clip(action[:, 2], MIN_THROTTLE, 1)
            length = STEP_LENGTH * self._throttle[rows, None]
        end = start + length * np.clip(action[:, :2], -1, 1).astype(np.float32)
        crosses = (start[:, 0] < 0) & (end[:, 0] >= 0)
        along = -start[:, 0] / np.where(crosses, end[:, 0] - start[:, 0], 1)
        height = start[:, 1] + along * (end[:, 1] - start[:, 1])
        hit = crosses & (np.abs(height - self._gap[rows]) > GAP_HALF_WIDTH)
        self._position[rows] = end
        self._elapsed[rows] += 1
        reached = ~hit & (np.linalg.norm(end - self._goal[rows], axis=1) < GOAL_RADIUS)
        return hit, reached

    def _observe(self, rows: np.ndarray) -> Observation:
        position, goal, gap = self._position[rows], self._goal[rows], self._gap[rows]
        state = [position, goal, gap[:, None]]
        if self._has_throttle:
            state.append(self._throttle[rows, None])
        return Observation(
            images={"top": _draw(position, goal, gap, self._size)},
            instruction=[self._instruction] * len(rows),
            state=np.concatenate(state, axis=1),
        )


def _draw(position: np.ndarray, goal: np.ndarray, gap: np.ndarray, size: int) -> np.ndarray:
    """Grey wall, green goal, blue point on white; [B, size, size, 3], y up."""
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    x, y = centres[None, None, :], -centres[None, :, None]
    image = np.full((len(position), size, size, 3), 255, dtype=np.uint8)
    wall = (np.abs(x) < 0.05) & (np.abs(y - gap[:, None, None]) > GAP_HALF_WIDTH)
    image[wall] = (110, 110, 110)
    for centre, radius, colour in ((goal, 0.12, (40, 170, 60)), (position, 0.10, (30, 60, 220))):
        disc = (x - centre[:, 0, None, None]) ** 2 + (y - centre[:, 1, None, None]) ** 2 < radius**2
        image[disc] = colour
    return image
