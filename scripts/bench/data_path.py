"""The way of an image from the simulator to the minibatch: bytes copied per image, place by place, against the least.

    .venv/bin/python scripts/bench/data_path.py [--slots 8] [--episodes 32] [--epochs 2]

The toy in this process and in two Ray actors, with a policy that reads its images again in every epoch: where contexts
are kept (the default, while the VLM is frozen) no image goes further than the first pass. Episodes are equally long, so
that all slots go in step, or end anywhere, so that slots that restart sit beside others. Two copies are the least over
Ray: across processes into what is kept, and into the minibatch; in one process what the simulator hands out is kept.
Where rows of several observations are decided together they are stacked for that pass alone, which is counted beside
the way. The last line is JSON.
"""

import argparse
import time
from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from image_copies import Followed, FollowedEnv, counting_copies
from loops import ALGO, INSTRUCTIONS, Iteration, words_of
from measuring import Report, parser, print_json
from untrained import untrained_policy

from rlvla.acting import one_thread
from rlvla.compose import compose
from rlvla.config import AlgoConfig
from rlvla.rounds import recall
from rlvla.sheets import Sheet, Sheets
from rlvla.workers import Finish, LocalEnvs, Round, open_envs

SMOKE = ["--slots", "4", "--episodes", "6", "--epochs", "1", "--routes", "local"]
ROUTES = {"local": "in this process", "ray": "over Ray"}
TARGET = 2
LENGTHS = {"equal": "episodes in step", "unequal": "episodes of any length"}


def arguments_of() -> argparse.ArgumentParser:
    asked = parser(__doc__ or "")
    asked.add_argument("--routes", nargs="+", choices=list(ROUTES), default=list(ROUTES))
    asked.add_argument("--slots", type=int, default=8)
    asked.add_argument("--episodes", type=int, default=32)
    asked.add_argument("--epochs", type=int, default=2)
    return asked


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    report = Report("data_path", "copies of images, counted by following them; nothing is timed", arguments)
    for route in arguments.routes:
        for lengths in LENGTHS:
            with one_thread():
                found = count(route, lengths, arguments.slots, arguments.episodes, arguments.epochs)
            where = f"{ROUTES[route]}, {LENGTHS[lengths]}"
            for place, copies in found.places.items():
                report.row(f"{where}: {place}", "copies of an image", [copies])
            report.row(f"{where}: once an epoch, into a minibatch", "copies of an image", [found.epoch])
            report.row(f"{where}: beside the way, rows put together to decide", "copies of an image", [found.stacking])
            report.row(f"{where}: beside the way, to fill up blocks", "copies of an image", [found.filling])
            report.row(f"{where}: beside the epochs (first check, final KL)", "copies of an image", [found.beside])
            to_minibatch = sum(found.places.values()) + found.epoch
            report.claim(f"copies from simulator to minibatch, {where}", [to_minibatch], most=TARGET)
    report.note(
        "Counted from the array that the toy draws in. ManiSkill and SimplerEnv draw in a buffer that the next picture "
        "overwrites: in this process a picture is copied out of it into what is kept. Over Ray it is copied out of it "
        "into the memory that is shared, which is the same one copy."
    )
    report.note(f"What one copy costs: {1e6 * seconds_of_a_copy():.1f} us for an image of 64 pixels.")
    return report.finish()


class Found(NamedTuple):
    """Copies per image."""

    places: dict[str, float]
    """On the way to what minibatches are taken from."""
    epoch: float
    stacking: float
    """Rows of several observations, for the pass that decides alone; where what is kept is such a copy it is on the
    way."""
    filling: float
    """Rows of blocks that are not full, for the pass alone."""
    beside: float
    """By passes of the learner that are no epoch."""


def count(route: str, lengths: str, slots: int, episodes: int, epochs: int) -> Found:
    envs = Wandering(followed(route, slots), wander=lengths == "unequal")
    policy = untrained_policy(envs.spec, ["suite=toy", "policy=qwen_vla_toy"], INSTRUCTIONS["toy"])
    algo = AlgoConfig(**ALGO, epochs=epochs, minibatch_size=16)
    iteration = Iteration(policy, algo, block=slots)
    with counting_copies() as copies:
        rollout = iteration.collect(envs, episodes, store_context=False)
    envs.close()
    images = images_of(rollout)
    if route == "ray":
        copies = Counter({"by the simulator's process, into memory that is shared": images}) + copies
    kept_in_place = bool(rollout["rounds"]._pictures)
    stacking = copies.pop("rlvla/policies/prompted.py: collate", 0) if kept_in_place else 0
    filling = copies.pop("rlvla/acting.py: _filled", 0)
    with counting_copies() as learnt:
        iteration.update(rollout)
    epoch = learnt.pop("rlvla/learner.py: _descend")
    places = {place: amount / images for place, amount in copies.items()}
    return Found(places, epoch / epochs / images, stacking / images, filling / images, learnt.total() / images)


class FollowedSheets(Sheets):
    """Sheets whose pictures are followed from where another process has written them."""

    def take(self, rows: int) -> Sheet:
        sheet = super().take(rows)
        return sheet._replace(images={name: image.view(Followed) for name, image in sheet.images.items()})


class Wandering:
    """Simulators that do what was decided, or fly towards the toy's wall at random speeds and end at it anywhere."""

    def __init__(self, envs: Any, *, wander: bool) -> None:
        self._envs, self._wander, self._rng = envs, wander, np.random.default_rng(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._envs, name)

    def begin(self, todo: Round) -> Finish:
        if self._wander:
            speed = self._rng.uniform(0.2, 1, (len(todo.chunk_actions), 1, 1))
            todo = replace(todo, chunk_actions=np.broadcast_to(speed, todo.chunk_actions.shape).astype(np.float32))
        finish: Finish = self._envs.begin(todo)
        return finish


def seconds_of_a_copy() -> float:
    image, repeats = np.zeros((64, 64, 3), dtype=np.uint8), 1000
    began = time.perf_counter()
    for _ in range(repeats):
        image.copy()
    return (time.perf_counter() - began) / repeats


def images_of(rollout: Any) -> int:
    return int(rollout["valid"].sum()) * recall(rollout[0, :1])["batch", "images"].nbytes


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
            if isinstance(reply, dict) and any("images/" in name for name in reply):
                raise RuntimeError("a reply carries pictures: the simulators do not reach this process's memory.")
            return reply

    config.workers.envs_per_actor = slots // 2
    followed_envs = FollowedRayEnvs(config.suite, config.workers, config.cluster, 2)
    followed_envs._sheets = FollowedSheets(followed_envs.spec.cameras, slots)
    return followed_envs


if __name__ == "__main__":
    print_json(measure(arguments_of().parse_args()))
