"""An update: decisions per second, and passes of VLM and expert counted, against the least that an update needs.

    .venv/bin/python scripts/bench/update.py [--policy qwen_vla_tiny] [--episodes 32] [--epochs 4] [--repeats 3]

Three loops over the same rollout of the toy, in turns: the update with the contexts that the rollout kept, the update
that encodes them again, and the least: in each epoch one pass of the expert over every decision, forth and back, with
nothing checked, measured or stepped. The weights after both updates are compared. The last line is JSON.
"""

import argparse
import copy
from typing import Any

import torch
from loops import ALGO, INSTRUCTIONS, Iteration, words_of
from measuring import Report, in_turns, over, parser, print_json, rates
from passes import Passes, counting
from untrained import untrained_policy

from rlvla.acting import one_thread
from rlvla.compose import compose
from rlvla.config import AlgoConfig
from rlvla.policies.base import Context
from rlvla.rounds import recall
from rlvla.workers import open_envs

SMOKE = ["--policy", "qwen_vla_toy", "--episodes", "4", "--epochs", "2", "--repeats", "1"]


def arguments_of() -> argparse.ArgumentParser:
    asked = parser(__doc__ or "")
    asked.add_argument("--policy", default="qwen_vla_tiny", help="a file of configs/policy")
    asked.add_argument("--episodes", type=int, default=32)
    asked.add_argument("--epochs", type=int, default=4)
    asked.add_argument("--repeats", type=int, default=3, help="after one that is not counted")
    return asked


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    report = Report("update", "updates from the same rollout of the toy, in turns; one thread", arguments)
    config = compose("train", words_of("toy", f"local:{arguments.episodes}", []))
    envs = open_envs(config.suite, config.workers)
    algo = AlgoConfig(**ALGO, epochs=arguments.epochs, minibatch_size=64)
    policy = untrained_policy(envs.spec, ["suite=toy", f"policy={arguments.policy}"], INSTRUCTIONS["toy"])
    with one_thread():
        kept, read = (
            Iteration(policy, algo, block=arguments.episodes).collect(envs, arguments.episodes, store_context=stored)
            for stored in (True, False)
        )
        envs.close()
        decisions = int(kept["valid"].sum())
        counts: dict[str, Passes] = {}
        weights: dict[str, list[Any]] = {}

        def update(name: str, rollout: Any) -> float:
            iteration = Iteration(policy, algo, block=arguments.episodes)
            with counting(iteration.policy) as counts[name]:
                iteration.update(rollout.copy())
            weights[name] = [parameter.detach() for parameter in iteration.policy.parameters()]
            return decisions * arguments.epochs

        def least() -> float:
            trained, rows = copy.deepcopy(policy), kept[kept["valid"]]
            trained.requires_grad_(False)
            trained.expert.requires_grad_(True)
            sampler = Iteration(policy, algo, block=1).sampler
            for _ in range(arguments.epochs):
                for batch in map(recall, rows.split(algo.minibatch_size)):
                    scored = sampler.score(trained, Context.from_tensordict(batch["context"]), batch)
                    scored.log_prob.sum().backward()
            return len(rows) * arguments.epochs

        loops = {"kept": lambda: update("kept", kept), "again": lambda: update("again", read), "least": least}
        turns = in_turns(loops, arguments.repeats)

    for name, label in (
        ("kept", "an update, contexts kept"),
        ("again", "an update, contexts encoded again"),
        ("least", "the expert's passes forth and back, nothing else"),
    ):
        report.row(label, "decisions and epochs/s", rates(turns[name]))
    epochs = decisions * arguments.epochs
    trained = counts["kept"].expert_training / epochs
    report.claim("passes of the expert with a gradient, per decision and epoch", [trained], exactly=1)
    report.claim("passes of the VLM in the update, contexts kept", [counts["kept"].vlm / decisions], exactly=0)
    report.claim("passes of the VLM per decision, encoded again", [counts["again"].vlm / decisions])
    measuring = counts["kept"].expert - counts["kept"].expert_training
    report.claim("passes of the expert without a gradient, per decision", [measuring / decisions])
    report.claim("an update, over the least", over(turns["kept"], turns["least"]))
    report.claim("contexts kept, over encoding again", over(turns["kept"], turns["again"]))
    change = largest_difference(weights["kept"], list(policy.parameters()))
    gap = largest_difference(weights["kept"], weights["again"])
    report.note(f"The largest change of a weight is {change:.1g}; both updates agree to {gap:.1g}.")
    report.note(
        "Passes without a gradient: the first minibatch is scored before the first step, to check that rollout and "
        "learner compute the same, and every decision after the last, to measure the exact KL."
    )
    report.note(f"{decisions} decisions, {arguments.epochs} epochs, minibatches of {algo.minibatch_size}.")
    return report.finish()


def largest_difference(ours: list[torch.Tensor], theirs: list[Any]) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    print_json(measure(arguments_of().parse_args()))
