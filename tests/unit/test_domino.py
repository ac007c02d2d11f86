"""DOMINO: its score by hand, and the adapter over a stand-in for the user's clone, in an interpreter of its own."""

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlvla.compose import compose
from rlvla_envs.base import SuiteConfig, VecEnv
from rlvla_envs.domino import FILES, check_ready, find_clone, outline, tasks_of
from rlvla_envs.domino_score import EpisodeFacts, manipulation_score, route_completion
from rlvla_envs.robotwin import ACTION
from rlvla_envs.stand_ins import stamp
from rlvla_envs.suites import HELD_OUT, NotReadyError
from tests import domino_clone
from tests.worlds import opened

H = 4
CONFIG = SuiteConfig(
    name="domino",
    task="catch_block",
    image_size=8,
    chunk_size=H,
    max_episode_steps=1700,
    num_evaluation_states=5000,
    python=sys.executable,
)

# --- the score


def facts(**changes: Any) -> EpisodeFacts:
    """The left hand went 3 of the 4 m to the object; the right hand went 1 m away from it."""
    hands_first = np.array([[0.0, 0, 0], [0, 6, 0]])
    hands_last = np.array([[3.0, 0, 0], [0, 7, 0]])
    return EpisodeFacts(False, hands_first, hands_last, np.array([4.0, 0, 0]))._replace(**changes)


def test_the_score_is_the_better_hands_way_times_penalties() -> None:
    assert route_completion(facts()) == manipulation_score(facts()) == 75.0
    assert manipulation_score(facts(out_of_bounds=True)) == 37.5
    assert manipulation_score(facts(clutter_touched=2)) == pytest.approx(75 * 0.8 * 0.8)
    assert manipulation_score(facts(success=True, clutter_touched=1)) == 80.0


def test_hands_that_go_away_score_nothing_and_no_way_is_more_than_all_of_it() -> None:
    away = np.array([[-1.0, 0, 0], [0, 7, 0]])
    assert manipulation_score(facts(hands_last=away)) == 0.0
    there = np.array([[4.0, 0, 0], [4, 0, 0]])
    assert manipulation_score(facts(hands_last=there)) == 100.0


@pytest.mark.parametrize(("end", "score"), [(4.04, 100.0), (4.06, 50.0)])
def test_a_hand_that_begins_at_the_object_has_arrived_if_it_stays_within_5_cm(end: float, score: float) -> None:
    first = np.array([[4.005, 0, 0], [0, 6, 0]])
    last = np.array([[end, 0, 0], [0, 6, 0]])
    assert route_completion(facts(hands_first=first, hands_last=last)) == score


# --- the adapter


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return domino_clone.write(tmp_path_factory.mktemp("domino"))


@pytest.fixture(scope="module")
def build(clone: Path) -> Iterator[Callable[..., VecEnv]]:
    """``build(task, **options)`` in another process; closed after the module."""
    with opened() as make:
        yield lambda task="catch_block", **options: make(
            replace(CONFIG, task=task, options={"root": str(clone), **options}), 1
        )


@pytest.fixture(scope="module")
def world(build: Callable[..., VecEnv]) -> VecEnv:
    return build("catch_block+lift_block", dynamic_level=2)


def chunk(left: float, *, closed: bool = False, height: float = 0.0, touches: bool = False) -> np.ndarray:
    """The left hand goes to ``left`` metres, four times."""
    action = np.zeros((1, H, 14), np.float32)
    action[..., 0], action[..., 1], action[..., 3] = left, height, touches
    action[..., 6] = 0.0 if closed else 1.0
    return action


def test_the_spec_says_the_level_and_takes_robotwins_conventions(world: VecEnv) -> None:
    spec = world.spec
    assert (spec.action, spec.tasks, spec.variant) == (ACTION, ("catch_block", "lift_block"), "dynamic_level=2")
    assert spec.unscored == ""
    assert world.reset([0], [0]).instruction[0].startswith("catch ")


def test_closing_on_the_block_is_success_and_the_whole_score(world: VecEnv) -> None:
    world.reset([0], [0])
    # Level 2 moves it by 0.02 m an action.
    result = world.step_chunk([0], chunk(0.52, closed=True))
    assert (bool(result.success[0]), int(result.executed_steps[0])) == (True, 1)
    assert {k: v[0] for k, v in result.metrics.items()} == {
        "manipulation_score": 100.0,
        "route_completion": 100.0,
        "seed_moves": 0.0,
    }


def test_a_block_that_leaves_the_table_untouched_loses_the_episode_and_half_the_score(world: VecEnv) -> None:
    world.reset([0], [0])
    first = world.step_chunk([0], chunk(0.31))
    assert not first.done[0]
    assert first.metrics["manipulation_score"][0] == pytest.approx(100 * 0.31 / 0.58, rel=1e-5)
    last = world.step_chunk([0], chunk(0.31))
    assert (bool(last.terminated[0]), bool(last.success[0]), int(last.executed_steps[0])) == (True, False, 2)
    assert last.metrics["manipulation_score"][0] == pytest.approx(50 * 0.31 / 0.62, rel=1e-5)


def test_a_touched_block_stops_and_is_lost_no_more_until_the_tasks_own_limit(world: VecEnv) -> None:
    world.reset([0], [0])
    results = [world.step_chunk([0], chunk(0.52)) for _ in range(8)]
    assert [bool(r.done[0]) for r in results] == [False] * 7 + [True]
    # The clone's list says 30 for this task.
    assert sum(int(r.executed_steps[0]) for r in results) == 30
    assert results[-1].truncated[0]


