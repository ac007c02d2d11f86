"""What a driver knows of simulators that fail: how long to wait, what to replay, whom to blame, when to give up.

The driver remembers the initial state and the chunks of every running episode. A simulator that died or hangs is
replaced and its episodes are played again up to where they were, which with a deterministic simulator gives the same
bits. Ray's own retry would step a fresh simulator and return wrong results without an error.
"""

import statistics
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

HANG_FACTOR = 20.0
"""A call that takes so many times as long as the slowest recent one hangs."""
KNOWN_CALLS = 10
"""Calls to have seen before their pace is trusted."""
MIN_DEADLINE_S = 30.0
"""Below this a busy machine is mistaken for a hang."""
HOUR_S = 3600.0


class HostGoneError(Exception):
    """A simulator process died or missed its deadline; the text says which and when."""


@dataclass(frozen=True)
class Incident:
    """One simulator process that was replaced."""

    worker: int
    why: str
    recovery_s: float
    """From noticing to the pending chunk's result."""
    replayed_chunks: int
    lost_episodes: int
    quarantined: tuple[int, ...] = ()
    """Initial states that killed it once too often and are not played again."""

    def __str__(self) -> str:
        lost = f", {self.lost_episodes} episodes lost" if self.lost_episodes else ""
        states = ", ".join(map(str, self.quarantined))
        left_out = f"; left out from now on: initial state {states}" if states else ""
        return (
            f"simulator {self.worker} {self.why}: replaced in {self.recovery_s:.1f} s, "
            f"{self.replayed_chunks} chunks replayed{lost}{left_out}"
        )


@dataclass
class Played:
    """An episode so far: what brings a fresh simulator to where this one is."""

    state: int
    chunks: list[np.ndarray] = field(default_factory=list)
    """[H C] each."""


class Deadlines:
    """How long a call may take: never longer than ``limit_s``, less once the pace is known.

    A call's work is counted in restarts and chunks, so a call that replays forty chunks has forty times the time.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._pace: deque[float] = deque(maxlen=50)

    def of(self, work: int) -> float:
        if len(self._pace) < KNOWN_CALLS:
            return self.limit_s
        expected = HANG_FACTOR * max(self._pace) * max(1, work)
        return min(self.limit_s, max(MIN_DEADLINE_S, expected))

    def took(self, seconds: float, work: int) -> None:
        self._pace.append(seconds / max(1, work))

    @property
    def usual_s(self) -> float:
        """Median seconds a restart or chunk has taken."""
        return statistics.median(self._pace) if self._pace else 0.0


class Restarts:
    """Counts replaced simulators and the initial states that kill them."""

    def __init__(self, per_hour: int, quarantine_after: int, now: Callable[[], float] = time.monotonic) -> None:
        self._per_hour, self._quarantine_after, self._now = per_hour, quarantine_after, now
        self._times: deque[float] = deque()
        self._blame: Counter[int] = Counter()

    def count(self, why: str) -> None:
        """One more was replaced.

        Raises:
            RuntimeError: more than ``per_hour`` within an hour.
        """
        now = self._now()
        self._times.append(now)
        while self._times and self._times[0] <= now - HOUR_S:
            self._times.popleft()
        if len(self._times) > self._per_hour:
            raise RuntimeError(
                f"simulators were replaced {len(self._times)} times within an hour and "
                f"workers.max_restarts_per_hour is {self._per_hour}; the last one {why}. Look for memory that runs out "
                "(dmesg names what the kernel killed), try fewer workers.envs_per_actor, or raise the limit. The run "
                "goes on from its last checkpoint when it is started again."
            )

    def blame(self, state: int) -> None:
        """Playing this initial state's episode, and no other, killed a simulator."""
        self._blame[state] += 1

    def quarantined(self, state: int) -> bool:
        return self._blame[state] >= self._quarantine_after
