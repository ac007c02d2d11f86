"""Checkpoints: writing and reading one, against writing and reading as many bytes.

    .venv/bin/python scripts/bench/checkpoint.py [--policy qwen_vla_tiny] [--repeats 10]

A checkpoint has weights, both optimizers with their moments, a manifest of SHA-256 and is on the disk before it has its
name. The reference is one file with the same number of bytes, also synced to the disk. The last line is JSON.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from loops import ALGO, INSTRUCTIONS, Iteration, words_of
from measuring import ROOT, Report, in_turns, over, parser, print_json
from untrained import untrained_policy

from rlvla.checkpoints import Checkpoints, TrainState
from rlvla.compose import compose
from rlvla.config import AlgoConfig
from rlvla.policies.folder import load_weights, save_policy
from rlvla.workers import open_envs

SMOKE = ["--policy", "qwen_vla_toy", "--repeats", "2"]


def arguments_of() -> argparse.ArgumentParser:
    asked = parser(__doc__ or "")
    asked.add_argument("--policy", default="qwen_vla_tiny", help="a file of configs/policy")
    asked.add_argument("--folder", type=Path, help="whose disk is measured; runs/ of the repository where not given")
    asked.add_argument("--repeats", type=int, default=10, help="after one that is not counted")
    return asked


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    report = Report("checkpoint", "checkpoints of one run, in turns with plain files", arguments)
    config = compose("train", words_of("toy", "local:4", []))
    envs = open_envs(config.suite, config.workers)
    policy = untrained_policy(envs.spec, ["suite=toy", f"policy={arguments.policy}"], INSTRUCTIONS["toy"])
    iteration = Iteration(policy, AlgoConfig(**ALGO, epochs=1), block=4)
    # Adam has no moments before its first step.
    iteration.update(iteration.collect(envs, 4, store_context=True))
    envs.close()
    place = arguments.folder or ROOT / "runs"
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as made:
        folder = Path(made)
        checkpoints = Checkpoints(folder / "checkpoints", keep=1)
        count = 0

        def write(stage: Path) -> None:
            save_policy(iteration.policy, stage / "policy")
            torch.save(iteration.learner.state_dict(), stage / "learner.pt")

        def save() -> float:
            nonlocal count
            count += 1
            state = TrainState(
                iterations=count, env_steps=0, difficulty={}, unseen_evaluation=None, metrics_bytes=0, success=None
            )
            checkpoints.save(state, write)
            return 1

        def load() -> float:
            found = checkpoints.newest(lambda problem: None)
            assert found is not None
            load_weights(iteration.policy, found[0] / "policy" / "model.safetensors")
            state = torch.load(found[0] / "learner.pt", weights_only=True, map_location="cpu")
            iteration.learner.load_state_dict(state)
            return 1

        save()
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        content, plain = os.urandom(size), folder / "plain"

        def write_plain() -> float:
            with plain.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            return 1

        def read_plain() -> float:
            return float(len(plain.read_bytes()) == size)

        loops = {"save": save, "write": write_plain, "load": load, "read": read_plain}
        turns = in_turns(loops, arguments.repeats)

    for name, label in (
        ("save", f"a checkpoint of {1e-6 * size:.1f} MB written"),
        ("write", "as many bytes written and synced"),
        ("load", "the checkpoint checked and loaded"),
        ("read", "as many bytes read"),
    ):
        report.row(label, "ms", [1e3 * turn.seconds for turn in turns[name]])
    report.claim("time of writing, over plain bytes", over(turns["write"], turns["save"]))
    report.claim("time of reading, over plain bytes", over(turns["read"], turns["load"]))
    report.note("The bytes that are read were written a moment ago: they come from memory, not from the disk.")
    return report.finish()


if __name__ == "__main__":
    print_json(measure(arguments_of().parse_args()))
