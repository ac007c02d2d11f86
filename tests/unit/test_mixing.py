"""Tasks of a mixed suite: how many episodes each gets, and that their initial states are theirs."""

import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlvla.config import ConfigError, TaskMix, TrainConfig
from rlvla.evaluate import evaluation_states
from rlvla.mixing import allocate, check_weights, state_of_task, task_weights, training_states
from rlvla_envs.base import FIRST_TRAINING_STATE, LAST_TRAINING_STATE, EnvSpec

NAMES = ("carrot", "spoon", "cube")


def spec(tasks: tuple[str, ...] = NAMES, counts: tuple[int, ...] = (2, 3, 1)) -> EnvSpec:
    return EnvSpec(
        suite="mixed",
        task="all",
        robot="point",
        action=(),
        cameras=(),
        control_hz=5.0,
        chunk_size=8,
        max_episode_steps=60,
        num_evaluation_states=sum(counts),
        tasks=tasks,
        evaluation_states_per_task=counts,
    )


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(policy="p", **changes)


def test_a_hundred_and_twenty_eight_episodes_are_shared_by_weight() -> None:
    # 128 x (0.5, 0.3, 0.2) = 64, 38.4, 25.6: the larger remainder takes what is left.
    assert allocate([0.5, 0.3, 0.2], 128) == [64, 38, 26]
    assert allocate([1, 1, 1], 128) == [43, 43, 42]
    assert allocate([1, 0, 1], 5) == [3, 0, 2]


@given(weights=st.lists(st.floats(0, 10), min_size=1, max_size=6), episodes=st.integers(1, 500))
def test_an_allocation_is_whole_complete_and_within_one_of_the_exact_share(weights: list[float], episodes: int) -> None:
    if sum(weights) < 1e-3:
        return
    counts = allocate(weights, episodes)
    assert sum(counts) == episodes
    for weight, count in zip(weights, counts, strict=True):
        assert abs(count - weight / sum(weights) * episodes) < 1 + 1e-6


def test_weights_by_difficulty_follow_failures_and_keep_what_is_solved() -> None:
    mix = config(task_mix=TaskMix.difficulty)
    weights = task_weights(mix, NAMES, {"carrot": 0.5, "spoon": 1.0, "cube": 0.1})
    # 0.5, the floor 0.1, 0.9: of 1.5.
    assert weights == pytest.approx({"carrot": 1 / 3, "spoon": 1 / 15, "cube": 0.6})


def test_given_weights_win_and_leave_out_what_they_do_not_name() -> None:
    mix = config(task_mix=TaskMix.difficulty, task_weights={"cube": 3.0, "spoon": 1.0})
    assert task_weights(mix, NAMES, dict.fromkeys(NAMES, 0.5)) == {"carrot": 0.0, "spoon": 0.25, "cube": 0.75}


@pytest.mark.parametrize(
    ("weights", "said"),
    [({"carot": 1.0}, "carot; the tasks of mixed are carrot, spoon, cube"), ({"cube": 0.0}, "at least one task")],
)
def test_weights_that_fit_no_task_are_refused(weights: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_weights(config(task_weights=weights), spec())


def test_an_iteration_has_the_allocated_tasks_evenly_spread() -> None:
    states = training_states(spec(), {"carrot": 0.5, "spoon": 0.25, "cube": 0.25}, 16, seed=0, iteration=3)
    tasks = [spec().task_of(state) for state in states]
    assert Counter(tasks) == {0: 8, 1: 4, 2: 4}
    # In every quarter of the iteration, as in the whole.
    assert all(Counter(tasks[i : i + 4]) == {0: 2, 1: 1, 2: 1} for i in range(0, 16, 4))
    assert len(set(states)) == 16
    assert min(states) >= FIRST_TRAINING_STATE


@given(state=st.integers(FIRST_TRAINING_STATE, LAST_TRAINING_STATE), num_tasks=st.integers(1, 10), data=st.data())
def test_a_training_state_can_be_moved_to_any_task_and_stays_one(state: int, num_tasks: int, data: Any) -> None:
    task = data.draw(st.integers(0, num_tasks - 1))
    moved = state_of_task(state, task, num_tasks)
    assert moved % num_tasks == task
    assert abs(moved - state) < num_tasks
    assert FIRST_TRAINING_STATE <= moved <= LAST_TRAINING_STATE


def test_evaluation_states_belong_to_their_task_and_are_capped_by_what_it_has() -> None:
    mixed = spec()
    assert [mixed.task_of(state) for state in range(6)] == [0, 0, 1, 1, 1, 2]
    assert evaluation_states(mixed, 200) == [0, 1, 2, 3, 4, 5]
    assert evaluation_states(mixed, 2) == [0, 1, 2, 3, 5]
    assert evaluation_states(mixed, 1) == [0, 2, 5]
    with pytest.raises(ValueError, match="neither an evaluation state"):
        mixed.task_of(6)


def test_a_spec_whose_states_do_not_add_up_is_refused() -> None:
    with pytest.raises(ValueError, match="one number for each of 2 tasks"):
        spec(("carrot", "spoon"), (2, 3, 1))
