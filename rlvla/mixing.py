"""Which task each training episode is of, in a suite that mixes several (Qwen-VLA, section 4.2: non-uniform
allocation, proportional to task difficulty)."""

from collections.abc import Mapping, Sequence

import numpy as np

from rlvla.config import ConfigError, TaskMix, TrainConfig
from rlvla.seeding import Stream, training_state
from rlvla_envs.base import FIRST_TRAINING_STATE, EnvSpec

MIN_DIFFICULTY = 0.1
"""Of a task that always succeeds: it is kept in the mix, or it would be forgotten."""


def check_weights(config: TrainConfig, spec: EnvSpec) -> None:
    """Raise ConfigError where ``task_weights`` does not fit the suite's tasks."""
    weights, names = config.task_weights, spec.task_names()
    unknown = sorted(set(weights) - set(names))
    if unknown:
        raise ConfigError(f"task_weights has {', '.join(unknown)}; the tasks of {spec.suite} are {', '.join(names)}.")
    if weights and not any(weights.values()):
        raise ConfigError("task_weights are all 0; at least one task must be trained on.")


def task_weights(config: TrainConfig, names: Sequence[str], success: Mapping[str, float]) -> dict[str, float]:
    """The weight of each task, summing to 1.

    Args:
        success: of the last evaluation, by task.
    """
    if config.task_weights:
        raw = {name: config.task_weights.get(name, 0.0) for name in names}
    elif config.task_mix is TaskMix.difficulty:
        raw = {name: max(MIN_DIFFICULTY, 1 - success[name]) for name in names}
    else:
        raw = dict.fromkeys(names, 1.0)
    total = sum(raw.values())
    return {name: weight / total for name, weight in raw.items()}


def allocate(weights: Sequence[float], episodes: int) -> list[int]:
    """How many of ``episodes`` each task gets: proportional, whole, and summing to ``episodes``.

    Largest remainders get what rounding down leaves; equal remainders the earlier task.
    """
    exact = np.asarray(weights, dtype=np.float64) * episodes / sum(weights)
    counts = np.floor(exact + 1e-9).astype(int)
    order = np.argsort(-(exact - counts), kind="stable")
    counts[order[: episodes - counts.sum()]] += 1
    return [int(count) for count in counts]


def training_states(
    spec: EnvSpec, weights: Mapping[str, float], episodes: int, *, seed: int, iteration: int
) -> list[int]:
    """The initial states of an iteration, tasks spread evenly over it so that no simulator meets them in a lump."""
    counts = allocate([weights[name] for name in spec.task_names()], episodes)
    # Each task's episodes stand at equal distances; ties go to the earlier task.
    places = [((i + 0.5) / count, task) for task, count in enumerate(counts) for i in range(count)]
    return [
        state_of_task(training_state(seed, Stream.ROLLOUT, iteration, episode), task, len(counts))
        for episode, (_, task) in enumerate(sorted(places))
    ]


def state_of_task(state: int, task: int, num_tasks: int) -> int:
    """The nearest training state not above ``state`` that belongs to a task (`EnvSpec.task_of`)."""
    lowered = state - (state - task) % num_tasks
    return lowered if lowered >= FIRST_TRAINING_STATE else lowered + num_tasks
