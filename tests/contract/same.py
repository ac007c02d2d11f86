"""When two observations are one."""

import numpy as np

from rlvla_envs.base import Observation


def assert_equal(a: Observation, b: Observation) -> None:
    """Equal to the bit, words, state and pictures."""
    assert a.images.keys() == b.images.keys()
    for name in a.images:
        assert np.array_equal(a.images[name], b.images[name])
    assert a.instruction == b.instruction
    assert (a.state is None) == (b.state is None)
    if a.state is not None and b.state is not None:
        assert np.array_equal(a.state, b.state)
