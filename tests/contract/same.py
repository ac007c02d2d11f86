"""When two observations are one, and what suites of absolute joint targets have in common."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from rlvla_envs.base import FIRST_TRAINING_STATE, ChunkResult, Filmable, Observation, VecEnv


def assert_equal(a: Observation, b: Observation) -> None:
    """Equal to the bit, words, state and pictures."""
    assert a.images.keys() == b.images.keys()
    for name in a.images:
        assert np.array_equal(a.images[name], b.images[name])
    assert a.instruction == b.instruction
    assert (a.state is None) == (b.state is None)
    if a.state is not None and b.state is not None:
        assert np.array_equal(a.state, b.state)


def assert_each_simulation_draws_itself(build: Callable[..., VecEnv], states: Sequence[int]) -> None:
    """Of one process that has a simulation for each of two slots, and of one that closes some to make room.

    Args:
        states: at least two, each of another task.
    """
    first: dict[int, tuple[Observation, Observation]] = {}

    def episode(world: VecEnv, state: int) -> tuple[Observation, Observation]:
        begun = world.reset([0], [state])
        return begun, world.step_chunk([0], quiet_chunk(world, begun)).observation

    one = build(1)
    for state in states:
        # Whatever was built last draws right in any case.
        first[state] = episode(one, state)
    for state in (*reversed(states), *states):
        for found, expected in zip(episode(one, state), first[state], strict=True):
            assert_equal(found, expected)
    two = build(2)
    a, b = states[:2]
    begun = [two.reset([slot], [state]) for slot, state in enumerate((a, b))]
    chunks = np.concatenate([quiet_chunk(two, seen) for seen in begun])
    after = two.step_chunk([0, 1], chunks).observation
    for slot, state in enumerate((a, b)):
        assert_equal(begun[slot], first[state][0])
        assert_equal(after.row(slot), first[state][1])


def quiet_chunk(world: VecEnv, seen: Observation) -> np.ndarray:
    """[1 H A]: hold still."""
    if world.spec.action_size == 29:
        return resting(seen, world.spec.chunk_size)
    return np.zeros((1, world.spec.chunk_size, world.spec.action_size), dtype=np.float32)


def resting(observation: Observation, length: int) -> np.ndarray:
    """A chunk that asks every joint to stay where the state says it is."""
    assert observation.state is not None
    return np.repeat(observation.state[:, None], length, axis=1)


def assert_equal_states_give_equal_episodes(world: VecEnv, drawing: VecEnv) -> None:
    """After any past, and in ``drawing``: another process, which draws after every action."""
    first = world.reset([0], [FIRST_TRAINING_STATE + 7])
    chunk = resting(first, world.spec.chunk_size)
    chunk += np.random.default_rng(0).uniform(-0.2, 0.2, chunk.shape).astype(np.float32)
    ended = world.step_chunk([0], chunk)
    world.reset([0], [4])
    for env in (world, drawing):
        assert_equal(env.reset([0], [FIRST_TRAINING_STATE + 7]), first)
        # What is drawn once a chunk is the same.
        assert_equal(env.step_chunk([0], chunk).observation, ended.observation)
    camera = world.spec.cameras[0].name
    assert not np.array_equal(world.reset([0], [5]).images[camera], first.images[camera])


def assert_the_limit_truncates_the_second_chunk(world: VecEnv) -> ChunkResult:
    """Inside it, with the final frame; what it returned. Nothing runs then, and what there is can be filmed."""
    spec = world.spec
    chunk = resting(world.reset([0], [0]), spec.chunk_size)
    results = [world.step_chunk([0], chunk) for _ in range(2)]
    assert [(int(r.executed_steps[0]), bool(r.truncated[0])) for r in results] == [
        (spec.chunk_size, False),
        (spec.max_episode_steps - spec.chunk_size, True),
    ]
    assert results[1].observation.images[spec.cameras[0].name].std() > 10
    with pytest.raises(RuntimeError, match="has no running episode; reset it first"):
        world.step_chunk([0], chunk)
    assert isinstance(world, Filmable)
    assert world.film(0).std() > 10
    return results[1]
