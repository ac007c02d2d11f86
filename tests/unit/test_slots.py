"""Slots with one simulation each, over a simulation that counts: when it draws, and who has it."""

from typing import ClassVar

import numpy as np
import pytest

from rlvla_envs.base import FIRST_TRAINING_STATE, ActionComponent, Camera, EnvSpec, SuiteConfig
from rlvla_envs.common import place_of, turned
from rlvla_envs.slots import Look, Slot, SlottedEnv

H, LIMIT, STATES = 4, 6, 3
CONFIG = SuiteConfig(name="toy", task="a+b", chunk_size=H, max_episode_steps=LIMIT)


class Counter:
    """A number on a line; solved above 2."""

    alive: ClassVar[list["Counter"]] = []

    def __init__(self, task: int) -> None:
        self.task, self.place, self.drawn = task, 0.0, 0
        self.alive.append(self)

    def start_stored(self, index: int) -> Look:
        return self._start(float(-index))

    def start_drawn(self, seed: int) -> Look:
        return self._start(float(seed))

    def _start(self, place: float) -> Look:
        self.place = place
        return self._look(draw=True)

    def step(self, action: np.ndarray, *, draw: bool) -> tuple[bool, Look]:
        self.place += float(action[0])
        return 2 < self.place < FIRST_TRAINING_STATE, self._look(draw)

    def film(self) -> np.ndarray:
        return np.full((2, 2, 3), self.task, np.uint8)

    def close(self) -> None:
        self.alive.remove(self)

    def _look(self, draw: bool) -> Look:
        self.drawn += draw
        image = np.full((2, 2, 3), 7, np.uint8)
        return Look((image,) if draw else None, np.array([self.place], np.float32))


class Counters(SlottedEnv[Counter]):
    def __init__(self, num_envs: int, render_every_step: bool = False) -> None:
        spec = EnvSpec(
            suite="toy",
            task="a+b",
            robot="dot",
            action=(ActionComponent(name="x", size=1, convention="delta", low=-1, high=1),),
            cameras=(Camera(name="top", height=2, width=2),),
            state_names=("x",),
            control_hz=1.0,
            chunk_size=H,
            max_episode_steps=LIMIT,
            num_evaluation_states=2 * STATES,
            tasks=("a", "b"),
            evaluation_states_per_task=(STATES, STATES),
        )
        super().__init__(CONFIG, num_envs, spec, render_every_step=render_every_step)

    def _make(self, task: int) -> Counter:
        return Counter(task)

    def _worded(self, slot: Slot[Counter]) -> str:
        return "ab"[slot.task]


@pytest.fixture(autouse=True)
def none_alive() -> None:
    Counter.alive.clear()


def test_states_count_task_after_task() -> None:
    assert [place_of(10, 50, state) for state in (0, 49, 50, 499)] == [(0, 0), (0, 49), (1, 0), (9, 49)]
    assert place_of(10, 50, FIRST_TRAINING_STATE + 7) == (7, None)
    for state in (-1, 500, FIRST_TRAINING_STATE - 1):
        with pytest.raises(ValueError, match=r"neither an evaluation state \(0 to 499\) nor a training state"):
            place_of(10, 50, state)


def test_a_picture_is_turned_and_not_mirrored() -> None:
    picture = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert turned(picture).tolist() == [[[9, 10, 11], [6, 7, 8]], [[3, 4, 5], [0, 1, 2]]]
    assert turned(picture).flags.c_contiguous


def test_a_chunk_is_drawn_once_unless_every_step_is_wanted() -> None:
    drawn = {}
    for every in (False, True):
        env = Counters(1, render_every_step=every)
        env.reset([0], [0])
        env.step_chunk([0], np.zeros((1, H, 1), np.float32))
        drawn[every] = Counter.alive[-1].drawn
    # One at the reset.
    assert drawn == {False: 1 + 1, True: 1 + H}


def test_success_inside_a_chunk_stops_it_and_is_not_drawn() -> None:
    env = Counters(1)
    env.reset([0], [0])
    result = env.step_chunk([0], np.full((1, H, 1), 0.9, np.float32))
    # 0.9, 1.8, 2.7
    assert (result.executed_steps[0], result.reward[0], result.terminated[0], result.truncated[0]) == (
        3,
        1,
        True,
        False,
    )
    assert not result.observation.images["top"].any()
    with pytest.raises(RuntimeError, match="slot 0 of a\\+b has no running episode; reset it first"):
        env.step_chunk([0], np.zeros((1, H, 1), np.float32))


def test_the_limit_truncates_inside_a_chunk_and_is_drawn() -> None:
    env = Counters(1)
    env.reset([0], [STATES - 1])
    steps = [env.step_chunk([0], np.zeros((1, H, 1), np.float32)) for _ in range(2)]
    assert [(int(s.executed_steps[0]), bool(s.truncated[0])) for s in steps] == [(H, False), (LIMIT - H, True)]
    assert steps[1].observation.images["top"].min() == 7


def test_the_state_says_which_task_and_the_slot_its_words() -> None:
    env = Counters(2)
    first = env.reset([0, 1], [STATES, FIRST_TRAINING_STATE])
    assert first.instruction == ["b", "a"]
    assert first.state is not None
    assert first.state.tolist() == [[0], [FIRST_TRAINING_STATE]]
    assert [env.film(slot)[0, 0, 0] for slot in (0, 1)] == [1, 0]


def test_simulations_are_used_again_and_no_more_are_kept_than_slots_and_one() -> None:
    env = Counters(2)
    assert len(Counter.alive) == 1
    for states in ([0, 0], [3, 3], [0, 3], [3, 0], [0, 0], [3, 3]):
        env.reset([0, 1], states)
        assert len(Counter.alive) <= 3
    kept = list(Counter.alive)
    env.reset([0, 1], [4, 5])
    assert Counter.alive == kept
    env.close()
    assert not Counter.alive


def test_actions_are_clipped_to_the_range_that_the_spec_declares() -> None:
    env = Counters(1)
    env.reset([0], [0])
    # Declared is [-1, 1]: 5 is 1, and -5 is -1.
    state = env.step_chunk([0], np.array([[[5.0], [-5.0], [0.25]]], np.float32)).observation.state
    assert state is not None
    assert state.tolist() == [[0.25]]
    env.close()
    wide = Counters(1)
    wide._low, wide._high = np.array([-3.0]), np.array([1.5])
    wide.reset([0], [0])
    state = wide.step_chunk([0], np.array([[[5.0], [-5.0]]], np.float32)).observation.state
    assert state is not None
    assert state.tolist() == [[-1.5]]
