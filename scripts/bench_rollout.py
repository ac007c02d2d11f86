"""Rollout speed: rendering at chunk boundaries against rendering every step, and against physics alone.

    .venv/bin/python scripts/bench_rollout.py [--task PushCube-v1] [--size 128] [--chunk 16] [--chunks 30]

One simulator in this process, random small actions, the three loops interleaved so that whatever else the
machine does hits all of them. The last line is JSON:
``ratio`` is environment steps per second with chunk-boundary rendering over rendering every step;
``boundary_overhead`` is what a step costs on top of ManiSkill's own physics step, without the render itself.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable

warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from rlvla.run import versions  # noqa: E402
from rlvla_envs.base import FIRST_TRAINING_STATE, SuiteConfig  # noqa: E402
from rlvla_envs.suites import make_env  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="PushCube-v1")
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--chunk", type=int, default=16, help="H")
    parser.add_argument("--chunks", type=int, default=30, help="of each kind")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    def suite(**options: object) -> SuiteConfig:
        # No step limit in the way: every chunk runs in full.
        return SuiteConfig(
            name="maniskill",
            task=arguments.task,
            image_size=arguments.size,
            chunk_size=arguments.chunk,
            max_episode_steps=10**9,
            options=options,
        )

    boundary, every_step = make_env(suite(), 1), make_env(suite(render_every_step=True), 1)
    rng = np.random.default_rng(0)
    steps_run = {"boundary": 0, "every_step": 0, "physics": 0, "stepping": 0}
    seconds = dict.fromkeys(steps_run, 0.0)

    def timed(kind: str, work: Callable[[], int]) -> None:
        started = time.perf_counter()
        steps_run[kind] += work()
        seconds[kind] += time.perf_counter() - started

    def chunk_of(env: object) -> int:
        result = env.step_chunk([0], actions[None])  # type: ignore[attr-defined]
        if result.done[0]:
            env.reset([0], [FIRST_TRAINING_STATE])  # type: ignore[attr-defined]
        return int(result.executed_steps[0])

    simulator = boundary._envs[0]  # type: ignore[attr-defined]
    observe = boundary._observe  # type: ignore[attr-defined]

    def physics_alone() -> int:
        for action in actions:
            simulator._step_action(action)
        return len(actions)

    def without_render() -> int:
        boundary._observe = lambda slot, *, blank=False: observe(slot, blank=True)  # type: ignore[attr-defined]
        try:
            return chunk_of(boundary)
        finally:
            boundary._observe = observe  # type: ignore[attr-defined]

    for env in (boundary, every_step):
        env.reset([0], [FIRST_TRAINING_STATE])
    for repeat in range(arguments.chunks + 2):
        if repeat == 2:  # the first two warm caches and shaders up
            steps_run, seconds = dict.fromkeys(steps_run, 0), dict.fromkeys(seconds, 0.0)
        actions = rng.uniform(-0.1, 0.1, (arguments.chunk, 7)).astype(np.float32)
        timed("boundary", lambda: chunk_of(boundary))
        timed("every_step", lambda: chunk_of(every_step))
        timed("physics", physics_alone)
        timed("stepping", without_render)

    rate = {kind: steps_run[kind] / seconds[kind] for kind in steps_run}
    print(f"{' '.join(sys.argv)}\n{versions()['cpu']}; one process, LP_NUM_THREADS=1")
    print(f"{'loop':34s}{'steps/s':>10s}")
    for kind, label in (
        ("boundary", f"render once a chunk (H = {arguments.chunk})"),
        ("every_step", "render every step"),
        ("stepping", "the chunk loop without its render"),
        ("physics", "ManiSkill physics alone"),
    ):
        print(f"{label:34s}{rate[kind]:10.1f}")
    print(
        json.dumps(
            {
                "task": arguments.task,
                "size": arguments.size,
                "chunk": arguments.chunk,
                "ratio": round(rate["boundary"] / rate["every_step"], 2),
                "boundary_overhead": round(rate["physics"] / rate["stepping"] - 1, 3),
                **{f"{kind}_steps_per_s": round(value, 1) for kind, value in rate.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
