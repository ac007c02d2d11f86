"""Stepping a chunk: rendering at its end, against rendering every step, and against physics alone plus one frame.

    .venv/bin/python scripts/bench/chunk_stepping.py [--task PushCube-v1] [--size 128] [--chunk 16] [--repeats 30]

One ManiSkill simulator of each kind in this process, small random actions, one chunk of each loop in turns. The last
line is JSON.
"""

import argparse
from typing import Any

import numpy as np
from measuring import Report, in_turns, over, parser, print_json, rates

from rlvla.acting import one_thread
from rlvla_envs.base import FIRST_TRAINING_STATE, SuiteConfig
from rlvla_envs.suites import make_env

SMOKE = ["--size", "32", "--chunk", "2", "--repeats", "2"]


def arguments_of() -> argparse.ArgumentParser:
    asked = parser(__doc__ or "")
    asked.add_argument("--task", default="PushCube-v1")
    asked.add_argument("--size", type=int, default=128, help="pixels")
    asked.add_argument("--chunk", type=int, default=16, help="H")
    asked.add_argument("--repeats", type=int, default=30, help="chunks of each loop, after two that are not counted")
    return asked


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    report = Report("chunk_stepping", "one simulator, one process; a chunk of each loop in turns", arguments)
    # Whatever the script of a task calls a success must not end a chunk: small actions reach none in this time.
    config: dict[str, Any] = {"name": "maniskill", "task": arguments.task, "image_size": arguments.size}
    config |= {"chunk_size": arguments.chunk, "max_episode_steps": 10**9}
    boundary: Any = make_env(SuiteConfig(**config), 1)
    every_step: Any = make_env(SuiteConfig(**config, options={"render_every_step": True}), 1)
    simulator, draw_picture = boundary._envs[0], boundary._draw
    actions = np.zeros((arguments.chunk, 7), dtype=np.float32)

    def draw(repeat: int) -> None:
        actions[:] = np.random.default_rng(repeat).uniform(-0.1, 0.1, actions.shape)

    def chunk_of(env: Any) -> int:
        result = env.step_chunk([0], actions[None])
        if result.done[0]:
            env.reset([0], [FIRST_TRAINING_STATE])
        return int(result.executed_steps[0])

    def physics() -> int:
        for action in actions:
            simulator._step_action(action)
        return len(actions)

    def physics_and_frame() -> int:
        steps = physics()
        simulator._get_obs_sensor_data()
        return steps

    def without_render() -> int:
        boundary._draw = lambda slot, images: None
        try:
            return chunk_of(boundary)
        finally:
            boundary._draw = draw_picture

    for env in (boundary, every_step):
        env.reset([0], [FIRST_TRAINING_STATE])
    loops = {
        "boundary": lambda: chunk_of(boundary),
        "physics_and_frame": physics_and_frame,
        "every_step": lambda: chunk_of(every_step),
        "stepping": without_render,
        "physics": physics,
    }
    with one_thread():
        turns = in_turns(loops, arguments.repeats, warm_up=2, before=draw)
    boundary.close()
    every_step.close()

    for name, label in (
        ("boundary", f"a chunk of {arguments.chunk}, rendered at its end"),
        ("every_step", "the same, rendered after every step"),
        ("stepping", "the same, not rendered"),
        ("physics_and_frame", "ManiSkill's physics alone, and one frame"),
        ("physics", "ManiSkill's physics alone"),
    ):
        report.row(label, "environment steps/s", rates(turns[name]))
    at_target = arguments.size == 128 and arguments.chunk == 16
    report.claim(
        "rendered at the end, over every step",
        over(turns["boundary"], turns["every_step"]),
        least=6 * at_target or None,
    )
    report.claim(
        "time of a chunk, over physics alone plus one frame",
        over(turns["physics_and_frame"], turns["boundary"]),
        most=1.15 if at_target else None,
    )
    report.claim("time of stepping, over physics alone", over(turns["physics"], turns["stepping"]))
    return report.finish()


if __name__ == "__main__":
    print_json(measure(arguments_of().parse_args()))
