"""RoboTwin without its simulator: tasks, conventions, seeds, stand-ins for its assets, and that these give no score."""

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlvla.compose import compose
from rlvla.suites import run
from rlvla_envs.base import SuiteConfig
from rlvla_envs.common import boxed
from rlvla_envs.robotwin import (
    ACTION,
    HOME,
    OFFICIAL,
    Assets,
    RoboTwinEnv,
    arms_spec,
    check_ready,
    find_assets,
    make_stand_ins,
    memory_mb,
    outline,
    seeds_of,
)
from rlvla_envs.robotwin_standins import EMBODIMENT, REQUIRED, missing_files, robot_config, robot_urdf
from rlvla_envs.robotwin_tasks import (
    BOX_TASKS,
    FIRST_SEED,
    STATE_NAMES,
    STATES_PER_TASK,
    STEP_LIMITS,
    SUITE_CONFIGS,
    TASKS,
    chosen_tasks,
    read_seeds,
    seeds_to_try,
)
from rlvla_envs.slots import Look, Slot, SlottedEnv
from rlvla_envs.stand_ins import FOLDER, STAMP
from rlvla_envs.suites import HELD_OUT, NotReadyError, homes, interpreter_of, make_env, trial_task

ALL = SuiteConfig(name="robotwin_easy", image_size=224, num_evaluation_states=5000, task="all", max_episode_steps=1700)


def changed(**changes: Any) -> SuiteConfig:
    return SuiteConfig(**{**vars(ALL), **changes})


@pytest.fixture(autouse=True)
def no_assets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROBOTWIN_ASSETS_ROOT", raising=False)


@pytest.fixture
def empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for environments in which there is none."""
    monkeypatch.setenv("RLVLA_SUITES", str(tmp_path))
    return tmp_path


def write_official(root: Path) -> None:
    """The least that passes for the official snapshot."""
    for name in REQUIRED:
        path = root / name
        if path.suffix:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
        else:
            path.mkdir(parents=True, exist_ok=True)


# --- tasks and conventions


def test_there_are_50_tasks_with_limits_of_400_to_1700_and_five_want_no_objects() -> None:
    assert (len(TASKS), len(set(TASKS)), len(BOX_TASKS)) == (50, 50, 5)
    assert set(BOX_TASKS) <= set(TASKS)
    assert (min(STEP_LIMITS.values()), max(STEP_LIMITS.values())) == (400, 1700)
    assert (STEP_LIMITS["put_bottles_dustbin"], STEP_LIMITS["stack_blocks_two"]) == (1700, 800)
    assert chosen_tasks("robotwin_easy", "0+turn_switch") == ("adjust_bottle", "turn_switch")
    assert outline(ALL) == dict.fromkeys(TASKS, STATES_PER_TASK)


def test_an_action_is_six_joints_and_a_gripper_for_each_arm_and_the_state_names_the_same() -> None:
    assert [(c.name, c.size, c.high) for c in ACTION] == [
        ("left_arm", 6, 2 * math.pi),
        ("left_gripper", 1, 1.0),
        ("right_arm", 6, 2 * math.pi),
        ("right_gripper", 1, 1.0),
    ]
    assert all(c.convention == "absolute, 0 closed, 1 open" for c in ACTION if c.size == 1)
    assert len(STATE_NAMES) == sum(c.size for c in ACTION) == 14
    assert (STATE_NAMES[0], STATE_NAMES[6], STATE_NAMES[13]) == ("left_arm.0", "left_gripper", "right_gripper")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"task": "stack_block_two"}, "no task of robotwin_easy. Did you mean 'stack_blocks_two'"),
        ({"task": "50"}, "a number below 50"),
        ({"task": "0+adjust_bottle"}, "names a task twice"),
        ({"options": {"instructions": "new"}}, "suite.options.instructions is 'new'; it must be one of unseen, seen"),
        ({"options": {"shader": "rtx"}}, "it must be one of default, rt"),
        ({"options": {"shaders": "rt"}}, "Did you mean 'shader'"),
        ({"options": {"seeds": "/nowhere.json"}}, "seeds=/nowhere.json cannot be read"),
        ({"image_size": 640}, "RoboTwin draws 8 to 320 pixels"),
        ({"num_evaluation_states": 100}, "all has 5000 evaluation states"),
    ],
)
def test_what_a_user_gets_wrong_is_said_before_a_simulator_is_looked_for(
    empty_place: Path, changes: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_ready(changed(**changes))


def test_both_yamls_have_the_longest_limit_and_all_states() -> None:
    for name in SUITE_CONFIGS:
        config = compose("collect", [f"suite={name}"]).suite
        assert (config.name, config.max_episode_steps, config.num_evaluation_states) == (name, 1700, 50 * 100)
        assert name in HELD_OUT
        assert memory_mb(config, 2) - memory_mb(config, 1) >= 600


class Counted:
    """A world in which nothing is ever solved."""

    def start_stored(self, index: int) -> Look:
        return Look(None, np.zeros(14, dtype=np.float32))

    start_drawn = start_stored

    def step(self, action: np.ndarray, *, draw: bool) -> tuple[bool, Look]:
        return False, self.start_stored(0)

    def close(self) -> None:
        pass


class Limited(SlottedEnv[Any]):
    """RoboTwin's limits over `Counted`."""

    _step_limit = RoboTwinEnv._step_limit

    def __init__(self, config: SuiteConfig) -> None:
        self._tasks = chosen_tasks(config.name, config.task)
        spec = arms_spec(config, self._tasks, Assets(Path("/"), ""), variant="", notes=())
        super().__init__(config, 1, spec, render_every_step=False)

    def _make(self, task: int) -> Counted:
        return Counted()

    def _worded(self, slot: Slot[Any]) -> str:
        return "go"


