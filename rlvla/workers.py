"""Where simulators live: in Ray actors (`rlvla.ray_envs`), or in this process.

Both kinds answer `Round`s: restart some slots, run a chunk in others, one round trip.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from jaxtyping import Float32, Int64

from rlvla.config import ClusterConfig, WorkerKind, WorkersConfig
from rlvla.hosts import Stopwatch, group_size, require_expert, versions_abroad
from rlvla.recovery import Incident
from rlvla_envs.base import ChunkResult, Demonstration, EnvSpec, Filmable, Observation, SuiteConfig
from rlvla_envs.suites import check_memory, check_suite, make_env, starts_slowly


@dataclass(frozen=True)
class Round:
    """What one round trip is to do: every slot appears at most once."""

    restart_slots: Int64[np.ndarray, " R"]
    restart_states: Int64[np.ndarray, " R"]
    chunk_slots: Int64[np.ndarray, " B"]
    chunk_actions: Float32[np.ndarray, "B H A"]


@dataclass(frozen=True)
class Reply:
    """What came of a `Round`: rows in the order asked, without those of slots that were lost."""

    first: Observation | None
    """First observations of the restarted slots."""
    result: ChunkResult | None
    lost: Mapping[int, bool] = field(default_factory=dict)
    """Slots whose episode ended with its simulator and could not be replayed; True where the episode itself is to
    blame: it has killed simulators repeatedly and must not be played again."""
    busy_s: float = 0.0
    """Seconds that the simulators worked, added up over workers."""
    render_s: float = 0.0
    """Those of them that went into pictures for the policy; 0 where the suite does not say."""


Finish = Callable[[], Reply]
"""Waits for a round that has begun."""


class Envs(Protocol):
    """A pool of slots, each one simulator."""

    spec: EnvSpec
    num_slots: int
    group_size: int
    """Slots restart together in groups of so many (`Grouped`); 1 almost everywhere."""
    slots_per_worker: int
    """Rounds in different workers run side by side: slot s lives in worker s // slots_per_worker."""
    versions: str
    """Of the interpreter that hosts the simulators, where that is another one; else empty."""

    def begin(self, todo: Round) -> Finish:
        """Send a round on its way. A worker that has one under way must not get another."""
        ...

    def advance(self, todo: Round) -> Reply:
        """Begin a round and wait for it."""
        ...

    def take_incidents(self) -> list[Incident]:
        """What has gone wrong and was mended since this was last asked."""
        ...

    def demonstrate(self, states: Sequence[int], seeds: Sequence[int]) -> list[Demonstration]:
        """Scripted expert episodes, at most `num_slots` at once."""
        ...

    def film(self, slot: int) -> np.ndarray | None:
        """A frame for people, or None where the suite draws none."""
        ...

    def close(self) -> None: ...


def open_envs(suite: SuiteConfig, workers: WorkersConfig, cluster: ClusterConfig | None = None) -> Envs:
    """Build the simulators of a run.

    Raises:
        ValueError: the suite is misconfigured.
        RuntimeError: the simulator cannot run here.
    """
    check_suite(suite)
    actors = workers.num_actors or os.cpu_count() or 1
    per_actor = workers.envs_per_actor
    if workers.kind is WorkerKind.local:
        check_memory(suite, actors * per_actor, 1)
        return LocalEnvs(suite, actors * per_actor)
    cluster = cluster or ClusterConfig()
    spare = wants_spare(suite, workers)
    if cluster.address is None:
        check_memory(suite, per_actor, actors, spare=workers.spare is True)
        if spare:
            try:
                check_memory(suite, per_actor, actors, spare=True)
            except ValueError:
                # Nobody asked for it.
                spare = False
    # Ray is imported where it is used, and only then.
    from rlvla.ray_envs import RayEnvs

    return RayEnvs(suite, workers, cluster, actors, spare=spare)


def wants_spare(suite: SuiteConfig, workers: WorkersConfig) -> bool:
    """Whether a pool is to keep a spare actor (`WorkersConfig.spare`), as far as memory allows."""
    if workers.spare is not None:
        return workers.spare
    return workers.kind is WorkerKind.ray and starts_slowly(suite)


class LocalEnvs:
    """Every slot in this process: for tests, debugging and suites that cost nothing."""

    def __init__(self, suite: SuiteConfig, num_slots: int) -> None:
        self._env = make_env(suite, num_slots)
        self.spec, self.num_slots, self.group_size = self._env.spec, num_slots, group_size(self._env)
        self.slots_per_worker = self.group_size
        self.versions = versions_abroad(self._env)

    def begin(self, todo: Round) -> Finish:
        return lambda: self.advance(todo)

    def take_incidents(self) -> list[Incident]:
        return []

    def advance(self, todo: Round) -> Reply:
        spent = Stopwatch(self._env)
        first = result = None
        if len(todo.restart_slots):
            first = self._env.reset(todo.restart_slots.tolist(), todo.restart_states.tolist())
        if len(todo.chunk_slots):
            result = self._env.step_chunk(todo.chunk_slots.tolist(), todo.chunk_actions)
        busy, render = spent.read().tolist()
        return Reply(first, result, busy_s=busy, render_s=render)

    def demonstrate(self, states: Sequence[int], seeds: Sequence[int]) -> list[Demonstration]:
        expert = require_expert(self._env)
        return [expert.demonstrate(state, seed) for state, seed in zip(states, seeds, strict=True)]

    def film(self, slot: int) -> np.ndarray | None:
        return self._env.film(slot) if isinstance(self._env, Filmable) else None

    def close(self) -> None:
        self._env.close()
