"""The way of an image from the simulator to the minibatch: bytes copied per image, place by place, against the least.

    .venv/bin/python scripts/bench/data_path.py [--slots 8] [--episodes 32] [--epochs 2]

The toy in this process and in two Ray actors, with a policy that reads its images again in every epoch: where contexts
are kept (the default, while the VLM is frozen) no image goes further than the first pass. Two copies are the least: one
out of the simulator into what is kept, one into the minibatch. The last line is JSON.
"""

import argparse
from collections import Counter
from typing import Any

import numpy as np
from image_copies import Followed, FollowedEnv, counting_copies
from loops import ALGO, INSTRUCTIONS, Iteration, words_of
from measuring import Report, one_thread, parser, print_json
from untrained import untrained_policy

from rlvla.compose import compose
from rlvla.config import AlgoConfig
from rlvla.workers import LocalEnvs, open_envs

SMOKE = ["--slots", "4", "--episodes", "6", "--epochs", "1", "--routes", "local"]
ROUTES = {"local": "in this process", "ray": "over Ray"}


def arguments_of() -> argparse.ArgumentParser:
    asked = parser(__doc__ or "")
    asked.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES))
    asked.add_argument("--slots", type=int, default=8)
    asked.add_argument("--episodes", type=int, default=32)
    asked.add_argument("--epochs", type=int, default=2)
    return asked


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    report = Report("data_path", "copies of images, counted by following them; nothing is timed", arguments)
    for route in arguments.routes:
        with one_thread():
            copies, epoch, images = count(route, arguments.slots, arguments.episodes, arguments.epochs)
        for place, amount in copies.items():
            report.row(f"{ROUTES[route]}: {place}", "copies of an image", [amount / images])
        collected = sum(copies.values()) / images
        report.claim(f"copies until the rollout is whole, {ROUTES[route]}", [collected])
        report.claim(f"copies of an image in an epoch, {ROUTES[route]}", [epoch / images])
        report.claim(f"from simulator to minibatch, {ROUTES[route]}", [collected + epoch / images], most=2)
    report.note(
        "Counted from the array that the world hands out. ManiSkill's has been copied once before, out of the "
        "renderer's buffer, which the next picture overwrites."
    )
    return report.finish()


def count(route: str, slots: int, episodes: int, epochs: int) -> tuple[Counter[str], float, int]:
    """Bytes by place until the learner has the rollout, bytes of one epoch, and bytes of the images decided on."""
    envs = followed(route, slots)
    policy = untrained_policy(envs.spec, ["suite=toy", "policy=qwen_vla_toy"], INSTRUCTIONS["toy"])
    algo = AlgoConfig(**ALGO, epochs=epochs, minibatch_size=16)
    iteration = Iteration(policy, algo, block=slots)
    with counting_copies() as copies:
        rollout = iteration.collect(envs, episodes, store_context=False)
    envs.close()
    if route == "ray":
        copies = Counter({"Ray: into the reply that crosses processes": images_of(rollout)}) + copies
    with counting_copies() as learnt:
        iteration.update(rollout)
    epoch = Counter({place: amount for place, amount in learnt.items() if place.endswith("_minibatches")})
    return copies + (learnt - epoch), epoch.total() / epochs, images_of(rollout)


def images_of(rollout: Any) -> int:
    images = rollout["batch", "images"]
    return int(rollout["valid"].sum()) * images[0, 0].nbytes


def followed(route: str, slots: int) -> Any:
    """Simulators of the toy whose pictures are followed from where they reach this process."""
    config = compose("train", words_of("toy", f"local:{slots}", []))
    if route == "local":
        envs: Any = open_envs(config.suite, config.workers)
        assert isinstance(envs, LocalEnvs)
        envs._env = FollowedEnv(envs._env)
        return envs
    from rlvla.ray_envs import RayEnvs

    class FollowedRayEnvs(RayEnvs):
        def _answer(self, call: Any) -> Any:
            reply = super()._answer(call)
            if not isinstance(reply, dict):
                return reply
            return {
                name: value.view(Followed) if "images/" in name and isinstance(value, np.ndarray) else value
                for name, value in reply.items()
            }

    config.workers.envs_per_actor = slots // 2
    return FollowedRayEnvs(config.suite, config.workers, config.cluster, 2)


if __name__ == "__main__":
    print_json(measure(arguments_of().parse_args()))
