"""Keyed randomness: equal keys give equal draws anywhere, other keys give others, and states never meet."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlvla.seeding import Stream, keyed_rng, normal, seed_torch, training_state
from rlvla_envs.base import FIRST_TRAINING_STATE, LAST_TRAINING_STATE, SuiteConfig

keys = st.tuples(st.integers(0, 2**31 - 1), st.sampled_from(list(Stream)), st.lists(st.integers(0, 10**6), max_size=3))


@given(key=keys)
def test_equal_keys_give_equal_draws(key: tuple[int, Stream, list[int]]) -> None:
    seed, stream, rest = key
    first, second = keyed_rng(seed, stream, *rest), keyed_rng(seed, stream, *rest)
    assert np.array_equal(normal(first, 3, 2), normal(second, 3, 2))
    assert first.integers(2**31) == second.integers(2**31)


def test_every_part_of_a_key_matters() -> None:
    variants = [
        keyed_rng(0, Stream.ROLLOUT, 1, 2),
        keyed_rng(1, Stream.ROLLOUT, 1, 2),
        keyed_rng(0, Stream.EVALUATION, 1, 2),
        keyed_rng(0, Stream.ROLLOUT, 2, 1),
        keyed_rng(0, Stream.ROLLOUT, 1, 3),
        keyed_rng(0, Stream.ROLLOUT, 1),
        keyed_rng(0, Stream.ROLLOUT, 1, 2, 1),
    ]
    draws = [int(rng.integers(2**63)) for rng in variants]
    assert len(set(draws)) == len(draws)


def test_drawing_from_one_key_does_not_move_another() -> None:
    expected = keyed_rng(0, Stream.ROLLOUT, 5).random(4)
    busy, other = keyed_rng(0, Stream.ROLLOUT, 4), keyed_rng(0, Stream.ROLLOUT, 5)
    busy.random(1000)
    assert np.array_equal(other.random(4), expected)


def test_a_key_draws_the_recorded_numbers() -> None:
    # In any process. If numpy ever changes its streams, published evaluations no longer repeat: say so.
    assert int(keyed_rng(7, Stream.ROLLOUT, 3, 4, 5).integers(2**31)) == 810825887
    assert training_state(7, 3, 4) == 1822222971


def test_streams_are_distinct_numbers() -> None:
    assert len({int(stream) for stream in Stream}) == len(Stream.__members__)


def test_a_training_state_is_never_held_back() -> None:
    # One in 2147 integers of the whole range is held back: 20 000 draws from there would meet nine.
    most = SuiteConfig(num_evaluation_states=FIRST_TRAINING_STATE).num_evaluation_states
    states = [training_state(0, 0, episode) for episode in range(20_000)]
    assert most <= min(states)
    assert max(states) < LAST_TRAINING_STATE
    assert states[7] == training_state(0, 0, 7)


def test_training_states_of_an_iteration_differ() -> None:
    # 256 draws from 2.1e9: a collision is a chance of 1 in 65 000, and these keys have none.
    states = {training_state(0, 0, episode) for episode in range(256)}
    assert len(states) == 256
    assert states.isdisjoint({training_state(0, 1, episode) for episode in range(256)})


def test_normal_draws_are_standard_and_of_single_precision() -> None:
    draws = normal(keyed_rng(0, Stream.ROLLOUT), 200, 500)
    assert draws.shape == (200, 500)
    assert draws.dtype == np.float32
    # 100 000 draws: the mean is known to 0.003, the deviation to 0.002.
    assert abs(draws.mean()) < 0.015
    assert abs(draws.std() - 1) < 0.01


def test_a_torch_seed_repeats_an_initialisation() -> None:
    seed_torch(3)
    first = torch.nn.Linear(4, 4).weight
    seed_torch(3)
    assert torch.equal(first, torch.nn.Linear(4, 4).weight)
    seed_torch(4)
    assert not torch.equal(first, torch.nn.Linear(4, 4).weight)
