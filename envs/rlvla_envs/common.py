"""What suites share, whatever simulates them. Needs numpy alone, so that it runs in a suite's own interpreter."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from rlvla_envs.base import Demonstration, Observation, SuiteConfig, VecEnv

if TYPE_CHECKING:
    from jaxtyping import Float


def check_options(config: SuiteConfig, known: set[str]) -> None:
    """Raise ValueError for an option the suite does not have, with the nearest one."""
    unknown = set(config.options) - known
    if unknown:
        close = difflib.get_close_matches(min(unknown), known, n=1)
        raise ValueError(
            f"suite.options has {', '.join(sorted(unknown))}, which {config.name} does not know."
            + (f" Did you mean {close[0]!r}?" if close else "")
            + f" Options: {', '.join(sorted(known))}."
        )


def record_expert(
    env: VecEnv,
    first: Observation,
    act: Callable[[], np.ndarray],
    low: Float[np.ndarray, " A"] | float,
    high: Float[np.ndarray, " A"] | float,
) -> Demonstration:
    """Play an expert in slot 0 to the end of the episode that ``first`` began, looking before every action."""
    frames, actions = [first], []
    while True:
        action = np.clip(act(), low, high).astype(np.float32)
        actions.append(action)
        result = env.step_chunk([0], action[None, None])
        if result.done[0]:
            break
        frames.append(result.observation)
    episode = Observation.concatenate(frames)
    return Demonstration(
        episode.images, episode.state, np.stack(actions), episode.instruction[0], bool(result.success[0])
    )
