"""What an evaluation costs beside simulating and deciding: bookkeeping, logs, what goes over the wire to Ray's actors.

    .venv/bin/python scripts/bench_evaluation.py [--suite push_cube] [--trials 32] [--repeats 3]

An untrained policy on held-back states, with the episodes' log that makes it resumable. The last line is JSON: the
shares of time in which this process decided and in which it waited for simulators, and what is left: the overhead.
``wire`` is the part of the waiting in which no simulator worked: only a bound, as actors also wait for each other.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from untrained import untrained_policy

from rlvla.acting import Actor
from rlvla.clock import INFER, PHYSICS, RENDER, SIMULATORS, Clock
from rlvla.compose import compose
from rlvla.evaluate import evaluate
from rlvla.run import versions
from rlvla.trials import TrialLog
from rlvla.workers import Envs, open_envs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="push_cube", help="a file of configs/suite")
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3, help="after one that is not counted")
    arguments = parser.parse_args()
    config = compose("eval", [f"suite={arguments.suite}", "policy=none", f"eval.trials={arguments.trials}"])
    envs = open_envs(config.suite, config.workers)
    policy = untrained_policy(envs.spec, [f"suite={arguments.suite}"], "do what is asked")
    actor = Actor(policy, block=config.inference_batch, device="cpu")
    found = [measure(actor, envs, config) for _ in range(arguments.repeats + 1)][1:]
    workers = envs.num_slots // envs.slots_per_worker
    envs.close()
    for one in found:
        print({name: round(value, 3) for name, value in one.items()}, file=sys.stderr)

    def median(name: str) -> float:
        return statistics.median(one[name] / one["wall"] for one in found)

    print(
        json.dumps(
            {
                "cpu": versions()["cpu"],
                "suite": arguments.suite,
                "trials": arguments.trials,
                "workers": workers,
                "seconds": round(statistics.median(one["wall"] for one in found), 2),
                "infer": round(median(INFER), 3),
                "simulators": round(median(SIMULATORS), 3),
                "overhead": round(median("rest"), 3),
                "overhead_each": [round(one["rest"] / one["wall"], 3) for one in found],
                "wire": round(statistics.median(one["idle"] / one["wall"] for one in found), 3),
            }
        )
    )


def measure(actor: Actor, envs: Envs, config: Any) -> dict[str, float]:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, TrialLog(Path(folder) / "episodes.jsonl", {"of": "a bench"}) as log:
        started = time.perf_counter()
        evaluate(actor, envs, config.eval, name="bench", log=log, clock=clock)
        wall = time.perf_counter() - started
    spent = clock.seconds
    workers = envs.num_slots // envs.slots_per_worker
    busy = (spent[PHYSICS] + spent[RENDER]) / workers
    return {
        "wall": wall,
        INFER: spent[INFER],
        SIMULATORS: spent[SIMULATORS],
        "rest": wall - spent[INFER] - spent[SIMULATORS],
        "idle": max(0.0, spent[SIMULATORS] - busy),
    }


if __name__ == "__main__":
    main()
