"""VLN-CE: from waypoints to moves, what is measured of a walk, and that there is no simulator."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlvla.compose import compose
from rlvla.suites import run
from rlvla_envs.base import EnvSpec, SuiteConfig, compare_specs
from rlvla_envs.suites import HELD_OUT, check_ready, make_env
from rlvla_envs.vln_ce import (
    FORWARD,
    HORIZON,
    MAX_MOVES,
    TURN,
    Follower,
    Move,
    Walk,
    WaypointEnv,
    World,
    pad,
    spec_of,
    walk_metrics,
)

CONFIG = SuiteConfig(name="vln_ce", task="r2r", chunk_size=HORIZON, max_episode_steps=20, image_size=8)
STAY = (0.0, 0.0, 0.0)


def moves(follower: Follower, *waypoint: float) -> list[str]:
    return [move.name for move in follower.moves(np.array(waypoint))]


class Corridor:
    """The goal is so many metres ahead, along x; a wall at 20."""

    def __init__(self, metres: float = 5.0) -> None:
        self.metres, self.heading, self.x, self.y, self.closed = metres, 0.0, 0.0, 0.0, False

    def start(self, episode: int) -> str:
        self.x = self.y = self.heading = 0.0
        return f"walk on, {episode}"

    def move(self, move: Move) -> float:
        assert move is not Move.stop
        if move is Move.forward:
            if self.x >= 20:
                return 0.0
            self.x += FORWARD * math.cos(self.heading)
            self.y += FORWARD * math.sin(self.heading)
            return FORWARD
        self.heading += TURN if move is Move.left else -TURN
        return 0.0

    def distance(self) -> float:
        return math.hypot(self.metres - self.x, self.y)

    def draw(self) -> np.ndarray:
        return np.full((8, 8, 3), int(10 * self.x), np.uint8)

    def close(self) -> None:
        self.closed = True


def chunk(*waypoints: Sequence[float]) -> np.ndarray:
    rows = [*waypoints, *[STAY] * (HORIZON - len(waypoints))]
    return np.array([rows], np.float32)


# --- waypoints and moves


def test_a_waypoint_ahead_is_steps_of_a_quarter_metre() -> None:
    assert moves(Follower(), 0.5, 0, 0) == ["forward"] * 2
    assert moves(Follower(), 0.24, 0, 0) == ["forward"]


def test_a_waypoint_to_the_left_turns_there_walks_and_turns_to_its_heading() -> None:
    # 90 degrees are six turns. It ends looking as before: six back.
    assert moves(Follower(), 0, 0.25, 0) == ["left"] * 6 + ["forward"] + ["right"] * 6
    assert moves(Follower(), 0, -0.25, -math.pi / 2) == ["right"] * 6 + ["forward"]


def test_a_turn_alone_walks_nowhere_and_takes_the_shorter_way() -> None:
    assert moves(Follower(), 0, 0, math.radians(30)) == ["left"] * 2
    assert moves(Follower(), 0, 0, math.radians(345)) == ["right"]


def test_a_waypoint_is_counted_from_the_one_before_it() -> None:
    follower = Follower()
    moves(follower, 0.25, 0, math.pi / 2)
    # Ahead is now to the left of where it began.
    moves(follower, 0.25, 0, 0)
    assert follower.reached == pytest.approx((0.25, 0.25, math.pi / 2))


def test_what_a_waypoint_leaves_over_is_made_up_for() -> None:
    follower = Follower()
    steps = [len(moves(follower, 0.1, 0, 0)) for _ in range(10)]
    # 10 x 0.1 m are four steps of 0.25 m, of which no single waypoint is one.
    assert sum(steps) == 4
    assert max(steps) == 1


def test_a_waypoint_that_goes_nowhere_says_stop() -> None:
    assert moves(Follower(), 0, 0, 0) == moves(Follower(), 0.04, 0.02, math.radians(2)) == ["stop"]
    assert moves(Follower(), 0.06, 0, 0) == []


@given(
    st.lists(
        st.tuples(st.floats(-1, 1), st.floats(-1, 1), st.floats(-math.pi, math.pi)).filter(
            lambda w: math.hypot(w[0], w[1]) > 0.05
        ),
        max_size=30,
    )
)
def test_the_walker_never_falls_behind_its_waypoints(waypoints: list[tuple[float, float, float]]) -> None:
    follower = Follower()
    for waypoint in waypoints:
        follower.moves(np.array(waypoint))
        wanted, reached = follower.wanted, follower.reached
        # Half a step along its way, and what half a turn of 7.5 degrees misses over at most 2 m.
        assert math.hypot(wanted.x - reached.x, wanted.y - reached.y) <= FORWARD / 2 + 2 * math.sin(TURN / 2)
        assert abs(math.remainder(wanted.heading - reached.heading, 2 * math.pi)) <= TURN / 2 + 1e-9


def test_moves_after_a_stop_are_left_out_and_the_row_is_filled_with_nothing() -> None:
    assert pad([Move.forward, Move.stop, Move.left], 4) == [Move.forward, Move.stop, None, None]
    with pytest.raises(ValueError, match="3 moves do not fit into a row of 2"):
        pad([Move.left] * 3, 2)


# --- what is measured


def test_a_walk_of_twice_the_shortest_way_has_half_the_spl() -> None:
    walk = Walk(shortest=5.0, length=10.0, distances=[5.0, 8.0, 2.0], stopped=True)
    assert walk_metrics(walk) == {
        "navigation_success": 1,
        "oracle_success": 1,
        "spl": 0.5,
        "navigation_error": 2,
    }


def test_who_passes_the_goal_has_oracle_success_alone_and_who_does_not_stop_has_not_arrived() -> None:
    passed = walk_metrics(Walk(5.0, 9.0, [5.0, 1.0, 4.0], stopped=True))
    assert (passed["navigation_success"], passed["oracle_success"], passed["spl"]) == (0, 1, 0)
    running = walk_metrics(Walk(5.0, 4.0, [5.0, 1.0], stopped=False))
    assert (running["navigation_success"], running["oracle_success"]) == (0, 1)
    # 3 m are near enough; a shortcut is not more than the shortest way.
    assert walk_metrics(Walk(5.0, 2.0, [5.0, 3.0], stopped=True))["spl"] == 1
    assert walk_metrics(Walk(5.0, 2.0, [5.0, 3.01], stopped=True))["spl"] == 0


# --- the interface


def test_a_walk_to_the_goal_is_a_solved_episode() -> None:
    env = WaypointEnv(CONFIG, 2, Corridor)
    first = env.reset([0, 1], [3, 4])
    assert first.instruction == ["walk on, 3", "walk on, 4"]
    assert first.images["rgb"].shape == (2, 8, 8, 3)
    result = env.step_chunk([0], chunk(*[(1.0, 0.0, 0.0)] * 4))
    # Four waypoints of a metre, and the fifth stops 1 m before the goal.
    assert (result.executed_steps[0], result.terminated[0], result.success[0], result.reward[0]) == (5, True, True, 1)
    assert {name: float(value[0]) for name, value in result.metrics.items()} == {
        "navigation_success": 1,
        "oracle_success": 1,
        "spl": 1,
        "navigation_error": 1,
    }
    env.close()


def test_a_stop_too_early_ends_the_episode_unsolved() -> None:
    env = WaypointEnv(CONFIG, 1, Corridor)
    env.reset([0], [0])
    result = env.step_chunk([0], chunk())
    assert (result.executed_steps[0], result.terminated[0], result.success[0]) == (1, True, False)
    assert result.metrics["navigation_error"][0] == 5
    env.close()


def test_five_hundred_moves_end_a_walk_in_the_middle_of_a_waypoint() -> None:
    world = World(Corridor(), max_moves=6)
    world.start_stored(0)
    done = [world.step(np.array([1.0, 0, 0]), draw=False) for _ in range(2)]
    # Four moves, then two of four.
    assert not done[0][0]
    assert world.after.lost
    assert world.after.metrics["navigation_error"] == pytest.approx(5 - 6 * FORWARD)
    assert MAX_MOVES == 500


def test_a_policy_of_other_waypoints_is_refused_by_convention() -> None:
    spec = spec_of(CONFIG)
    assert (spec.action_names(), spec.chunk_size, spec.state_names) == (
        ["displacement.0", "displacement.1", "heading"],
        8,
        (),
    )
    other = EnvSpec.from_dict(spec.to_dict() | {"chunk_size": 16})
    assert [m.field for m in compare_specs(other, spec)] == ["chunk size H"]


# --- no simulator


def test_the_suite_says_plainly_that_there_is_no_simulator() -> None:
    config = compose("collect", ["suite=vln_ce"]).suite
    assert (config.chunk_size, config.max_episode_steps) == (8, 500)
    with pytest.raises(ValueError, match="VLN-CE has no simulator here: habitat-sim offers no package"):
        check_ready(config)
    with pytest.raises(RuntimeError, match="VLN-CE has no simulator here"):
        make_env(config, 1)
    with pytest.raises(ValueError, match="must be one of r2r, rxr"):
        check_ready(SuiteConfig(name="vln_ce", task="r4r"))
    (listed,) = run(compose("suites", ["vln_ce"]))["suites"]
    assert (listed["status"], listed["role"], listed["fix"]) == ("missing", "held-out", "")
    assert "no simulator here" in listed["found"]
    assert "vln_ce" in HELD_OUT
