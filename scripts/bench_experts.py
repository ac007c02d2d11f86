"""How often the scripted experts of LIBERO and Meta-World succeed, task by task, on training states; nothing is drawn.

    .venv/bin/python scripts/bench_experts.py --suites libero_object libero_spatial [--episodes 5]
    .venv/bin/python scripts/bench_experts.py --suites metaworld_mt10 [--tasks all] [--episodes 3]

Runs itself again in the interpreter that `rlvla suites setup` made for the suites, which must be the same for all.
Prints a Markdown table; the last line is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", default=["libero_object", "libero_spatial"])
    parser.add_argument("--tasks", default="all", help="as suite.task")
    parser.add_argument("--episodes", type=int, default=5)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        count(arguments.suites, arguments.tasks, arguments.episodes)
        return
    from rlvla_envs.base import SuiteConfig
    from rlvla_envs.suites import interpreter_of

    python = interpreter_of(SuiteConfig(name=arguments.suites[0], task="all")) or sys.executable
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "envs"), "MUJOCO_GL": "osmesa", "OMP_NUM_THREADS": "1"}
    sys.exit(subprocess.run([python, __file__, "--inside", *sys.argv[1:]], env=environment, check=False).returncode)


def libero(suite: str, choice: str) -> Iterator[tuple[str, int, Any, Callable[..., Any]]]:
    from rlvla_envs.libero_experts import make_expert
    from rlvla_envs.libero_tasks import STEP_LIMITS, chosen_tasks
    from rlvla_envs.libero_world import World

    for task in chosen_tasks(suite, choice):
        world = World(task, 64)
        yield task.name, STEP_LIMITS[suite], world, lambda rng, t=task, w=world: make_expert(suite, t, w, rng)


def metaworld(suite: str, choice: str) -> Iterator[tuple[str, int, Any, Callable[..., Any]]]:
    from rlvla_envs.metaworld_experts import Expert
    from rlvla_envs.metaworld_tasks import STEP_LIMIT, chosen_tasks
    from rlvla_envs.metaworld_world import World

    for task in chosen_tasks(suite, choice):
        world = World(task, 16, "corner2")
        yield task, STEP_LIMIT, world, lambda rng, t=task, w=world: Expert(t, w, rng)


def count(suites: list[str], choice: str, episodes: int) -> None:
    import numpy as np

    found: dict[str, dict[str, int]] = {}
    lengths: dict[str, list[int]] = {}
    for suite in suites:
        found[suite] = {}
        for name, limit, world, make_expert in (libero if suite.startswith("libero") else metaworld)(suite, choice):
            lengths[name] = []
            for episode in range(episodes):
                # Beyond the held-back states.
                seed = 1_000_000 + episode
                world.start_drawn(seed)
                expert = make_expert(np.random.default_rng(seed))
                steps = (s for s in range(1, limit + 1) if world.step(np.clip(expert.act(), -1, 1), draw=False)[0])
                if (solved := next(steps, None)) is not None:
                    lengths[name].append(solved)
            world.close()
            found[suite][name] = len(lengths[name])
            print(f"{suite} {name}: {len(lengths[name])} of {episodes}", file=sys.stderr, flush=True)
    print("| task | successes | steps of a success, mean |\n|---|---|---|")
    for tasks in found.values():
        for name, successes in tasks.items():
            mean = f"{np.mean(lengths[name]):.0f}" if lengths[name] else ""
            print(f"| {name} | {successes} of {episodes} | {mean} |")
    print(json.dumps({"episodes": episodes, "successes": found}))


if __name__ == "__main__":
    main()