def test_clutter_that_the_robot_touches_costs_once_and_not_what_touches_itself(world: VecEnv) -> None:
    world.reset([0], [0])
    untouched = world.step_chunk([0], chunk(0.52)).metrics
    assert untouched["manipulation_score"][0] == untouched["route_completion"][0]
    for _ in range(2):
        touched = world.step_chunk([0], chunk(0.52, touches=True)).metrics
    assert touched["manipulation_score"][0] == pytest.approx(0.8 * touched["route_completion"][0])


def test_a_block_that_has_to_be_lifted_and_was_pushed_is_lost(world: VecEnv) -> None:
    for height, success in ((0.0, False), (0.1, True)):
        world.reset([0], [100])
        result = world.step_chunk([0], chunk(0.52, closed=True, height=height))
        assert (bool(result.terminated[0]), bool(result.success[0])) == (True, success)


@pytest.mark.parametrize("state", [13, 17, 18, 19])
def test_a_seed_that_falls_over_or_that_the_expert_cannot_solve_is_passed_over_and_counted(
    world: VecEnv, state: int
) -> None:
    world.reset([0], [state])
    assert world.step_chunk([0], chunk(0.0)).metrics["seed_moves"][0] == 1


def test_equal_states_are_told_the_same(world: VecEnv) -> None:
    told = [world.reset([0], [state]).instruction[0] for state in (3, 4, 5, 6, 7, 8)]
    assert len(set(told)) > 1
    assert told == [world.reset([0], [state]).instruction[0] for state in (3, 4, 5, 6, 7, 8)]


def test_the_coefficient_scales_the_speed_and_the_trainers_path_has_no_clone(
    build: Callable[..., VecEnv], clone: Path
) -> None:
    slow = build(dynamic_level=1, dynamic_coefficient=0.05, instructions="seen")
    assert slow.spec.variant == "dynamic_level=1, dynamic_coefficient=0.05, instructions=seen"
    assert slow.reset([0], [0]).instruction[0].startswith("push ")
    # Four actions of 5 mm.
    way = slow.step_chunk([0], chunk(0.26)).metrics["route_completion"][0]
    assert way == pytest.approx(100 * 0.26 / 0.52, rel=1e-5)
    assert not any(str(clone) in entry for entry in sys.path)


def test_only_tasks_with_a_moving_object_are_played(clone: Path) -> None:
    assert tasks_of(clone) == {"catch_block": 30, "lift_block": 1000}
    config = replace(CONFIG, task="all", options={"root": str(clone)})
    assert outline(config) == {"catch_block": 100, "lift_block": 100}
    with pytest.raises(ValueError, match="'still_block' is no task of domino"):
        check_ready(replace(config, task="still_block"))


# --- what is missing


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"dynamic_level": 4}, r"dynamic_level is 4; it must be 1 \(constant speed\)"),
        ({"dynamic_coefficient": 0}, "dynamic_coefficient is 0.0; it must be above 0"),
        ({"dynamic_levels": 1}, "Did you mean 'dynamic_level'"),
        ({"seeds": "x"}, "which domino does not know"),
    ],
)
def test_what_a_user_gets_wrong_is_said_before_a_clone_is_looked_for(
    options: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_ready(replace(CONFIG, options=options))


def test_a_clone_that_is_absent_or_not_whole_is_refused_with_the_command(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RLVLA_DOMINO", raising=False)
    with pytest.raises(NotReadyError, match="DOMINO's code is in no package") as caught:
        check_ready(CONFIG)
    assert caught.value.fix == "git clone https://github.com/H-EmbodVis/DOMINO"
    shutil.copytree(clone, tmp_path / "copy")
    monkeypatch.setenv("RLVLA_DOMINO", str(tmp_path / "copy"))
    assert find_clone(CONFIG) == tmp_path / "copy"
    (tmp_path / "copy" / FILES[0]).unlink()
    with pytest.raises(NotReadyError, match=f"{FILES[0]} is missing"):
        find_clone(CONFIG)


def test_a_clone_without_assets_is_refused_and_one_on_stand_ins_gives_no_score(
    build: Callable[..., VecEnv], clone: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(clone, tmp_path / "bare")
    shutil.rmtree(bare / "assets")
    with pytest.raises(NotReadyError, match="has no assets: .* They are RoboTwin's"):
        find_clone(replace(CONFIG, options={"root": str(bare)}))
    # As a link into a folder of stand-ins.
    shutil.copytree(clone / "assets", tmp_path / "made/assets")
    stamp(tmp_path / "made", 1, 1)
    (bare / "assets").symlink_to(tmp_path / "made/assets")
    assert "stand-ins" in build(root=str(bare)).spec.unscored


def test_without_curobo_it_is_not_ready(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlvla_envs import domino

    class Here:
        """An environment that is set up."""

        def is_here(self) -> bool:
            return False

        def folder(self) -> Path:
            return tmp_path

        def complaint(self) -> str:
            return ""

    monkeypatch.setattr(domino, "HOME", Here())
    config = replace(CONFIG, python=None, options={"root": str(clone)})
    with pytest.raises(NotReadyError, match="has no cuRobo"):
        check_ready(config)
    (tmp_path / "lib/python3.11/site-packages/nvidia_curobo-0.7.dist-info").mkdir(parents=True)
    assert check_ready(config).notes == ()


def test_the_yaml_allows_for_every_task_and_the_suite_is_held_out() -> None:
    config = compose("collect", ["suite=domino"]).suite
    assert (config.name, config.max_episode_steps, config.num_evaluation_states) == ("domino", 1700, 5000)
    assert "domino" in HELD_OUT
