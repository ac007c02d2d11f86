"""A training iteration of the embedded default against a naive loop that does the same work; the last line is JSON.

    .venv/bin/python scripts/bench/end_to_end.py [--episodes 16] [--repeats 3]

PushCube over Ray as `make train` has it. The naive loop plays the same episodes with the same policy, and renders after
every action as ManiSkill's own step does, values the observation behind every chunk with a pass of its own, and reads
each image again in every minibatch of the update. What both learn from is compared: outcomes, steps.
"""

import argparse
import statistics
from typing import Any

from loops import ALGO, INSTRUCTIONS, Iteration, Watched, on_a_suite, steps_of, words_of
from measuring import Report, in_turns, over, parser, print_json, rates
from untrained import untrained_policy

from rlvla.clock import INFER, PHYSICS, RENDER, SIMULATORS, Clock
from rlvla.compose import compose
from rlvla.workers import Envs, open_envs

SMOKE = ["--suite", "toy", "--policy", "qwen_vla_toy", "--workers", "local:4", "--episodes", "4", "--repeats", "1"]
KINDS = {"rlvla": "an iteration as rlvla makes it", "naive": "the naive loop"}


def arguments_of() -> argparse.ArgumentParser:
    asked = on_a_suite(parser(__doc__ or ""))
    asked.add_argument("--episodes", type=int, default=16, help="of an iteration")
    asked.add_argument("--epochs", type=int, help="of the update; the configuration's where not given")
    asked.add_argument("--repeats", type=int, default=3, help="of each kind, after one that is not counted")
    return asked


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    report = Report("end_to_end", "whole iterations, rollout and update, in turns with the naive loop", arguments)
    settings = [f"algo.{name}={str(value).lower()}" for name, value in ALGO.items()]
    settings += [f"algo.epochs={arguments.epochs}"] if arguments.epochs else []
    words = words_of(arguments.suite, arguments.workers, settings)
    # The toy draws after chunks only: there the naive loop has no more to render.
    renders = [] if arguments.suite == "toy" else ["suite.options.render_every_step=true"]
    configs = {"rlvla": compose("train", words), "naive": compose("train", [*words, *renders])}
    # Both pools at once: one that is not asked waits, and takes no core from the other.
    pools: dict[str, Envs] = {
        kind: open_envs(config.suite, config.workers, config.cluster) for kind, config in configs.items()
    }
    chosen = [f"suite={arguments.suite}", f"policy={arguments.policy}"]
    policy = untrained_policy(pools["rlvla"].spec, chosen, INSTRUCTIONS[arguments.suite])
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}

    def loop(kind: str) -> float:
        found[kind].append(one := iterate(policy, configs[kind], pools[kind], arguments.episodes, kind == "naive"))
        return float(one["steps"])

    turns = in_turns({kind: lambda kind=kind: loop(kind) for kind in KINDS}, arguments.repeats)
    for pool in pools.values():
        pool.close()

    for kind, label in KINDS.items():
        report.row(label, "environment steps/s", rates(turns[kind]))
    for kind, label in KINDS.items():
        for part in ("rollout", "values behind", "update"):
            seconds = [one["parts"][part] for one in found[kind][-arguments.repeats :]]
            if any(seconds):
                report.row(f"{label}: {part}", "s", seconds)
    target = 3.0 if arguments.suite == "push_cube" else None
    report.claim("environment steps/s, over the naive loop", over(turns["rlvla"], turns["naive"]), least=target)
    same = all(a["episodes"] == b["episodes"] for a, b in zip(found["rlvla"], found["naive"], strict=True))
    report.claim("both played the same episodes", [float(same)], exactly=1)
    report.note(
        f"{arguments.episodes} episodes, {found['rlvla'][0]['steps']} steps an iteration, "
        f"{configs['rlvla'].algo.epochs} epochs, minibatches of {configs['rlvla'].algo.minibatch_size}."
    )
    median = {
        name: statistics.median(one["parts"][name] for one in found["rlvla"][-arguments.repeats :])
        for name in (INFER, SIMULATORS, PHYSICS, RENDER)
    }
    split = ", ".join(f"{name} {seconds:.2f}" for name, seconds in median.items())
    report.note(f"Seconds of rlvla's rollout: {split} (physics and render are added up over the actors).")
    return report.finish()


def iterate(policy: Any, config: Any, envs: Envs, episodes: int, naive: bool) -> dict[str, Any]:
    """One rollout and one update, from the same weights each time."""
    iteration = Iteration(policy, config.algo, block=config.inference_batch)
    watched, clock, whole = Watched(envs), Clock(), Clock()
    with whole.span("rollout"):
        rollout = iteration.collect(watched, episodes, store_context=not naive, clock=clock)
    with whole.span("values behind"):
        for observation in watched.behind if naive else []:
            iteration.actor.encode(observation)
    steps, outcomes = rollout["next", "executed_steps"].sum(dim=1), rollout["next", "success"].any(dim=1)
    total = steps_of(rollout)
    with whole.span("update"):
        iteration.update(rollout)
    known = {name: clock.seconds.get(name, 0.0) for name in (INFER, SIMULATORS, PHYSICS, RENDER)}
    return {
        "steps": total,
        "episodes": [steps.tolist(), outcomes.tolist()],
        "parts": {**known, **{name: whole.seconds[name] for name in ("rollout", "update")}}
        | {"values behind": whole.seconds["values behind"] if naive else 0.0},
    }


if __name__ == "__main__":
    print_json(measure(arguments_of().parse_args()))
