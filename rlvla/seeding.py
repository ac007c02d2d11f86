"""Randomness is keyed, never consumed in arrival order.

Every draw belongs to a key such as (run seed, stream, iteration, episode, decision). So the number of
environments, the order in which simulators answer, a crash and a resume all give the same bits.
"""

from enum import IntEnum

import numpy as np
import torch
from jaxtyping import Float

from rlvla_envs.base import FIRST_TRAINING_STATE, LAST_TRAINING_STATE


class Stream(IntEnum):
    """What a draw is for. Two streams never share a key."""

    TRAINING_STATE = 1
    DEMONSTRATION = 2
    ROLLOUT = 3
    EVALUATION = 4
    MINIBATCH = 5
    SFT = 6
    VISION_LANGUAGE = 7
    BOOTSTRAP = 8
    REASONING = 9
    SERVED = 10


def keyed_rng(seed: int, stream: Stream, *key: int) -> np.random.Generator:
    """The generator of one key. Equal keys give equal draws, in any process."""
    return np.random.default_rng([seed, int(stream), *key])


def training_state(seed: int, *key: int) -> int:
    """An initial state to train on: a function of its key, never a held-back one. The first number of the key is
    the stream that asks, so that demonstrations and rollouts do not share states by accident."""
    return int(keyed_rng(seed, Stream.TRAINING_STATE, *key).integers(FIRST_TRAINING_STATE, LAST_TRAINING_STATE))


def seed_torch(seed: int) -> None:
    """For parameter initialisation, the one place that draws from torch's global generator."""
    torch.manual_seed(seed)


def normal(rng: np.random.Generator, *shape: int) -> Float[np.ndarray, "..."]:
    return rng.standard_normal(shape, dtype=np.float32)
