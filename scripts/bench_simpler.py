"""Rollout speed on the WidowX tasks: one picture a chunk at 224 px, against one a step at the paper's 640 x 480.

    .venv/bin/python scripts/bench_simpler.py [--task carrot_on_plate] [--chunk 8] [--chunks 40] [--processes 2]

Both loops run in the same processes, in turns, so that whatever else the machine does hits both; every process has one
simulator. Random small actions; episodes that end are restarted, and the time that takes counts. The last line is JSON:
``ratio`` is environment steps per second of the first loop over the second, over all processes together.
"""

import argparse
import json
import multiprocessing
import os
import queue
import sys
import time
import warnings
from multiprocessing.synchronize import Barrier
from typing import Any

warnings.filterwarnings("ignore")
os.environ.setdefault("LP_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402

from rlvla.run import versions  # noqa: E402
from rlvla_envs.base import FIRST_TRAINING_STATE, SuiteConfig, VecEnv  # noqa: E402
from rlvla_envs.simpler_assets import prepare_assets  # noqa: E402
from rlvla_envs.simpler_tasks import SUITE_TASKS, chosen_tasks  # noqa: E402
from rlvla_envs.suites import make_env  # noqa: E402

ROUNDS = 4


def measure(
    number: int, arguments: argparse.Namespace, together: Barrier, results: "multiprocessing.Queue[dict[str, float]]"
) -> None:
    """One process: both loops in turns, each begun together with the other processes."""
    import torch

    torch.set_num_threads(1)

    def world(**options: object) -> VecEnv:
        config = SuiteConfig(
            name=next(suite for suite, tasks in SUITE_TASKS.items() if arguments.task in tasks),
            task=arguments.task,
            image_size=arguments.size,
            chunk_size=arguments.chunk,
            max_episode_steps=120,
            options=options,
        )
        return make_env(config, 1)

    worlds = {
        "boundary": world(),
        "every_step": world(render_every_step=True, image_width=640, image_height=480),
    }
    rng = np.random.default_rng(number)
    spent = {f"{kind}_{what}": 0.0 for kind in worlds for what in ("steps", "wall_s", "cpu_s")}
    next_state = FIRST_TRAINING_STATE + 1000 * number
    for env in worlds.values():
        env.reset([0], [next_state])
    for repeat in range(-1, ROUNDS):  # the first round warms shaders and caches up
        for kind, env in worlds.items():
            count = 2 if repeat < 0 else arguments.chunks // (ROUNDS if kind == "boundary" else 2 * ROUNDS)
            together.wait()
            wall, cpu, steps = time.perf_counter(), time.process_time(), 0
            for _ in range(max(1, count)):
                actions = rng.uniform(-0.01, 0.01, (arguments.chunk, 7)).astype(np.float32)
                result = env.step_chunk([0], actions[None])
                steps += int(result.executed_steps[0])
                if result.done[0]:
                    next_state += 1
                    env.reset([0], [next_state])
            if repeat >= 0:
                spent[f"{kind}_steps"] += steps
                spent[f"{kind}_wall_s"] += time.perf_counter() - wall
                spent[f"{kind}_cpu_s"] += time.process_time() - cpu
    results.put(spent)


def _next(results: Any, processes: list[Any]) -> dict[str, float]:
    while True:
        try:
            found: dict[str, float] = results.get(timeout=5)
        except queue.Empty:
            if any(process.exitcode not in (None, 0) for process in processes):
                for process in processes:
                    process.terminate()
                sys.exit("a simulator process failed; its message is above.")
        else:
            return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="carrot_on_plate")
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--chunk", type=int, default=8, help="H")
    parser.add_argument("--chunks", type=int, default=40, help="of the first loop, in each process")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()

    suite = next(suite for suite, tasks in SUITE_TASKS.items() if arguments.task in tasks)
    # Missing assets show here, not in processes that wait for each other.
    prepare_assets(None, chosen_tasks(suite, arguments.task))
    spawn = multiprocessing.get_context("spawn")
    together, results = spawn.Barrier(arguments.processes), spawn.Queue()
    processes = [
        spawn.Process(target=measure, args=(i, arguments, together, results)) for i in range(arguments.processes)
    ]
    for process in processes:
        process.start()
    spent = [_next(results, processes) for _ in processes]
    for process in processes:
        process.join()

    kinds = {
        "boundary": f"{arguments.size} px, once a chunk (H = {arguments.chunk})",
        "every_step": "640 x 480, every step",
    }
    rate = {kind: sum(s[f"{kind}_steps"] / s[f"{kind}_wall_s"] for s in spent) for kind in kinds}
    # What the machine gives to others costs wall time and no CPU time.
    per_core = {kind: sum(s[f"{kind}_steps"] for s in spent) / sum(s[f"{kind}_cpu_s"] for s in spent) for kind in kinds}
    load = os.getloadavg()[0]
    print(f"{' '.join(sys.argv)}\n{versions()['cpu']}; {arguments.processes} processes, load {load:.1f}")
    print(f"{'loop':34s}{'steps/s':>10s}{'steps/s of one core':>22s}")
    for kind, label in kinds.items():
        print(f"{label:34s}{rate[kind]:10.1f}{per_core[kind]:22.1f}")
    print(
        json.dumps(
            {
                "task": arguments.task,
                "size": arguments.size,
                "chunk": arguments.chunk,
                "processes": arguments.processes,
                "load": round(load, 2),
                "ratio": round(rate["boundary"] / rate["every_step"], 2),
                **{f"{kind}_steps_per_s": round(value, 1) for kind, value in rate.items()},
                **{f"{kind}_steps_per_cpu_s": round(value, 1) for kind, value in per_core.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
