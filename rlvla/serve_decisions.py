"""Decisions for clients that do not know of each other: those that wait at one moment share a pass of the policy."""

import asyncio
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rlvla.acting import Actor
from rlvla.seeding import Stream, keyed_rng
from rlvla_envs.base import Observation


class Key(NamedTuple):
    """Of one decision's noise."""

    stream: Stream
    episode: int
    decision: int


class Decided(NamedTuple):
    actions: np.ndarray
    """[H, C] in env units, inside the declared range."""
    seconds: float
    """That the policy took, for all rows of the pass."""


@dataclass(frozen=True)
class _Job:
    observation: Observation
    key: Key
    done: asyncio.Future[Decided]


class Decider:
    """Runs a policy in one thread of its own, at most ``actor.block`` waiting rows at a time, in the order they came.

    An answer depends on the observation and the key of its noise alone, not on who else waited: `Actor` sees to it.
    """

    def __init__(self, actor: Actor, *, seed: int, temperature: float) -> None:
        self._actor, self._seed, self._temperature = actor, seed, temperature
        spec = actor.policy.env_spec
        # A world clips its own copy of an action; whoever is behind the wire may not.
        self._low = np.array([c.low for c in spec.action for _ in range(c.size)], dtype=np.float32)
        self._high = np.array([c.high for c in spec.action for _ in range(c.size)], dtype=np.float32)
        self._waiting: asyncio.Queue[_Job] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")

    async def decide(self, rows: Sequence[tuple[Observation, Key]]) -> list[Decided]:
        """One chunk for each row, which is an observation [1] and the key of its noise.

        Raises:
            ValueError: the policy cannot read an observation; the message is for who sent it.
            RuntimeError: the policy failed.
        """
        loop = asyncio.get_running_loop()
        jobs = [_Job(observation, key, loop.create_future()) for observation, key in rows]
        for job in jobs:
            self._waiting.put_nowait(job)
        try:
            return list(await asyncio.gather(*(job.done for job in jobs)))
        finally:
            # Of a client that left, or whose other row failed: nobody needs the rest.
            for job in jobs:
                job.done.cancel()

    async def run(self) -> None:
        """Answer, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            jobs = [await self._waiting.get()]
            while len(jobs) < self._actor.block and not self._waiting.empty():
                jobs.append(self._waiting.get_nowait())
            jobs = [job for job in jobs if not job.done.done()]
            outcomes = await loop.run_in_executor(self._thread, self._each, jobs) if jobs else []
            for job, outcome in zip(jobs, outcomes, strict=True):
                if job.done.done():
                    continue
                if isinstance(outcome, Exception):
                    job.done.set_exception(outcome)
                else:
                    job.done.set_result(outcome)

    def close(self) -> None:
        """Wait for the pass that is under way."""
        self._thread.shutdown()

    def _each(self, jobs: Sequence[_Job]) -> list[Decided | Exception]:
        """The outcome of every job; one that cannot be decided does not spoil the others'."""
        try:
            return list(self._together(jobs))
        except Exception as error:
            if len(jobs) > 1:
                return [outcome for job in jobs for outcome in self._each([job])]
            if isinstance(error, ValueError | RuntimeError):
                return [error]
            # The client is told that it broke; how it broke is for who runs the server.
            traceback.print_exc()
            return [
                RuntimeError(f"{type(error).__name__} in the policy; this is a bug in rlvla. The server has the rest.")
            ]

    def _together(self, jobs: Sequence[_Job]) -> list[Decided]:
        begun = time.monotonic()
        rngs = [keyed_rng(self._seed, job.key.stream, job.key.episode, job.key.decision) for job in jobs]
        observation = Observation.concatenate([job.observation for job in jobs])
        chunks = self._actor.decide(observation, rngs, temperature=self._temperature).decision.action
        seconds = time.monotonic() - begun
        return [Decided(np.clip(chunk, self._low, self._high), seconds) for chunk in chunks]
