"""VLN-CE, vision-and-language navigation in continuous environments: convention, spec and interface, no simulator.

habitat-sim has no wheel for this platform and its scenes are licensed, so nothing here was played with it. What is here
is what a policy has to agree with, waypoints, and all that lies between them and a simulator: `Follower`,
`walk_metrics`, and `WaypointEnv` over any `Navigator`. docs/how-to/vln-ce.md says what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from rlvla_envs.base import ActionComponent, Camera, EnvSpec, SuiteConfig
from rlvla_envs.common import check_options
from rlvla_envs.slots import After, Look, Slot, SlottedEnv
from rlvla_envs.suites import NotReadyError, Ready

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

ACTION = (
    ActionComponent(
        name="displacement", size=2, convention="delta, own frame, metres ahead and left", low=-1.0, high=1.0
    ),
    ActionComponent(name="heading", size=1, convention="delta, radians to the left", low=-math.pi, high=math.pi),
)
"""A waypoint, from the one before it: Qwen-VLA's (dx, dy, dtheta). The ranges are ours."""
CAMERAS = ("rgb",)
HORIZON = 8
"""Waypoints in a chunk, as in the paper."""

FORWARD = 0.25
"""Metres of a move."""
TURN = math.radians(15)
MAX_MOVES = 500
SUCCESS_RADIUS = 3.0
"""Metres along the way between where the walk stopped and the goal."""
STOP = (0.05, math.radians(3))
"""Metres and radians: a waypoint below both says stop. Ours: the paper does not say how it ends a walk."""
TASKS = ("r2r", "rxr")
MISSING = (
    "VLN-CE has no simulator here: habitat-sim offers no package for this platform (PyPI has one for macOS on ARM), "
    "and its Matterport3D scenes want a licence. docs/how-to/vln-ce.md says what an adapter would have to bring."
)


class Move(IntEnum):
    """The simulator's actions, by its numbers."""

    stop = 0
    forward = 1
    left = 2
    right = 3


class Pose(NamedTuple):
    """Metres and radians; heading 0 looks along x, to the left is positive."""

    x: float = 0.0
    y: float = 0.0
    heading: float = 0.0


@dataclass
class Follower:
    """Turns waypoints into moves. It remembers where the waypoints lead and where the moves have led, so that what one
    waypoint leaves over is made up for by the next."""

    wanted: Pose = field(default_factory=Pose)
    reached: Pose = field(default_factory=Pose)

    def moves(self, waypoint: Float[np.ndarray, "3"]) -> list[Move]:
        """The moves for a waypoint; ``[Move.stop]`` for one that goes nowhere."""
        ahead, left, turn = (float(value) for value in waypoint)
        if math.hypot(ahead, left) < STOP[0] and abs(turn) < STOP[1]:
            return [Move.stop]
        x, y, heading = self.wanted
        self.wanted = Pose(
            x + ahead * math.cos(heading) - left * math.sin(heading),
            y + ahead * math.sin(heading) + left * math.cos(heading),
            heading + turn,
        )
        found: list[Move] = []
        gap = self._gap()
        # A step that would not bring it nearer is not taken.
        if gap > FORWARD / 2:
            bearing = math.atan2(self.wanted.y - self.reached.y, self.wanted.x - self.reached.x)
            found += self._turned(bearing)
            found += [self._forward() for _ in range(round(gap / FORWARD))]
        return found + self._turned(self.wanted.heading)

    def _gap(self) -> float:
        return math.hypot(self.wanted.x - self.reached.x, self.wanted.y - self.reached.y)

    def _forward(self) -> Move:
        x, y, heading = self.reached
        self.reached = Pose(x + FORWARD * math.cos(heading), y + FORWARD * math.sin(heading), heading)
        return Move.forward

    def _turned(self, heading: float) -> list[Move]:
        """The shorter way round."""
        steps = round(math.remainder(heading - self.reached.heading, 2 * math.pi) / TURN)
        self.reached = self.reached._replace(heading=self.reached.heading + steps * TURN)
        return [Move.left if steps > 0 else Move.right] * abs(steps)


@dataclass
class Walk:
    """What was measured of an episode."""

    shortest: float
    """Metres along the way from the start to the goal."""
    length: float = 0.0
    """Metres that were walked."""
    distances: list[float] = field(default_factory=list)
    """To the goal along the way, at the start and after every move."""
    stopped: bool = False


def walk_metrics(walk: Walk) -> dict[str, float]:
    """Success, oracle success, navigation error, and success weighted by path length (arXiv:1807.06757)."""
    success = float(walk.stopped and walk.distances[-1] <= SUCCESS_RADIUS)
    longer = max(walk.length, walk.shortest)
    return {
        "navigation_success": success,
        "oracle_success": float(min(walk.distances) <= SUCCESS_RADIUS),
        # Who starts at the goal and stops has walked the shortest way.
        "spl": success * (walk.shortest / longer if longer else 1.0),
        "navigation_error": walk.distances[-1],
    }


