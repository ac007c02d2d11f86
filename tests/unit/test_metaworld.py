"""Meta-World without its simulator: tasks, words, states, configuration, and where its interpreter lives."""

from pathlib import Path

import numpy as np
import pytest

from rlvla.compose import compose, suite_files
from rlvla.suites import run
from rlvla_envs.base import FIRST_TRAINING_STATE, SuiteConfig
from rlvla_envs.metaworld import ACTION, CAMERAS, HOME, check_ready, memory_mb, outline
from rlvla_envs.metaworld_tasks import (
    ML10_TEST,
    ML10_TRAIN,
    MT10,
    STATE_NAMES,
    STATES_PER_TASK,
    STEP_LIMIT,
    SUITE_TASKS,
    WORDS,
    chosen_tasks,
    proprioception,
)
from rlvla_envs.suites import HELD_OUT, SUITES, NotReadyError, homes, interpreter_of, make_env

ALL = SuiteConfig(name="metaworld_mt10", task="all")


@pytest.fixture
def empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for environments in which there is none."""
    monkeypatch.setenv("RLVLA_SUITES", str(tmp_path))
    return tmp_path


# --- tasks and words


def test_a_policy_is_told_of_itself_and_neither_of_objects_nor_of_the_goal() -> None:
    observation = np.arange(39, dtype=np.float64)
    state = proprioception(observation)
    assert (state.tolist(), state.dtype) == ([0, 1, 2, 3], np.float32)
    assert len(STATE_NAMES) == len(state)


def test_the_gripper_closes_at_one_and_the_action_is_normalised() -> None:
    assert [(c.name, c.size, c.low, c.high) for c in ACTION] == [("translation", 3, -1, 1), ("gripper", 1, -1, 1)]
    assert ACTION[0].convention == "delta, world frame, 1 is 0.01 m"
    assert ACTION[1].convention == "effort, -1 opens, 1 closes"


def test_the_sets_are_the_benchmarks_sizes_and_what_is_held_out_is_never_trained_on() -> None:
    sizes = {name.removeprefix("metaworld_"): len(tasks) for name, tasks in SUITE_TASKS.items()}
    assert sizes == {"mt10": 10, "mt50": 50, "ml10_train": 10, "ml10_test": 5, "ml45_train": 45, "ml45_test": 5}
    for kind in ("ml10", "ml45"):
        assert not set(SUITE_TASKS[f"metaworld_{kind}_train"]) & set(SUITE_TASKS[f"metaworld_{kind}_test"])
    assert all(set(tasks) <= set(WORDS) and len(set(tasks)) == len(tasks) for tasks in SUITE_TASKS.values())


def test_no_two_tasks_are_told_in_the_same_words() -> None:
    assert len(set(WORDS.values())) == len(WORDS)
    assert all(words == words.strip().lower() and not words.endswith(".") for words in WORDS.values())


def test_tasks_are_chosen_by_name_number_or_all() -> None:
    assert chosen_tasks("metaworld_mt10", "all") == MT10
    assert chosen_tasks("metaworld_mt10", "0+push-v3") == ("reach-v3", "push-v3")
    assert chosen_tasks("metaworld_ml10_test", "4") == ("lever-pull-v3",)


@pytest.mark.parametrize(
    ("suite", "choice", "complaint"),
    [
        ("metaworld_mt10", "pick-place", "Did you mean 'pick-place-v3'"),
        ("metaworld_mt10", "pick-plaice-v3", "Did you mean 'pick-place-v3'"),
        ("metaworld_mt10", "sweep-v3", "It is one of metaworld_mt50, metaworld_ml10_train, metaworld_ml45_train"),
        ("metaworld_ml45_test", "5", "a number below 5"),
        ("metaworld_mt10", "0+reach-v3", "names a task twice"),
        ("metaworld_mt10", "", "'' is no task"),
    ],
)
def test_a_task_that_is_not_there_is_refused(suite: str, choice: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        chosen_tasks(suite, choice)


# --- configuration


@pytest.mark.parametrize("suite", SUITE_TASKS)
def test_the_yaml_has_the_benchmarks_limit_and_all_states(suite: str) -> None:
    config = compose("collect", [f"suite={suite}"]).suite
    assert (config.max_episode_steps, config.image_size, config.chunk_size) == (STEP_LIMIT, 256, 8)
    assert config.num_evaluation_states == STATES_PER_TASK * len(SUITE_TASKS[suite])
    assert config.python is None
    assert outline(config) == dict.fromkeys(SUITE_TASKS[suite], 50)


def test_every_set_is_a_suite_and_the_test_tasks_are_held_out() -> None:
    assert {name for name in SUITES if name.startswith("metaworld")} == set(SUITE_TASKS)
    assert {name for name in HELD_OUT if name.startswith("metaworld")} == {"metaworld_ml10_test", "metaworld_ml45_test"}
    assert not set(ML10_TRAIN) & set(ML10_TEST)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"options": {"camra": "corner2"}}, "Did you mean 'camera'"),
        ({"options": {"camera": "corner3"}}, "must be one of corner2, corner4"),
        ({"image_size": 2048}, "Meta-World draws 8 to 1024 pixels"),
        ({"num_evaluation_states": 100}, "but all has 500 evaluation states"),
        ({"task": "nothing"}, "'nothing' is no task of metaworld_mt10"),
    ],
)
def test_what_a_user_gets_wrong_is_said_before_a_simulator_is_looked_for(
    empty_place: Path, changes: dict[str, object], complaint: str
) -> None:
    fields = {"name": "metaworld_mt10", "task": "all", **changes}
    with pytest.raises(ValueError, match=complaint):
        check_ready(SuiteConfig(**fields))  # type: ignore[arg-type]
    assert CAMERAS[0] == "corner2"


def test_a_slot_more_takes_a_simulation_more() -> None:
    one = SuiteConfig(name="metaworld_mt10", task="0")
    assert memory_mb(one, 2) - memory_mb(one, 1) > 100
    assert memory_mb(ALL, 1) > memory_mb(one, 1)


# --- where it lives


def test_a_suite_that_is_not_set_up_is_refused_with_the_command(empty_place: Path) -> None:
    if HOME.is_here():
        pytest.skip("this interpreter has Meta-World itself")
    for ask in (check_ready, interpreter_of, lambda c: make_env(c, 1)):
        with pytest.raises(NotReadyError, match="metaworld is not set up") as caught:
            ask(ALL)
        assert caught.value.fix == "rlvla suites setup metaworld"


def test_everything_in_the_environment_has_an_exact_version() -> None:
    lines = HOME.requirements()
    assert {"metaworld==3.1.1", "mujoco==3.3.0"} <= set(lines)
    assert all(line.count("==") == 1 and "://" not in line for line in lines)
    assert lines == sorted(lines)
    assert not any(line.startswith("torch") for line in lines)


def test_the_status_says_where_the_environment_would_be(empty_place: Path) -> None:
    (found,) = run(compose("suites", ["status", "metaworld"]))["environments"]
    assert (found["folder"], found["status"]) == (str(empty_place / "metaworld"), "not set up")
    assert homes()["metaworld"] == HOME


def test_an_environments_name_lists_all_its_suites(empty_place: Path) -> None:
    listed = run(compose("suites", ["metaworld"]))["suites"]
    assert {entry["name"] for entry in listed} == {name for name in suite_files() if name.startswith("metaworld")}
    assert {entry["name"]: entry["role"] for entry in listed}["metaworld_ml45_test"] == "held-out"
    assert all(max(entry["states_by_task"].values()) < FIRST_TRAINING_STATE for entry in listed)
