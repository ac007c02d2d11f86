"""Deciding: decisions per second, against the network's passes alone and one plain forward of the same FLOPs.

    .venv/bin/python scripts/bench/policy_inference.py [--policy qwen_vla_tiny] [--size 64] [--rows 16] [--repeats 20]

A full block of observations of the toy, drawn at the size of the embedded default. "The passes alone" run the VLM once
and the expert N times on tensors that are there already; the plain forward is a stack of linear layers as wide as the
VLM, on as many tokens, with as many FLOPs as those passes (torch's FlopCounterMode). The last line is JSON.
"""

import argparse
from typing import Any

import numpy as np
import torch
from loops import ALGO, INSTRUCTIONS
from measuring import Report, in_turns, over, parser, print_json, rates
from passes import counting
from torch.utils.flop_counter import FlopCounterMode
from untrained import untrained_policy

from rlvla.acting import Actor, one_thread
from rlvla.compose import compose
from rlvla.config import AlgoConfig
from rlvla.samplers import training_sampler
from rlvla_envs.base import FIRST_TRAINING_STATE
from rlvla_envs.suites import make_env

SMOKE = ["--policy", "qwen_vla_toy", "--size", "32", "--rows", "4", "--repeats", "2"]


def arguments_of() -> argparse.ArgumentParser:
    asked = parser(__doc__ or "")
    asked.add_argument("--policy", default="qwen_vla_tiny", help="a file of configs/policy")
    asked.add_argument("--size", type=int, default=64, help="pixels")
    asked.add_argument("--rows", type=int, default=16, help="of a block")
    asked.add_argument("--repeats", type=int, default=20, help="after one that is not counted")
    return asked


@torch.no_grad()
def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    report = Report("policy_inference", "one block of observations, in turns; one thread", arguments)
    suite = compose("train", ["suite=toy", "policy=none", f"suite.image_size={arguments.size}"]).suite
    env = make_env(suite, arguments.rows)
    words = ["suite=toy", f"policy={arguments.policy}", f"suite.image_size={arguments.size}"]
    policy = untrained_policy(env.spec, words, INSTRUCTIONS["toy"])
    seen = env.reset(range(arguments.rows), [FIRST_TRAINING_STATE + i for i in range(arguments.rows)])
    actor = Actor(policy, block=arguments.rows, device="cpu")
    sampler = training_sampler(policy, AlgoConfig(**ALGO))
    batch, steps = policy.collate(seen), policy.num_denoising_steps
    sample = torch.zeros(arguments.rows, policy.horizon, policy.channels)

    def decide() -> float:
        rngs = [np.random.default_rng(i) for i in range(arguments.rows)]
        return len(actor.decide(seen, rngs, temperature=1.0, sampler=sampler).decision.action)

    def passes() -> float:
        context = policy.encode(batch)
        for step in range(steps):
            tau = torch.full((arguments.rows,), 1 - step / steps)
            policy.velocity(context, sample, tau, torch.full((arguments.rows,), step))
        return arguments.rows

    with one_thread():
        with FlopCounterMode(display=False) as counter:
            passes()
        flops = counter.get_total_flops()
        with counting(policy) as counted:
            decide()
        tokens, width = batch["input_ids"].numel(), policy.config.vlm.hidden_size
        layers = max(1, round(flops / (2 * tokens * width**2)))
        x, weight = torch.randn(tokens, width), torch.randn(width, width) / width**0.5

        def plain() -> float:
            y = x
            for _ in range(layers):
                y = y @ weight
            return arguments.rows

        turns = in_turns({"decide": decide, "passes": passes, "plain": plain}, arguments.repeats)
    env.close()

    report.row("a decision, from observation to actions", "decisions/s", rates(turns["decide"]))
    report.row(f"the passes alone: VLM once, expert {steps} times", "decisions/s", rates(turns["passes"]))
    report.row("one plain forward of the same FLOPs", "decisions/s", rates(turns["plain"]))
    report.claim("passes of the VLM per decision", [counted.vlm / arguments.rows], exactly=1)
    report.claim(
        "passes of the expert per decision and denoising step", [counted.expert / arguments.rows / steps], exactly=1
    )
    report.claim("deciding, over the passes alone", over(turns["decide"], turns["passes"]))
    report.claim("deciding, over a plain forward of the same FLOPs", over(turns["decide"], turns["plain"]))
    report.note(
        f"{1e-6 * flops / arguments.rows:.1f} MFLOP a decision; the plain forward is {layers} layers of {width} x "
        f"{width} on {tokens} tokens. What it does not have is attention, norms and the Python between small layers."
    )
    return report.finish()


if __name__ == "__main__":
    print_json(measure(arguments_of().parse_args()))