class Navigator(Protocol):
    """What a simulator has to bring: one walker in one scene at a time."""

    def start(self, episode: int) -> str:
        """Begin the episode of this number; returns its instruction."""
        ...

    def move(self, move: Move) -> float:
        """Make a move, never `Move.stop`; returns the metres by which the walker came on, 0 at a wall."""
        ...

    def distance(self) -> float:
        """Metres along the way from here to the goal."""
        ...

    def draw(self) -> UInt8[np.ndarray, "h w 3"]: ...

    def close(self) -> None: ...


class World:
    """One walker, led by waypoints."""

    def __init__(self, navigator: Navigator, max_moves: int = MAX_MOVES) -> None:
        self._navigator, self._max_moves = navigator, max_moves
        self._follower, self._walk, self._moves = Follower(), Walk(0.0), 0
        self.instruction = ""
        self.after = After()

    def start_stored(self, index: int) -> Look:
        self.instruction = self._navigator.start(index)
        distance = self._navigator.distance()
        self._follower, self._walk, self._moves = Follower(), Walk(distance, distances=[distance]), 0
        self.after = After(metrics=walk_metrics(self._walk))
        return self.see()

    def start_drawn(self, seed: int) -> Look:
        return self.start_stored(seed)

    def step(self, action: Float[np.ndarray, "3"], *, draw: bool) -> tuple[bool, Look]:
        """Follow one waypoint; whether it stopped at the goal."""
        for move in self._follower.moves(action):
            if self._moves >= self._max_moves:
                break
            self._moves += 1
            if move is Move.stop:
                self._walk.stopped = True
                break
            self._walk.length += self._navigator.move(move)
            self._walk.distances.append(self._navigator.distance())
        metrics = walk_metrics(self._walk)
        success = bool(metrics["navigation_success"])
        over = self._walk.stopped or self._moves >= self._max_moves
        self.after = After(lost=over and not success, metrics=metrics)
        return success, self.see() if draw else Look(None, np.zeros(0, np.float32))

    def see(self) -> Look:
        return Look((self._navigator.draw(),), np.zeros(0, np.float32))

    def film(self) -> UInt8[np.ndarray, "h w 3"]:
        return self._navigator.draw()

    def close(self) -> None:
        self._navigator.close()


class WaypointEnv(SlottedEnv[World]):
    """A `VecEnv` of walkers; ``make`` builds one `Navigator`."""

    def __init__(self, config: SuiteConfig, num_envs: int, make: Callable[[], Navigator]) -> None:
        self._build = make
        super().__init__(config, num_envs, spec_of(config), render_every_step=False)

    def _make(self, task: int) -> World:
        return World(self._build())

    def _worded(self, slot: Slot[World]) -> str:
        assert slot.world is not None
        return slot.world.instruction

    def _after(self, slot: Slot[World]) -> After:
        assert slot.world is not None
        return slot.world.after


def missing_simulator(config: SuiteConfig, num_envs: int) -> WaypointEnv:
    """What `rlvla_envs.suites.make_env` calls: raises RuntimeError, as there is nothing to build."""
    _check(config)
    raise RuntimeError(MISSING)


def spec_of(config: SuiteConfig) -> EnvSpec:
    """The conventions of VLN-CE for a policy, known without a simulator."""
    _check(config)
    return EnvSpec(
        suite=config.name,
        task=config.task,
        robot="walker",
        arms="no arm",
        action=ACTION,
        cameras=tuple(Camera(name=name, height=config.image_size, width=config.image_size) for name in CAMERAS),
        # A waypoint takes as long as its moves do; there is no rate.
        control_hz=1.0,
        chunk_size=config.chunk_size,
        max_episode_steps=config.max_episode_steps,
        num_evaluation_states=config.num_evaluation_states,
        tasks=(config.task,),
        evaluation_states_per_task=(config.num_evaluation_states,),
    )


def pad(moves: Sequence[Move], length: int) -> list[Move | None]:
    """A row of ``length`` moves: what comes after a stop is left out, and None, which does nothing, fills it up.

    >>> [move and move.name for move in pad([Move.left, Move.forward], 3)]
    ['left', 'forward', None]

    Raises:
        ValueError: there are more moves than that.
    """
    ending = moves.index(Move.stop) + 1 if Move.stop in moves else len(moves)
    if ending > length:
        raise ValueError(f"{ending} moves do not fit into a row of {length}.")
    return [*moves[:ending], *[None] * (length - ending)]


def _check(config: SuiteConfig) -> None:
    check_options(config, set())
    if config.task not in TASKS:
        raise ValueError(f"suite.task is {config.task!r}; it must be one of {', '.join(TASKS)}.")


def check_ready(config: SuiteConfig) -> Ready:
    """See `rlvla_envs.suites.check_ready`: it never is."""
    _check(config)
    # No command would help.
    raise NotReadyError(MISSING, fix="")
