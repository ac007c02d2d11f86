"""Meta-World's own scripted policies as experts: they know where things are, and are made to vary here."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float

    from rlvla_envs.metaworld_world import World

NOISE = 0.1
"""Standard deviation added to each axis of the translation: 1 mm."""


class Expert:
    """The benchmark's policy for a task, looking at the world before every action.

    Its policies are proportional controllers without a memory, so they correct what the noise does. They are not
    slowed down: they close and lift by distances that hold at full speed only, and a slower hand drops the basketball.
    """

    def __init__(self, task: str, world: World, rng: np.random.Generator) -> None:
        from metaworld.policies import ENV_POLICY_MAP

        self._policy: Any = ENV_POLICY_MAP[task]()
        self._world, self._rng = world, rng

    def act(self) -> Float[np.ndarray, "4"]:
        """The next action, not yet clipped."""
        with warnings.catch_warnings():
            # That it asks for more than the largest action, which it does by design.
            warnings.simplefilter("ignore")
            wanted = np.asarray(self._policy.get_action(self._world.seen), dtype=np.float64)
        move = np.clip(wanted[:3], -1.0, 1.0) + self._rng.normal(0, NOISE, 3)
        return np.array([*move, wanted[3]])
