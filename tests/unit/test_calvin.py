"""CALVIN without its simulator: the protocol, and the adapter over a stand-in for the user's clone."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlvla.compose import compose
from rlvla_envs.base import FIRST_TRAINING_STATE, ChunkResult, SuiteConfig
from rlvla_envs.calvin import ACTION, FILES, HOME, CalvinEnv, check_ready, find_clone, outline
from rlvla_envs.calvin_tasks import (
    LENGTH,
    ROBOT_START,
    STATE_NAMES,
    Chain,
    fnv1_32,
    initial_conditions,
    proprioception,
    scene_start,
)
from rlvla_envs.suites import HELD_OUT, NotReadyError, homes
from tests import calvin_clone

H = 8


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RLVLA_CALVIN", str(tmp_path / "calvin"))
    return calvin_clone.write(tmp_path / "calvin")


@pytest.fixture
def env(clone: Path) -> Iterator[CalvinEnv]:
    """A slot on the stand-in's drawer. Odd chains begin with opening it, which is an action above zero."""
    before, path = set(sys.modules), list(sys.path)
    world = CalvinEnv(config(subtask_steps=10), 1)
    yield world
    world.close()
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("calvin_env", "calvin_agent", "multistep_sequences"):
            del sys.modules[name]


def config(**options: Any) -> SuiteConfig:
    return SuiteConfig(
        name="calvin", task="chains", chunk_size=H, max_episode_steps=1800, image_size=84, options=options
    )


def chunk(pull: float, gripper: float = 0.3) -> np.ndarray:
    """All eight actions pull the drawer: 0.02 m times this, of the 0.05 m that a subtask wants."""
    actions = np.zeros((1, H, 7), np.float32)
    actions[..., 0], actions[..., 6] = pull, gripper
    return actions


# --- the protocol


def test_a_chain_goes_on_when_a_subtask_is_solved_and_is_lost_at_its_limit() -> None:
    chain = Chain(("a", "b", "c"), limit=3)
    said = [chain.step(solved) for solved in (False, False, True, False, True, False, False, False)]
    assert [after.cut for after in said] == [False, False, True, False, True, False, False, False]
    # Three steps without c; the two before b do not count.
    assert [after.lost for after in said] == [False] * 7 + [True]
    assert (chain.solved, chain.subtask) == (2, "c")
    assert said[-1].metrics == {"chain_length": 2, "in_a_row_1": 1, "in_a_row_2": 1, "in_a_row_3": 0}


def test_a_subtask_that_is_solved_with_its_last_step_is_not_lost() -> None:
    chain = Chain(("a", "b"), limit=2)
    chain.step(False)
    after = chain.step(True)
    assert (after.cut, after.lost, chain.subtask) == (True, False, "b")


def test_the_mean_of_the_metrics_is_the_average_length_and_the_shares_in_a_row() -> None:
    # Chains of length 5, 2 and 0: 7/3 on average; 2/3 solve one, 2/3 two, 1/3 three and more.
    chains = []
    for length in (5, 2, 0):
        chain = Chain("abcde", limit=9)
        for _ in range(length):
            chain.step(True)
        chains.append(chain.metrics())
    mean = {name: np.mean([metrics[name] for metrics in chains]) for name in chains[0]}
    assert mean["chain_length"] == pytest.approx(7 / 3)
    assert [mean[f"in_a_row_{n}"] for n in range(1, 6)] == pytest.approx([2 / 3, 2 / 3, 1 / 3, 1 / 3, 1 / 3])
    # The average length is the sum of the shares.
    assert sum(mean[f"in_a_row_{n}"] for n in range(1, 6)) == pytest.approx(mean["chain_length"])


def test_the_hash_is_fowler_noll_vos_first_from_zero_as_pyhash_has_it() -> None:
    # pyhash's own test vectors: of bytes, and of a text, which it reads as UTF-16.
    assert (fnv1_32(b"test"), fnv1_32("test".encode("utf-16-le"))) == (3698262380, 3910690890)
    assert fnv1_32(b"") == 0


def test_blocks_are_turned_as_the_benchmark_turns_them() -> None:
    condition: dict[str, int | str] = {"led": 1, "lightbulb": 1, "slider": "left", "drawer": "open"}
    condition |= {"red_block": "slider_left", "blue_block": "table", "pink_block": "slider_right", "grasped": 0}
    # Of another port of the benchmark.
    assert scene_start(condition)[[11, 17, 23]] == pytest.approx([1.88594101, 1.48814344, 1.46839869])


def test_a_chain_may_begin_in_192_scenes() -> None:
    # Twelve ways for three blocks (six with two on the table, six with one), and two for each of four parts.
    conditions = initial_conditions()
    assert len(conditions) == len({str(c) for c in conditions}) == 12 * 2**4
    assert list(conditions[0]) == [
        *("led", "lightbulb", "slider", "drawer", "red_block", "blue_block", "pink_block", "grasped")
    ]


