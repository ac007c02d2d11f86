"""What stored contexts save: PPO with a frozen backbone, with each decision's context kept, and encoding again.

    .venv/bin/python scripts/bench_context.py [--policy qwen_vla_tiny] [--episodes 32] [--epochs 4]

The same rollout on the toy, learnt from twice by learners with equal weights. The last line on stdout is JSON: rows
that went through the VLM in rollout and update together, seconds of the two updates, their ratios, how far a weight
moved at most, and the largest difference between the weights that came out of the two.
"""

import argparse
import copy
import json
import sys
import time
from typing import Any

import torch
from tensordict import TensorDict
from untrained import untrained_policy

from rlvla.acting import Actor
from rlvla.compose import compose
from rlvla.config import AlgoConfig
from rlvla.learner import Learner
from rlvla.policies.base import ValueHead
from rlvla.rollout import collect
from rlvla.run import versions
from rlvla.samplers import training_sampler
from rlvla.seeding import training_state
from rlvla.train import add_advantages
from rlvla.workers import Envs, open_envs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="qwen_vla_tiny", help="a file of configs/policy")
    parser.add_argument("--episodes", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = ["workers.kind=local", "workers.num_actors=1", f"workers.envs_per_actor={arguments.episodes}"]
    config = compose("train", ["policy=none", "suite=toy", *sizes])
    envs = open_envs(config.suite, config.workers)
    algo = AlgoConfig(
        epochs=arguments.epochs, target_kl=10.0, critic_only_iterations=0, min_successes=0, minibatch_size=64
    )
    policy = untrained_policy(envs.spec, ["suite=toy", f"policy={arguments.policy}"], "reach the green goal")
    found = {
        kind: learn(policy, algo, envs, arguments.episodes, store_context=kind == "stored")
        for kind in ("stored", "encoded_again")
    }
    envs.close()
    stored, again = found["stored"], found["encoded_again"]
    for kind, one in found.items():
        print(f"{kind}: {one['vlm_rows']} rows through the VLM, update {one['update_s']:.2f} s", file=sys.stderr)
    result = {
        "cpu": versions()["cpu"],
        "policy": arguments.policy,
        "decisions": stored["decisions"],
        "epochs": arguments.epochs,
        "vlm_rows_stored": stored["vlm_rows"],
        "vlm_rows_encoded_again": again["vlm_rows"],
        "vlm_rows_ratio": round(again["vlm_rows"] / stored["vlm_rows"], 2),
        "update_s_stored": round(stored["update_s"], 2),
        "update_s_encoded_again": round(again["update_s"], 2),
        "update_speedup": round(again["update_s"] / stored["update_s"], 2),
        "largest_weight_change": largest_difference(stored["weights"], list(policy.parameters())),
        "largest_weight_difference": largest_difference(stored["weights"], again["weights"]),
    }
    print(json.dumps(result))


def largest_difference(ours: list[torch.Tensor], theirs: list[Any]) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True))


def learn(start: Any, algo: AlgoConfig, envs: Envs, episodes: int, *, store_context: bool) -> dict[str, Any]:
    """One iteration from a copy of ``start``."""
    policy = copy.deepcopy(start)
    rows = 0

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal rows
        rows += len(kwargs["input_ids"])

    policy.vlm.register_forward_pre_hook(count, with_kwargs=True)
    torch.manual_seed(1)
    head = ValueHead(policy.value_size)
    sampler = training_sampler(policy, algo)
    learner = Learner(policy, head, algo, sampler, seed=0, total_iterations=1)
    rollout: TensorDict = collect(
        Actor(policy, block=episodes, device="cpu"),
        head,
        envs,
        [training_state(0, 9, i) for i in range(episodes)],
        sampler=sampler,
        key=(0, 0),
        store_context=store_context,
        value_final=False,
    )
    add_advantages(rollout, algo)
    decisions = int(rollout["valid"].sum())
    started = time.perf_counter()
    learner.update(rollout, 0)
    seconds = time.perf_counter() - started
    weights = [p.detach().clone() for p in policy.parameters()]
    return {"vlm_rows": rows, "update_s": seconds, "weights": weights, "decisions": decisions}


if __name__ == "__main__":
    main()
