"""RoboCasa-GR1 through its own interpreter, on whatever assets it has: a reset takes seconds, so there are few."""

from collections.abc import Callable

import numpy as np
import pytest

from rlvla_envs.base import Filmable, SuiteConfig, VecEnv, require_score
from rlvla_envs.robocasa_gr1 import ACTION
from rlvla_envs.robocasa_gr1_tasks import STATE_NAMES
from rlvla_envs.suites import check_ready
from tests.contract.same import (
    assert_each_simulation_draws_itself,
    assert_equal_states_give_equal_episodes,
    assert_the_limit_truncates_the_second_chunk,
    resting,
)

pytestmark = pytest.mark.slow

H, LIMIT = 4, 6
CONFIG = SuiteConfig(name="robocasa_gr1", task="0", image_size=64, chunk_size=H, max_episode_steps=LIMIT)


@pytest.fixture(scope="module")
def world(build: Callable[..., VecEnv]) -> VecEnv:
    """One slot: a simulation takes a gigabyte."""
    return build(1)


def test_the_spec_describes_the_data(world: VecEnv) -> None:
    spec = world.spec
    assert (spec.action, spec.action_size, spec.state_names, spec.control_hz) == (ACTION, 29, STATE_NAMES, 20.0)
    first = world.reset([0], [3])
    assert first.images["ego_view"].shape == (1, 64, 64, 3)
    assert first.images["ego_view"].std() > 10, "a picture of nothing"
    # The picture of 1280 x 800 lies between black bars.
    assert not first.images["ego_view"][0, :8].any()
    assert first.instruction == ["unlocked_waist: pick up the cup, place it into the drawer and close the drawer"]
    assert first.state is not None
    # Both elbows, the fourth joint of each arm, are bent by 120 degrees; the waist is straight.
    assert first.state[0, [3, 10]] == pytest.approx([-2.1, -2.1], abs=0.05)
    assert first.state[0, 26:] == pytest.approx([0, 0, 0], abs=0.1)


def test_an_action_is_where_a_joint_shall_be_and_moves_no_other_stream(world: VecEnv) -> None:
    first = world.reset([0], [3])
    assert first.state is not None
    chunk = resting(first, H)
    still = world.step_chunk([0], chunk).observation.state
    assert still is not None
    assert np.abs(still - first.state)[0, [*range(14), 26, 27, 28]].max() < 0.05
    # The right elbow opens; the left arm stays.
    world.reset([0], [3])
    chunk[..., 10] += 0.4
    moved = world.step_chunk([0], chunk).observation.state
    assert moved is not None
    assert moved[0, 10] - first.state[0, 10] > 0.1
    assert np.abs(moved[0, :7] - first.state[0, :7]).max() < 0.05


def test_equal_states_give_equal_episodes_after_any_past_and_in_another_process(
    world: VecEnv, build: Callable[..., VecEnv]
) -> None:
    assert_equal_states_give_equal_episodes(world, build(1, options={"render_every_step": True}))


def test_each_simulation_draws_itself_beside_others(build: Callable[..., VecEnv]) -> None:
    assert_each_simulation_draws_itself(lambda slots: build(slots, task="0+1"), [3, 53])


def test_the_limit_truncates_inside_a_chunk_and_shows_the_final_frame(world: VecEnv) -> None:
    assert_the_limit_truncates_the_second_chunk(world)
    assert isinstance(world, Filmable)
    assert world.film(0).shape == (300, 480, 3)


def test_stand_ins_are_named_by_the_spec_and_give_no_score(world: VecEnv) -> None:
    notes = check_ready(CONFIG).notes
    if not notes:
        require_score(world.spec)
        pytest.skip("this environment has the official assets")
    with pytest.raises(ValueError, match=r"cannot give a success rate here.*download_tabletop_assets.*smoke_test=true"):
        require_score(world.spec)
    assert world.spec.notes[0].startswith("stand-in: every asset in ")