def test_blocks_stand_where_the_condition_says_and_never_in_each_other() -> None:
    for condition in initial_conditions():
        scene = scene_start(condition)
        places = {tuple(scene[first : first + 3]) for first in (6, 12, 18)}
        assert len(places) == 3
        assert scene[0] == (0.28 if condition["slider"] == "left" else 0)
        assert scene[1] == (0.22 if condition["drawer"] == "open" else 0)
        assert (scene[4], scene[5]) == (condition["lightbulb"], condition["led"])
        assert all(abs(scene[first + 5] - np.pi / 2) <= np.pi / 8 for first in (6, 12, 18))
        for block, first in (("red_block", 6), ("blue_block", 12), ("pink_block", 18)):
            # The cabinet stands behind the table, at positive y.
            assert (scene[first + 1] > 0) == (condition[block] != "table")
    assert np.array_equal(scene_start(condition), scene_start(dict(condition)))


def test_a_policy_is_told_of_the_hand_and_the_gripper() -> None:
    state = proprioception(np.arange(15.0))
    assert (state.tolist(), state.dtype) == ([0, 1, 2, 3, 4, 5, 6, 14], np.float32)
    assert len(STATE_NAMES) == len(state)


# --- the adapter over a stand-in


def test_the_spec_has_calvins_conventions(env: CalvinEnv) -> None:
    spec = env.spec
    assert (spec.action, spec.control_hz, spec.num_evaluation_states, spec.variant) == (
        ACTION,
        30.0,
        1000,
        "subtask_steps=10",
    )
    # The other way round than LIBERO and Meta-World.
    assert spec.action[2].convention == "absolute, -1 closed, 1 open"
    assert env.reset([0], [1]).instruction == ["close the drawer"]
    first = env.reset([0], [0])
    assert first.instruction == ["open the drawer"]
    assert {name: image.shape for name, image in first.images.items()} == {
        "rgb_static": (1, 84, 84, 3),
        "rgb_gripper": (1, 84, 84, 3),
    }
    assert first.images["rgb_static"][0].std() > 10
    assert first.state is not None
    assert first.state[0] == pytest.approx([*ROBOT_START[:7], 1.0])


def test_a_solved_subtask_ends_the_chunk_and_changes_the_words_but_not_the_episode(env: CalvinEnv) -> None:
    env.reset([0], [0])
    result = env.step_chunk([0], chunk(1.0))
    # 0.02, 0.04, 0.06: the third step solves it.
    assert result.executed_steps.tolist() == [3]
    assert not result.done[0]
    assert result.reward[0] == 0
    assert result.observation.instruction == ["close the drawer"]
    assert result.observation.images["rgb_static"].std() > 10, "the policy begins the next subtask blind"
    assert (result.metrics["chain_length"][0], result.metrics["in_a_row_1"][0]) == (1, 1)
    # Counted from where it is now, not from where the chain began.
    assert env.step_chunk([0], chunk(-1.0)).executed_steps.tolist() == [3]


def test_five_in_a_row_solve_the_episode(env: CalvinEnv) -> None:
    env.reset([0], [0])
    results: list[ChunkResult] = [env.step_chunk([0], chunk((-1.0) ** i)) for i in range(LENGTH)]
    assert not any(result.done[0] for result in results[:-1])
    last = results[-1]
    assert (last.success[0], last.terminated[0], last.truncated[0], last.reward[0]) == (True, True, False, 1)
    assert last.metrics["chain_length"][0] == last.metrics["in_a_row_5"][0] * 5 == 5
    with pytest.raises(RuntimeError, match="no running episode"):
        env.step_chunk([0], chunk(0.0))


def test_a_subtask_that_takes_too_long_ends_the_chain_unsolved(env: CalvinEnv) -> None:
    env.reset([0], [0])
    env.step_chunk([0], chunk(1.0))
    results = [env.step_chunk([0], chunk(0.0)) for _ in range(2)]
    # Ten steps: eight, then two.
    assert [int(r.executed_steps[0]) for r in results] == [8, 2]
    last = results[1]
    assert (last.terminated[0], last.success[0], last.truncated[0]) == (True, False, False)
    assert last.metrics["chain_length"][0] == 1


def test_a_step_draws_nothing_unless_it_is_the_chunks_last(env: CalvinEnv) -> None:
    env.reset([0], [0])
    world: Any = env._slots[0].world
    drawn = world._env.drawn
    env.step_chunk([0], chunk(0.0))
    assert world._env.drawn == drawn + 1


