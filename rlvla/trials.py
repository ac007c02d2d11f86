"""The episodes an evaluation is made of, and their log: a measurement that was stopped goes on where it was.

Every episode's outcome depends on weights, state and noise seed alone, so those that ended before a crash need no
second visit. Each is written down the moment it ends; the log is the evaluation until its result file stands.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from rlvla.config import EvalConfig
from rlvla.policies.numerics import in_file_precision
from rlvla_envs.base import EnvSpec


@dataclass(frozen=True)
class Trial:
    """One episode of an evaluation."""

    state: int
    """Held-back initial state."""
    task: int
    """Into `EnvSpec.task_names()`."""
    noise_seed: int
    """0 for ``eval.seed``, 1 for the one after it, and so on."""


@dataclass(frozen=True)
class Outcome:
    """How an episode ended."""

    success: int
    steps: int
    metrics: Mapping[str, float]
    """What else the suite measured, at the episode's end."""
    killed_simulator: bool = False
    """The episode never ended: it killed its simulator whenever it was played."""


def plan_trials(spec: EnvSpec, config: EvalConfig) -> list[Trial]:
    """Every enumerated state once, then again with the next noise seed, until each task has ``trials`` of them or its
    states were visited ``noise_seeds`` times."""
    states = evaluation_states(spec, config.trials)
    tasks = [spec.task_of(state) for state in states]
    visits = {task: min(config.noise_seeds, math.ceil(config.trials / tasks.count(task))) for task in set(tasks)}
    return [
        Trial(state, task, seed)
        for seed in range(config.noise_seeds)
        for state, task in zip(states, tasks, strict=True)
        if seed < visits[task]
    ]


def evaluation_states(spec: EnvSpec, trials: int) -> list[int]:
    """``trials`` enumerated states of each task, or all it has.

    Where a suite enumerates tasks the choice is spread evenly over each one's list, whose neighbours are alike;
    elsewhere states are independent draws and the first ones will do.
    """
    if not spec.tasks:
        return list(range(min(trials, spec.num_evaluation_states)))
    counts = spec.evaluation_states_per_task
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [
        start + i * count // min(trials, count)
        for start, count in zip(starts, counts, strict=True)
        for i in range(min(trials, count))
    ]


def weights_digest(policy: torch.nn.Module) -> str:
    """SHA-256 of a policy's tensors, by name: which policy a log belongs to."""
    digest = hashlib.sha256()
    for name, tensor in sorted(in_file_precision(policy, policy.state_dict()).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class TrialLog:
    """One line of JSON for each episode that has ended, after a line that says what was measured."""

    def __init__(self, path: Path, setting: Mapping[str, Any]) -> None:
        """Open a log, or begin one where there is none for this ``setting``.

        A last line that a crash cut short is dropped: its episode is played again.
        """
        self.path = path
        self.outcomes: dict[int, Outcome] = {}
        header = json.dumps(setting, sort_keys=True)
        lines = path.read_text().split("\n") if path.exists() else []
        kept = [header]
        # What follows the last line end was cut short; a log of another measurement is begun anew.
        for line in lines[1:-1] if lines and lines[0] == header else []:
            # A line that was spoilt is an episode that is played again.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                self.outcomes[row["episode"]] = Outcome(
                    row["success"], row["steps"], row["metrics"], row.get("killed_simulator", False)
                )
                kept.append(line)
        path.parent.mkdir(parents=True, exist_ok=True)
        stage = path.with_suffix(".partial")
        stage.write_text("\n".join(kept) + "\n")
        os.replace(stage, path)
        self._file = path.open("a", buffering=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, episode: int, outcome: Outcome) -> None:
        self.outcomes[episode] = outcome
        row = {
            "episode": episode,
            "success": outcome.success,
            "steps": outcome.steps,
            "metrics": dict(outcome.metrics),
            **({"killed_simulator": True} if outcome.killed_simulator else {}),
        }
        self._file.write(json.dumps(row) + "\n")
