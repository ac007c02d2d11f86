"""How often LIBERO's scripted experts succeed, task by task, on training states; nothing is drawn.

    .venv/bin/python scripts/bench_libero_experts.py [--suites libero_object libero_spatial] [--episodes 5]

Runs itself again in the interpreter that `rlvla suites setup libero` made. The last line is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = {"libero_object": 280, "libero_spatial": 220}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--episodes", type=int, default=5)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        count(arguments.suites, arguments.episodes)
        return
    from rlvla_envs.base import SuiteConfig
    from rlvla_envs.suites import interpreter_of

    python = interpreter_of(SuiteConfig(name=arguments.suites[0], task="all")) or sys.executable
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "envs"), "MUJOCO_GL": "osmesa", "OMP_NUM_THREADS": "1"}
    sys.exit(subprocess.run([python, __file__, "--inside", *sys.argv[1:]], env=environment, check=False).returncode)


def count(suites: list[str], episodes: int) -> None:
    import numpy as np

    from rlvla_envs.libero_experts import make_expert
    from rlvla_envs.libero_tasks import chosen_tasks
    from rlvla_envs.libero_world import World

    found: dict[str, dict[str, int]] = {}
    for suite in suites:
        found[suite] = {}
        for task in chosen_tasks(suite, "all"):
            world = World(task, 64)
            successes = 0
            for episode in range(episodes):
                # Beyond the held-back states.
                seed = 1_000_000 + episode
                world.start_drawn(seed)
                expert = make_expert(suite, task, world, np.random.default_rng(seed))
                successes += any(world.step(np.clip(expert.act(), -1, 1), draw=False)[0] for _ in range(STEPS[suite]))
            world.close()
            found[suite][task.name] = successes
            print(f"{suite} {task.name}: {successes} of {episodes}", file=sys.stderr, flush=True)
    print(json.dumps({"episodes": episodes, "successes": found}))


if __name__ == "__main__":
    main()
