"""CALVIN's protocol as data: chains of five subtasks, where an episode starts, what a policy may know. No simulator."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlvla_envs.slots import After

if TYPE_CHECKING:
    from jaxtyping import Float

CHAINS = 1000
"""Of an evaluation, in the order of the benchmark's own `get_sequences`."""
LENGTH = 5
"""Subtasks of a chain."""
SUBTASK_STEPS = 360
"""After which a subtask, and with it the chain, is lost."""

STATE_NAMES = (
    *(f"hand_position.{i}" for i in range(3)),
    *(f"hand_euler_xyz.{i}" for i in range(3)),
    "gripper_width",
    "gripper_command",
)


class Chain:
    """Where an episode is in its chain: the next subtask begins with the step after the one that solved the last."""

    def __init__(self, subtasks: Sequence[str], limit: int) -> None:
        self.subtasks, self.limit = tuple(subtasks), limit
        self.solved, self._steps = 0, 0

    @property
    def subtask(self) -> str:
        """That is to be solved now; the last one of a chain that is solved."""
        return self.subtasks[min(self.solved, len(self.subtasks) - 1)]

    def step(self, solved: bool) -> After:
        """Count a step, and say what it led to.

        Args:
            solved: whether the current subtask is.
        """
        self._steps += 1
        if solved:
            self.solved, self._steps = self.solved + 1, 0
        lost = not solved and self._steps >= self.limit
        return After(cut=solved, lost=lost, metrics=self.metrics())

    def metrics(self) -> dict[str, float]:
        """Their means over chains are CALVIN's table: average length, and the shares of at least 1 to 5 in a row."""
        shares = {f"in_a_row_{n}": float(self.solved >= n) for n in range(1, len(self.subtasks) + 1)}
        return {"chain_length": float(self.solved), **shares}


_CONDITIONS: dict[str, tuple[int | str, ...]] = {
    "led": (0, 1),
    "lightbulb": (0, 1),
    "slider": ("right", "left"),
    "drawer": ("closed", "open"),
    **dict.fromkeys(("red_block", "blue_block", "pink_block"), ("table", "slider_right", "slider_left")),
    "grasped": (0,),
}


def initial_conditions() -> list[dict[str, int | str]]:
    """Every scene that a chain may begin in: one or two blocks on the table, at most one at each end of the cabinet."""

    def fits(values: tuple[int | str, ...]) -> bool:
        crowded = max(values.count("slider_right"), values.count("slider_left")) > 1
        return values.count("table") in (1, 2) and not crowded

    every = itertools.product(*_CONDITIONS.values())
    return [dict(zip(_CONDITIONS, values, strict=True)) for values in every if fits(values)]


ROBOT_START = (
    *(0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585, 0.07999963),
    *(-1.21779124, 1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928, 1.0),
)
"""Hand position and Euler angles, gripper width, seven joints, gripper command."""
_CABINET = {
    "slider_left": (-0.240851662, 0.0924044687, 0.460990009),
    "slider_right": (0.0703416330, 0.0924044687, 0.460990009),
}
_TABLE = ((0.0500000896, -0.120000177, 0.459990009), (0.229995412, -0.119995140, 0.459990010))
_TURN = (np.pi / 2 - np.pi / 8, np.pi / 2 + np.pi / 8)
"""Of a block about z, radians."""


def scene_start(condition: Mapping[str, int | str]) -> Float[np.ndarray, "24"]:
    """CALVIN's ``scene_obs`` for a condition: sliding door, drawer, button, switch, bulb, LED, and three blocks' poses.

    A hash of the condition seeds the places, so that everybody's evaluation starts alike: the benchmark's pyhash reads
    a text as UTF-16.
    """
    random = np.random.RandomState(fnv1_32(str(condition.values()).encode("utf-16-le")))
    table = [np.array(place) for place in _TABLE]
    random.shuffle(table)
    scene = np.zeros(24)
    scene[0] = 0.28 * (condition["slider"] == "left")
    scene[1] = 0.22 * (condition["drawer"] == "open")
    scene[3] = 0.088 * (condition["lightbulb"] == 1)
    scene[4], scene[5] = condition["lightbulb"], condition["led"]
    on_table = 0
    for block, first in (("red_block", 6), ("blue_block", 12), ("pink_block", 18)):
        place = condition[block]
        if place in _CABINET:
            scene[first : first + 3] = _CABINET[str(place)]
        else:
            # The pink one takes the second place even where no other lies on the table.
            scene[first : first + 3] = table[1 if block == "pink_block" else on_table]
            on_table += 1
        scene[first + 5] = random.uniform(*_TURN)
    return scene


def fnv1_32(data: bytes) -> int:
    """The 32-bit Fowler-Noll-Vo hash, version 1, from 0 as pyhash has it, and not from the authors' offset basis.

    >>> fnv1_32(b""), fnv1_32(b"test")
    (0, 3698262380)
    """
    found = 0
    for byte in data:
        found = (found * 0x01000193 % 2**32) ^ byte
    return found


def proprioception(robot_obs: Float[np.ndarray, "15"]) -> Float[np.ndarray, "8"]:
    """Hand position (metres, world), Euler angles, width of the gripper (metres), its last command."""
    return np.concatenate([robot_obs[:7], robot_obs[14:15]]).astype(np.float32)
