"""A training iteration of the embedded default against a naive loop that does the same work; the last line is JSON.

    .venv/bin/python scripts/bench_end_to_end.py [--episodes 16] [--repeats 3]

PushCube over Ray as `make train` has it. The naive loop plays the same episodes with the same policy, and renders after
every action as ManiSkill's own step does, values the observation behind every chunk with a pass of its own, and reads
each image again in every minibatch of the update. What both learn from is compared: outcomes, steps, actions.
Repeats are interleaved, so that whatever else the machine does hits both; the first of either is not counted.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from typing import Any

import torch
from tensordict import TensorDict
from untrained import untrained_policy

from rlvla.acting import Actor
from rlvla.clock import INFER, PHYSICS, RENDER, SIMULATORS, Clock
from rlvla.compose import compose
from rlvla.config import TrainConfig
from rlvla.learner import Learner
from rlvla.policies.base import ValueHead
from rlvla.rollout import collect
from rlvla.run import versions
from rlvla.samplers import training_sampler
from rlvla.seeding import training_state
from rlvla.train import add_advantages
from rlvla.workers import Envs, Finish, Reply, Round, open_envs
from rlvla_envs.base import Observation

ALGO = [
    "algo.critic_only_iterations=0",
    "algo.min_successes=0",
    "algo.bootstrap_time_limit=false",
    "algo.target_kl=100",
]
KINDS = ("rlvla", "naive")


class Watched:
    """Simulators, and the observations that they gave behind each chunk."""

    def __init__(self, envs: Envs) -> None:
        self._envs = envs
        self.behind: list[Observation] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._envs, name)

    def begin(self, todo: Round) -> Finish:
        wait = self._envs.begin(todo)

        def finish() -> Reply:
            reply = wait()
            if reply.result is not None:
                self.behind.append(reply.result.observation)
            return reply

        return finish


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=16, help="of an iteration")
    parser.add_argument("--repeats", type=int, default=3, help="of each kind, after one that is not counted")
    arguments = parser.parse_args()
    words = ["suite=push_cube", "policy=none", "workers.spare=false", *ALGO]
    configs = {
        "rlvla": compose("train", words),
        "naive": compose("train", [*words, "suite.options.render_every_step=true"]),
    }
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    policy: Any = None
    for repeat in range(arguments.repeats + 1):
        for kind in KINDS:
            # Built anew: two pools at once would share the cores.
            envs = open_envs(configs[kind].suite, configs[kind].workers, configs[kind].cluster)
            policy = policy or untrained_policy(envs.spec, ["suite=push_cube"], "push the blue cube")
            one = iterate(copy.deepcopy(policy), configs[kind], envs, arguments.episodes, naive=kind == "naive")
            envs.close()
            print(
                f"{kind} {repeat}: {one['seconds']:.1f} s, {one['steps'] / one['seconds']:.0f} steps/s", file=sys.stderr
            )
            if repeat:
                found[kind].append(one)
    ours, theirs = found["rlvla"], found["naive"]
    rates = {kind: [one["steps"] / one["seconds"] for one in ones] for kind, ones in found.items()}
    medians = {kind: statistics.median(values) for kind, values in rates.items()}
    print(
        json.dumps(
            {
                "cpu": versions()["cpu"],
                "episodes": arguments.episodes,
                "steps": ours[0]["steps"],
                "same_episodes": all(a["episodes"] == b["episodes"] for a, b in zip(ours, theirs, strict=True)),
                "steps_per_s": {kind: round(value, 1) for kind, value in medians.items()},
                "steps_per_s_each": {kind: [round(value, 1) for value in values] for kind, values in rates.items()},
                "ratio": round(medians["rlvla"] / medians["naive"], 2),
                "seconds": {kind: parts(ones) for kind, ones in found.items()},
            }
        )
    )


def parts(ones: list[dict[str, Any]]) -> dict[str, float]:
    """Median seconds of each part."""
    return {name: round(statistics.median(one["parts"].get(name, 0.0) for one in ones), 2) for name in ones[0]["parts"]}


def iterate(policy: Any, config: TrainConfig, envs: Envs, episodes: int, *, naive: bool) -> dict[str, Any]:
    """One rollout and one update."""
    torch.manual_seed(1)
    head = ValueHead(policy.value_size)
    sampler = training_sampler(policy, config.algo)
    learner = Learner(policy, head, config.algo, sampler, seed=0, total_iterations=1)
    actor = Actor(policy, block=config.inference_batch, device="cpu")
    watched, clock = Watched(envs), Clock()
    started = time.perf_counter()
    rollout: TensorDict = collect(
        actor,
        head,
        watched,
        [training_state(0, 9, i) for i in range(episodes)],
        sampler=sampler,
        key=(0, 0),
        store_context=not naive,
        value_final=False,
        clock=clock,
    )
    played = time.perf_counter()
    if naive:
        for observation in watched.behind:
            actor.encode(observation)
    valued = time.perf_counter()
    steps, outcomes = rollout["next", "executed_steps"].sum(dim=1), rollout["next", "success"].any(dim=1)
    add_advantages(rollout, config.algo)
    learner.update(rollout, 0)
    seconds = time.perf_counter() - started
    known = {name: clock.seconds.get(name, 0.0) for name in (INFER, SIMULATORS, PHYSICS, RENDER)}
    return {
        "seconds": seconds,
        "steps": int(steps.sum()),
        "episodes": [steps.tolist(), outcomes.tolist()],
        "parts": {
            **known,
            "rollout": played - started,
            "values behind": valued - played,
            "update": seconds - (valued - started),
        },
    }


if __name__ == "__main__":
    main()