@pytest.mark.parametrize(("limit", "steps"), [(1700, [400, 800]), (500, [400, 500])])
def test_an_episode_ends_at_its_own_tasks_limit_or_the_users_whichever_is_first(limit: int, steps: list[int]) -> None:
    config = changed(task="click_bell+stack_blocks_two", chunk_size=64, max_episode_steps=limit, image_size=8)
    env = Limited(config)
    played = []
    for state in (0, STATES_PER_TASK):
        env.reset([0], [state])
        count = 0
        while True:
            result = env.step_chunk([0], np.zeros((1, 64, 14), dtype=np.float32))
            count += int(result.executed_steps[0])
            if result.done[0]:
                assert result.truncated[0]
                break
        played.append(count)
    assert played == steps


def test_a_wide_picture_lies_between_black_bars_and_is_never_enlarged() -> None:
    wide = np.full((240, 320, 3), 7, dtype=np.uint8)
    square = boxed(wide, 320)
    assert np.array_equal(square[40:280], wide)
    assert not square[:40].any()
    assert not square[280:].any()
    larger = boxed(wide, 400)
    assert (int((larger == 7).sum()), larger.shape) == (wide.size, (400, 400, 3))


# --- seeds


def test_a_state_is_a_seed_and_one_that_falls_over_is_replaced_by_no_other_states_seed() -> None:
    seeds = seeds_of(changed(task="stack_blocks_two"))["stack_blocks_two"]
    assert len(seeds) == STATES_PER_TASK
    assert seeds[0][:3] == [FIRST_SEED, FIRST_SEED + 100, FIRST_SEED + 200]
    every = [seed for tried in seeds for seed in tried]
    assert len(set(every)) == len(every)
    assert seeds_to_try(2_000_000)[0] == 2_000_000


