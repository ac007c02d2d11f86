"""An evaluation: what it costs beside simulating and deciding, against the same rounds with nobody deciding.

    .venv/bin/python scripts/bench/evaluation.py [--suite push_cube] [--trials 32] [--repeats 3]

An untrained policy on held-back states, with the episodes' log that makes it resumable. The last line is JSON. ``wire``
is the part of the waiting in which no simulator worked: only a bound, as actors also wait for each other.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from loops import INSTRUCTIONS, Watched, again, on_a_suite, words_of
from measuring import Report, in_turns, over, parser, print_json, rates
from untrained import untrained_policy

from rlvla.acting import Actor
from rlvla.clock import INFER, PHYSICS, RENDER, SIMULATORS, Clock
from rlvla.compose import compose
from rlvla.evaluate import evaluate
from rlvla.trials import TrialLog
from rlvla.workers import open_envs

SMOKE = ["--suite", "toy", "--policy", "qwen_vla_toy", "--workers", "local:2", "--trials", "3", "--repeats", "2"]


def arguments_of() -> argparse.ArgumentParser:
    asked = on_a_suite(parser(__doc__ or ""))
    asked.add_argument("--trials", type=int, default=32)
    asked.add_argument("--repeats", type=int, default=3, help="after one that is not counted")
    return asked


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    report = Report("evaluation", "evaluations of an untrained policy, in turns with their rounds alone", arguments)
    words = words_of(arguments.suite, arguments.workers, [f"eval.trials={arguments.trials}"])
    config = compose("train", words)
    envs = open_envs(config.suite, config.workers, config.cluster)
    chosen = [f"suite={arguments.suite}", f"policy={arguments.policy}"]
    policy = untrained_policy(envs.spec, chosen, INSTRUCTIONS[arguments.suite])
    actor = Actor(policy, block=config.inference_batch, device="cpu")
    clocks: list[Clock] = []
    rounds: list[Any] = []

    def whole() -> float:
        watched, clock = Watched(envs), Clock()
        with (
            tempfile.TemporaryDirectory() as folder,
            TrialLog(Path(folder) / "episodes.jsonl", {"of": "a bench"}) as log,
        ):
            found, _ = evaluate(actor, watched, config.eval, name="bench", log=log, clock=clock)
        rounds[:] = watched.rounds
        clocks.append(clock)
        return sum(found.executed_steps)

    turns = in_turns({"evaluation": whole, "simulators": lambda: again(envs, rounds)}, arguments.repeats)
    workers = envs.num_slots // envs.slots_per_worker
    envs.close()

    report.row("an evaluation", "environment steps/s", rates(turns["evaluation"]))
    report.row("its rounds alone, nobody deciding", "environment steps/s", rates(turns["simulators"]))
    spent = [
        (turn.seconds, {name: clock.seconds.get(name, 0.0) for name in (INFER, SIMULATORS, PHYSICS, RENDER)})
        for turn, clock in zip(turns["evaluation"], clocks[-arguments.repeats :], strict=True)
    ]
    report.row("deciding", "share of the time", [s[INFER] / wall for wall, s in spent])
    report.row("waiting for simulators", "share of the time", [s[SIMULATORS] / wall for wall, s in spent])
    idle = [max(0.0, s[SIMULATORS] - (s[PHYSICS] + s[RENDER]) / workers) / wall for wall, s in spent]
    report.row("wire: of the waiting, with no simulator at work (a bound)", "share of the time", idle)
    overhead = [1 - (s[INFER] + s[SIMULATORS]) / wall for wall, s in spent]
    report.claim("overhead: neither deciding nor waiting, share of the time", overhead)
    report.claim("an evaluation, over its rounds alone", over(turns["evaluation"], turns["simulators"]))
    report.note(f"{arguments.trials} episodes, {workers} workers of {envs.slots_per_worker} environments.")
    return report.finish()


if __name__ == "__main__":
    print_json(measure(arguments_of().parse_args()))
