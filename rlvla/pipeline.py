"""Where an iteration's data comes from: collected when asked for, or while the iteration before is learnt from."""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict

from rlvla.acting import Actor
from rlvla.clock import Clock
from rlvla.config import Schedule, TrainConfig
from rlvla.policies.base import ValueHead, context_is_fixed
from rlvla.policies.policy import Policy
from rlvla.ranks import Group, share
from rlvla.rollout import collect
from rlvla.samplers import Sampler
from rlvla.workers import Envs

STATE_FILE = "pipeline.pt"


@dataclass
class Collector:
    """Collects iterations with the policy as it is: schedules sync and pingpong."""

    config: TrainConfig
    group: Group
    policy: Policy
    value_head: ValueHead
    envs: Envs
    sampler: Sampler
    actor: Actor
    on_episodes: Callable[[int], None]
    store_inputs: bool = False
    """For a teacher (`rlvla.teachers.ActionTeacher.reads_contexts`)."""
    clock: Clock = field(default_factory=Clock)
    """Of the rollout that was taken last."""

    def take(self, iteration: int, states: Callable[[int], Sequence[int]]) -> TensorDict:
        """This rank's part of an iteration's rollout (`rlvla.rollout.collect`), with ``version`` [E, T]: how many
        updates had been made to the weights that decided.

        Args:
            states: the initial states of an iteration.
        """
        rollout, self.clock = self._collect(
            self.actor, self.value_head, iteration, states(iteration), version=iteration
        )
        return rollout

    def drain(self) -> None:
        """Wait until the simulators are free for something else."""

    def save(self, folder: Path) -> None:
        """Write what a resumed run needs to collect the same data."""

    def load(self, folder: Path) -> None: ...

    def close(self) -> None: ...

    def _collect(
        self, actor: Actor, value_head: ValueHead, iteration: int, states: Sequence[int], version: int
    ) -> tuple[TensorDict, Clock]:
        config, clock = self.config, Clock()
        first, count = share(len(states), self.group)
        with self.group.together():
            rollout = collect(
                actor,
                value_head,
                self.envs,
                states[first : first + count],
                sampler=self.sampler,
                key=(config.seed, iteration),
                store_context=context_is_fixed(actor.policy, config.algo.train_vlm, config.algo.freeze),
                store_inputs=self.store_inputs,
                value_final=config.algo.bootstrap_time_limit and config.algo.has_critic,
                first_episode=first,
                num_groups=2 if config.schedule is Schedule.pingpong else 1,
                on_episodes=self.on_episodes,
                clock=clock,
            )
        rollout["version"] = torch.full(rollout.batch_size, version, device=rollout.device)
        return rollout, clock


class _StoppedError(Exception):
    """The run is over; nobody waits for this rollout."""


@dataclass
class OneStepOff(Collector):
    """Collects the next iteration in a thread with a copy of the weights, while the caller learns from this one.

    Iteration k > 0 is decided by the weights before update k - 1, always: which weights they are does not depend on
    who is faster, so that the bits are those of any other run.
    """

    def __post_init__(self) -> None:
        self._behaviour, self._critic = copy.deepcopy(self.policy), copy.deepcopy(self.value_head)
        for module in (self._behaviour, self._critic):
            module.requires_grad_(False)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollout")
        self._pending: Future[tuple[TensorDict, Clock]] | None = None
        self._made: dict[str, Any] = {}
        self._resumed: dict[str, Any] | None = None
        self._stop = False
        # The display belongs to the caller's thread; the other one only looks whether it is still wanted.
        self.on_episodes = self._check_wanted

    def take(self, iteration: int, states: Callable[[int], Sequence[int]]) -> TensorDict:
        if self._pending is None:
            if self._resumed is None:
                self._submit(iteration, states(iteration), version=iteration)
            else:
                self._behaviour.load_state_dict(self._resumed["policy"])
                self._critic.load_state_dict(self._resumed["value_head"])
                self._start(self._resumed)
                self._resumed = None
        assert self._pending is not None
        rollout, self.clock = self._pending.result()
        self._pending = None
        if iteration + 1 < self.config.iterations:
            self._submit(iteration + 1, states(iteration + 1), version=iteration)
        return rollout

    def drain(self) -> None:
        if self._pending is not None:
            self._pending.exception()

    def save(self, folder: Path) -> None:
        if self._pending is not None:
            torch.save(self._made, folder / STATE_FILE)

    def load(self, folder: Path) -> None:
        path = folder / STATE_FILE
        if path.exists():
            self._resumed = torch.load(path, weights_only=True, map_location="cpu")

    def close(self) -> None:
        self._stop = True
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _submit(self, iteration: int, states: Sequence[int], version: int) -> None:
        """The thread is idle: its weights may be replaced."""
        self._behaviour.load_state_dict(self.policy.state_dict())
        self._critic.load_state_dict(self.value_head.state_dict())
        self._start({"iteration": iteration, "states": list(states), "version": version})

    def _start(self, made: dict[str, Any]) -> None:
        # Nobody writes to the copies while the thread runs, so these references are what it decides by.
        weights = {"policy": self._behaviour.state_dict(), "value_head": self._critic.state_dict()}
        self._made = made | weights
        actor = Actor(self._behaviour, block=self.actor.block, device=self.actor.device)
        self._pending = self._thread.submit(
            self._collect, actor, self._critic, made["iteration"], made["states"], made["version"]
        )

    def _check_wanted(self, _: int) -> None:
        if self._stop:
            raise _StoppedError


def make_collector(
    config: TrainConfig,
    group: Group,
    policy: Policy,
    value_head: ValueHead,
    envs: Envs,
    sampler: Sampler,
    actor: Actor,
    on_episodes: Callable[[int], None],
    store_inputs: bool = False,
) -> Collector:
    kind = OneStepOff if config.schedule is Schedule["async"] else Collector
    return kind(config, group, policy, value_head, envs, sampler, actor, on_episodes, store_inputs)


def drop_stale(rollout: TensorDict, iteration: int, max_staleness: int) -> int:
    """Take decisions whose weights are more than ``max_staleness`` updates old out of ``valid``; how many they are."""
    stale = (iteration - rollout["version"] > max_staleness) & rollout["valid"]
    rollout["valid"] = rollout["valid"] & ~stale
    rollout["mask"] = rollout["mask"] & rollout["valid"][..., None, None]
    return int(stale.sum())