def test_seeds_of_an_expert_are_taken_in_order_and_have_no_replacement(tmp_path: Path) -> None:
    file = tmp_path / "seeds.json"
    numbers = [*range(100_002, 100_202, 2), 5]
    file.write_text(json.dumps({"stack_blocks_two": {"task_name": "stack_blocks_two", "success_seeds": numbers}}))
    config = changed(task="stack_blocks_two", options={"seeds": str(file)})
    assert seeds_of(config)["stack_blocks_two"] == [[seed] for seed in numbers[:100]]
    for content, complaint in (
        ({"stack_blocks_two": {"success_seeds": numbers[:20]}}, "has 20 different seeds for stack_blocks_two"),
        ({"stack_blocks_two": {"success_seeds": [7] * 100}}, "has 1 different seeds"),
        ({"stack_blocks_two": {"success_seeds": ["7"]}}, "has no list of seeds for stack_blocks_two"),
        ([], "has no list of seeds"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=complaint):
            read_seeds(file, ("stack_blocks_two",))


# --- where it lives


def test_a_suite_that_is_not_set_up_is_refused_with_the_command(empty_place: Path) -> None:
    for ask in (check_ready, interpreter_of, lambda c: make_env(c, 1)):
        with pytest.raises(NotReadyError, match="robotwin is not set up") as caught:
            ask(ALL)
        assert caught.value.fix == "rlvla suites setup robotwin"
    (found,) = run(compose("suites", ["status", "robotwin"]))["environments"]
    assert (found["folder"], found["status"]) == (str(empty_place / "robotwin"), "not set up")


def test_both_suites_share_an_environment_that_is_tried_with_a_task_without_objects() -> None:
    assert homes()["robotwin"] is HOME
    assert {trial_task(name) for name in SUITE_CONFIGS} == {"stack_blocks_two"} <= set(BOX_TASKS)
    assert trial_task("calvin") == "0"


def test_everything_in_the_environment_has_an_exact_version() -> None:
    lines = HOME.requirements()
    wanted = {"rlinf-robotwin-runtime==0.1.3", "sapien==3.0.1", "mplib==0.2.1", "toppra==0.6.3", "torch==2.13.0"}
    assert wanted | {"numpy==1.26.4", "scipy==1.10.1", "gymnasium==0.29.1", "trimesh==4.4.3"} <= set(lines)
    assert all(line.count("==") == 1 and "://" not in line for line in lines)
    assert set(HOME.alone) <= {line.partition("==")[0] for line in lines}
    assert not any(line.startswith("open3d") for line in lines)


# --- assets


def test_missing_assets_name_both_cures(tmp_path: Path) -> None:
    with pytest.raises(
        NotReadyError, match=r"robotwin_easy has no assets: .*config.yml is missing.*stand_ins=true"
    ) as c:
        find_assets(tmp_path, "robotwin_easy", TASKS)
    assert c.value.fix == f"{tmp_path}/bin/robotwin-download-assets --output {tmp_path}/official"


def test_stand_ins_are_whole_and_serve_the_tasks_without_objects(tmp_path: Path) -> None:
    assert make_stand_ins(tmp_path) == 2 + 2 * 4 + 2 + 3
    assert missing_files(tmp_path / FOLDER) == []
    found = find_assets(tmp_path, "robotwin_hard", BOX_TASKS[:2])
    assert found.folder == tmp_path / FOLDER
    assert "robotwin-download-assets" in found.unscored
    assert "suite.task=blocks_ranking_rgb+blocks_ranking_size smoke_test=true" in found.unscored
    spec = arms_spec(changed(task=BOX_TASKS[0]), BOX_TASKS[:1], found, variant="", notes=("n",))
    assert spec.unscored == found.unscored
    assert spec.notes == (f"stand-in: every asset in {found.folder}", "n")


def test_a_task_that_wants_objects_is_refused_on_stand_ins_before_anything_starts(tmp_path: Path) -> None:
    make_stand_ins(tmp_path)
    with pytest.raises(NotReadyError, match=r"no objects: 45 of 50 tasks need some, the first is adjust_bottle"):
        find_assets(tmp_path, "robotwin_easy", TASKS)


def test_official_assets_win_over_stand_ins_give_a_score_and_may_lie_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_stand_ins(tmp_path)
    write_official(tmp_path / OFFICIAL)
    assert find_assets(tmp_path, "robotwin_easy", TASKS) == (tmp_path / OFFICIAL, "")
    write_official(tmp_path / "elsewhere")
    monkeypatch.setenv("ROBOTWIN_ASSETS_ROOT", str(tmp_path / "elsewhere"))
    assert find_assets(tmp_path, "robotwin_easy", TASKS) == (tmp_path / "elsewhere", "")


def test_stand_ins_do_not_pass_for_official_assets_wherever_the_variable_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_stand_ins(tmp_path)
    monkeypatch.setenv("ROBOTWIN_ASSETS_ROOT", str(tmp_path / FOLDER))
    assert find_assets(tmp_path, "robotwin_easy", BOX_TASKS).unscored


def test_stand_ins_of_another_release_are_not_taken(tmp_path: Path) -> None:
    make_stand_ins(tmp_path)
    (tmp_path / FOLDER / STAMP).write_text('{"version": 0}')
    with pytest.raises(NotReadyError, match="its stand-ins are of another release"):
        find_assets(tmp_path, "robotwin_easy", BOX_TASKS)


def test_the_robot_of_boxes_has_every_joint_and_link_that_its_config_names() -> None:
    robot, config = ET.fromstring(robot_urdf()), robot_config()
    joints = {joint.get("name"): joint for joint in robot.findall("joint")}
    links = {link.get("name") for link in robot.findall("link")}
    for arm, fingers in zip(config["arm_joints_name"], config["gripper_name"], strict=True):
        named = [*arm, fingers["base"], *(mimic[0] for mimic in fingers["mimic"])]
        assert set(named) <= set(joints)
    assert set(config["move_group"]) | {"left_camera", "right_camera"} <= links
    # One tree: every link but the base is the child of one joint, and parents are there.
    children = [joint.find("child").get("link") for joint in joints.values()]  # type: ignore[union-attr]
    assert sorted(children) == sorted(links - {"base"})  # type: ignore[type-var]
    assert {joint.find("parent").get("link") for joint in joints.values()} <= links  # type: ignore[union-attr]
    # It begins where its joints can be.
    for arm, home in zip(config["arm_joints_name"], config["homestate"], strict=True):
        for name, angle in zip(arm, home, strict=True):
            limit = joints[name].find("limit")
            assert limit is not None
            assert float(limit.get("lower", "")) < angle < float(limit.get("upper", ""))
    assert EMBODIMENT == "aloha-agilex"