def test_the_gripper_is_open_or_closed_and_the_callers_actions_stay_what_they_are(env: CalvinEnv) -> None:
    for command, expected in ((0.3, 1.0), (-0.3, -1.0), (0.0, -1.0)):
        env.reset([0], [0])
        actions = chunk(0.1, command)
        before = actions.copy()
        state = env.step_chunk([0], actions).observation.state
        assert state is not None
        assert state[0, 7] == expected
        assert np.array_equal(actions, before)
    assert isinstance(env.film(0), np.ndarray)
    assert env.film(0).shape == (200, 200, 3)


def test_training_states_have_chains_of_their_own_and_leave_numpys_generator_alone(env: CalvinEnv) -> None:
    np.random.seed(3)
    before = np.random.get_state()[1]
    words = [env.reset([0], [FIRST_TRAINING_STATE + i]).instruction for i in range(2)]
    assert words == [["open the drawer"], ["close the drawer"]]
    assert np.array_equal(np.random.get_state()[1], before)  # type: ignore[arg-type]


def test_a_chain_begins_with_an_open_gripper_whatever_the_one_before_ended_with(env: CalvinEnv) -> None:
    env.reset([0], [0])
    env.step_chunk([0], chunk(0.1, -1.0))
    state = env.reset([0], [1]).state
    assert state is not None
    assert state[0, 7] == 1


# --- what a user gets wrong


def test_several_simulations_in_a_process_are_refused_with_the_cure(clone: Path) -> None:
    with pytest.raises(ValueError, match=r"asked for 2 simulations.*workers\.envs_per_actor=1"):
        CalvinEnv(config(), 2)


def test_a_clone_without_git_is_refused_before_the_benchmark_breaks_on_it(clone: Path) -> None:
    (clone / ".git").rmdir()
    with pytest.raises(NotReadyError, match=r"no git repository, which CALVIN asks for.*git init"):
        find_clone(config())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"task": "open_drawer"}, "CALVIN has one, chains"),
        ({"options": {"subtask_step": 3}}, "Did you mean 'subtask_steps'"),
        ({"options": {"subtask_steps": 0}}, "must be at least 1"),
        ({"max_episode_steps": 360}, "needs 1800"),
        ({"image_size": 300}, "CALVIN draws 8 to 256 pixels"),
        ({"num_evaluation_states": 10}, "chains has 1000 chains"),
    ],
)
def test_what_cannot_be_is_said_before_a_simulator_is_looked_for(changes: dict[str, Any], complaint: str) -> None:
    fields = {"name": "calvin", "task": "chains", "max_episode_steps": 1800, **changes}
    with pytest.raises(ValueError, match=complaint):
        check_ready(SuiteConfig(**fields))


def test_the_one_task_is_known_by_name_number_and_all(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # `rlvla suites setup` plays task 0.
    for task in ("chains", "0", "all"):
        assert outline(compose("collect", ["suite=calvin", f"suite.task={task}"]).suite) == {"chains": 1000}
    monkeypatch.setattr(HOME.__class__, "complaint", lambda _: "")
    assert check_ready(compose("collect", ["suite=calvin", "suite.task=0"]).suite).notes == ()


def test_the_yaml_is_the_published_protocol() -> None:
    suite = compose("collect", ["suite=calvin"]).suite
    assert (suite.max_episode_steps, suite.num_evaluation_states, suite.image_size) == (5 * 360, 1000, 200)
    assert "calvin" in HELD_OUT
    assert homes()["calvin"] == HOME


def test_a_suite_that_is_not_set_up_or_has_no_clone_is_refused_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLVLA_SUITES", str(tmp_path))
    monkeypatch.delenv("RLVLA_CALVIN", raising=False)
    with pytest.raises(NotReadyError, match="calvin is not set up") as caught:
        check_ready(config())
    assert caught.value.fix == "rlvla suites setup calvin"
    with pytest.raises(NotReadyError, match="set RLVLA_CALVIN, or suite.options.root") as caught:
        find_clone(config())
    assert caught.value.fix == "git clone --recurse-submodules https://github.com/mees/calvin"


def test_a_clone_that_lacks_something_is_refused_with_the_first_of_it(clone: Path) -> None:
    assert find_clone(config()) == clone
    (clone / FILES[-1]).unlink()
    with pytest.raises(NotReadyError, match=r"or one of another version: .*new_playtable_tasks.yaml is missing"):
        find_clone(config())
    empty = clone / "without"
    (empty / "calvin_env").mkdir(parents=True)
    with pytest.raises(NotReadyError, match="Its submodules were not cloned"):
        find_clone(config(root=str(empty)))


def test_everything_in_the_environment_has_an_exact_version() -> None:
    lines = HOME.requirements()
    assert "pybullet==3.2.7" in lines
    assert all(line.count("==") == 1 and "://" not in line for line in lines)
