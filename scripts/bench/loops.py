"""Iterations and simulators for the benchmarks: an untrained policy's rollout, and the same rounds without it."""

import argparse
import copy
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict

from rlvla.acting import Actor
from rlvla.clock import Clock
from rlvla.config import AlgoConfig
from rlvla.learner import Learner
from rlvla.policies.base import ValueHead
from rlvla.rollout import collect
from rlvla.samplers import training_sampler
from rlvla.seeding import training_state
from rlvla.train import add_advantages
from rlvla.workers import Envs, Finish, Reply, Round
from rlvla_envs.base import Observation

INSTRUCTIONS = {"toy": "fly through the gap and reach the green goal", "push_cube": "push the blue cube"}


def on_a_suite(asked: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What `words_of` and an untrained policy take."""
    asked.add_argument("--suite", default="push_cube", help="a file of configs/suite")
    asked.add_argument("--policy", default="qwen_vla_tiny", help="a file of configs/policy")
    asked.add_argument("--workers", default="default", help="default, or local:SLOTS")
    return asked


def words_of(suite: str, workers: str, settings: Sequence[str]) -> list[str]:
    """Of `rlvla train`, for a suite on so many local slots ("local:8") or as the configuration has it ("default")."""
    kind, _, slots = workers.partition(":")
    local = ["workers.kind=local", "workers.num_actors=1", f"workers.envs_per_actor={slots}"]
    return [f"suite={suite}", "policy=none", "workers.spare=false", *(local if kind == "local" else []), *settings]


class Watched:
    """Simulators that note what they were asked, and what was seen behind each chunk."""

    def __init__(self, envs: Envs) -> None:
        self._envs = envs
        self.rounds: list[Round] = []
        self.behind: list[Observation] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._envs, name)

    def begin(self, todo: Round) -> Finish:
        self.rounds.append(todo)
        wait = self._envs.begin(todo)

        def finish() -> Reply:
            reply = wait()
            if reply.result is not None:
                self.behind.append(reply.result.observation)
            return reply

        return finish


def again(envs: Envs, rounds: Sequence[Round]) -> int:
    """Ask the simulators for the same once more, with nobody deciding; environment steps."""
    steps = 0
    for todo in rounds:
        result = envs.advance(todo).result
        steps += 0 if result is None else int(result.executed_steps.sum())
    return steps


class Iteration:
    """A rollout of an untrained policy, and the update from it; every one begins with the same weights."""

    def __init__(self, policy: Any, algo: AlgoConfig, *, block: int) -> None:
        self.policy, self.algo, self.block = copy.deepcopy(policy), algo, block
        torch.manual_seed(1)
        self.head = ValueHead(self.policy.value_size)
        self.sampler = training_sampler(self.policy, algo)
        self.learner = Learner(self.policy, self.head, algo, self.sampler, seed=0, total_iterations=1)
        self.actor = Actor(self.policy, block=block, device="cpu")

    def collect(self, envs: Any, episodes: int, *, store_context: bool, clock: Clock | None = None) -> TensorDict:
        return collect(
            self.actor,
            self.head,
            envs,
            [training_state(0, 9, i) for i in range(episodes)],
            sampler=self.sampler,
            key=(0, 0),
            store_context=store_context,
            value_final=False,
            clock=clock,
        )

    def update(self, rollout: TensorDict) -> dict[str, float]:
        add_advantages(rollout, self.algo)
        return self.learner.update(rollout, 0)


def steps_of(rollout: TensorDict) -> int:
    return int(rollout["next", "executed_steps"].sum())


ALGO = dict(critic_only_iterations=0, min_successes=0, bootstrap_time_limit=False, target_kl=100.0)
"""An update that always trains the policy, for all its epochs."""
