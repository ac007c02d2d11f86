"""How often the scripted experts solve the WidowX tasks.

    .venv/bin/python scripts/simpler_experts.py [--tasks carrot_on_plate,move_away] [--states 24] [--training]

Enumerated configurations by default (at most ``--states`` of each task), states of training with ``--training``.
The last line is JSON: per task successes, trials, and mean length of what succeeded.
"""

import argparse
import json
import sys
import warnings

warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from rlvla_envs.base import FIRST_TRAINING_STATE, Demonstrator, SuiteConfig  # noqa: E402
from rlvla_envs.simpler_tasks import SUITE_TASKS  # noqa: E402
from rlvla_envs.suites import make_env  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="all", help="names joined with commas")
    parser.add_argument("--states", type=int, default=1000, help="episodes of each task at most")
    parser.add_argument("--training", action="store_true", help="jittered states of training")
    parser.add_argument("--seed", type=int, default=0, help="of the experts' noise")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.training and arguments.states == 1000:
        arguments.states = 24

    chosen = {(suite, task) for suite, tasks in SUITE_TASKS.items() for task in tasks}
    if arguments.tasks != "all":
        names = arguments.tasks.split(",")
        unknown = set(names) - {task for _, task in chosen}
        if unknown:
            sys.exit(f"no task {', '.join(sorted(unknown))}; tasks: {', '.join(task for _, task in sorted(chosen))}")
        chosen = {(suite, task) for suite, task in chosen if task in names}

    found: dict[str, dict[str, object]] = {}
    for suite, task in sorted(chosen):
        # The experts see poses; small pictures cost little.
        world = make_env(SuiteConfig(name=suite, task=task, image_size=16, max_episode_steps=120), 1)
        assert isinstance(world, Demonstrator)
        first = FIRST_TRAINING_STATE if arguments.training else 0
        count = arguments.states if arguments.training else min(arguments.states, world.spec.num_evaluation_states)
        lengths, failed, largest = [], [], np.zeros(world.spec.action_size)
        for state in range(first, first + count):
            episode = world.demonstrate(state, seed=arguments.seed * 10**6 + state)
            largest = np.maximum(largest, np.abs(episode.action).max(0))
            if episode.success:
                lengths.append(len(episode.action))
            else:
                failed.append(state)
        world.close()
        found[task] = {
            "successes": len(lengths),
            "trials": count,
            "mean_length": round(float(np.mean(lengths)), 1) if lengths else None,
            "failed": failed,
            "largest_action": largest.round(3).tolist(),
        }
        print(
            f"{task:20s}{len(lengths):4d} of {count:3d}, {found[task]['mean_length']} steps; failed {failed}",
            flush=True,
        )
    print(json.dumps({"training": arguments.training, "tasks": found}))


if __name__ == "__main__":
    main()
