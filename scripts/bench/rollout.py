"""A rollout: environment steps per second, and where its time goes, against the same rounds with nobody deciding.

    .venv/bin/python scripts/bench/rollout.py [--suite push_cube] [--episodes 32] [--repeats 5]

The last line is JSON. "Simulators alone" repeats the very rounds of the rollout, restarts and chunks, over the same
actors: what is left of the rollout is deciding and bookkeeping.
"""

import argparse
from typing import Any

from loops import ALGO, INSTRUCTIONS, Iteration, Watched, again, on_a_suite, steps_of, words_of
from measuring import Report, in_turns, over, parser, print_json, rates
from untrained import untrained_policy

from rlvla.clock import INFER, PHYSICS, RENDER, SIMULATORS, Clock
from rlvla.compose import compose
from rlvla.config import AlgoConfig
from rlvla.workers import open_envs

SMOKE = ["--suite", "toy", "--policy", "qwen_vla_toy", "--workers", "local:2", "--episodes", "3", "--repeats", "2"]


def arguments_of() -> argparse.ArgumentParser:
    asked = on_a_suite(parser(__doc__ or ""))
    asked.add_argument("--episodes", type=int, default=32)
    asked.add_argument("--repeats", type=int, default=5, help="after one that is not counted")
    return asked


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    report = Report("rollout", "rollouts of an untrained policy, in turns with their rounds alone", arguments)
    config = compose("train", words_of(arguments.suite, arguments.workers, []))
    envs = open_envs(config.suite, config.workers, config.cluster)
    words = [f"suite={arguments.suite}", f"policy={arguments.policy}"]
    policy = untrained_policy(envs.spec, words, INSTRUCTIONS[arguments.suite])
    rounds: list[Any] = []
    clocks: list[Clock] = []

    def whole() -> int:
        watched, clock = Watched(envs), Clock()
        iteration = Iteration(policy, AlgoConfig(**ALGO), block=config.inference_batch)
        rollout = iteration.collect(watched, arguments.episodes, store_context=True, clock=clock)
        rounds[:] = watched.rounds
        clocks.append(clock)
        return steps_of(rollout)

    turns = in_turns({"rollout": whole, "simulators": lambda: again(envs, rounds)}, arguments.repeats)
    workers = envs.num_slots // envs.slots_per_worker
    envs.close()

    report.row("a rollout", "environment steps/s", rates(turns["rollout"]))
    report.row("its rounds alone, nobody deciding", "environment steps/s", rates(turns["simulators"]))
    spent = [
        (turn.seconds, {name: clock.seconds.get(name, 0.0) for name in (INFER, SIMULATORS, PHYSICS, RENDER)})
        for turn, clock in zip(turns["rollout"], clocks[-arguments.repeats :], strict=True)
    ]
    report.row("deciding", "share of the time", [s[INFER] / wall for wall, s in spent])
    report.row("waiting for simulators", "share of the time", [s[SIMULATORS] / wall for wall, s in spent])
    report.row("bookkeeping: all the rest", "share of the time", [1 - (s[INFER] + s[SIMULATORS]) / w for w, s in spent])
    report.row("physics, mean of the actors", "share of the time", [s[PHYSICS] / workers / wall for wall, s in spent])
    report.row("rendering, mean of the actors", "share of the time", [s[RENDER] / workers / wall for wall, s in spent])
    report.claim("a rollout, over its rounds alone", over(turns["rollout"], turns["simulators"]))
    report.note(f"{workers} workers of {envs.slots_per_worker} environments, blocks of {config.inference_batch} rows.")
    return report.finish()


if __name__ == "__main__":
    print_json(measure(arguments_of().parse_args()))
