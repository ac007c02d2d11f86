"""The WidowX tasks without a simulator: which task a state belongs to, where things lie, when a task is solved."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlvla_envs import simpler_assets, suites
from rlvla_envs.base import FIRST_TRAINING_STATE, ChunkResult, Observation, SuiteConfig
from rlvla_envs.simpler_assets import BRIDGE, check_assets, prepare_assets, required_files
from rlvla_envs.simpler_geometry import euler_xyz, matrix_of, rotation_by, rotation_vector
from rlvla_envs.simpler_rules import Contacts, Situation
from rlvla_envs.simpler_tasks import (
    SUITE_TASKS,
    Task,
    chosen_tasks,
    clear_of_each_other,
    configuration_of,
    turned,
    yaw_of,
)
from rlvla_envs.suites import check_memory, make_env

EVERY_TASK = [task for tasks in SUITE_TASKS.values() for task in tasks.values()]
every_task = pytest.mark.parametrize("task", EVERY_TASK, ids=lambda task: task.name)

# --- which tasks


def test_a_task_is_named_alone_or_with_others_or_all() -> None:
    def names(text: str) -> list[str]:
        return [task.name for task in chosen_tasks("simpler_env", text)]

    assert names("stack_cube") == ["stack_cube"]
    assert names("spoon_on_towel+carrot_on_plate") == ["spoon_on_towel", "carrot_on_plate"]
    assert names("all") == ["carrot_on_plate", "spoon_on_towel", "stack_cube", "eggplant_in_basket"]
    assert [task.name for task in chosen_tasks("simpler_env_ood", "all")] == [
        "move_away",
        "move_right",
        "place_near",
        "place_right",
        "put_in_front",
        "stack_yellow",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("carot_on_plate", r"suite.task is 'carot_on_plate'.* Did you mean 'carrot_on_plate'\?"),
        ("stack_cube+spon_on_towel", r"has no task 'spon_on_towel'. Did you mean 'spoon_on_towel'\?"),
        ("move_away", "It is a task of suite=simpler_env_ood"),
        ("stack_cube+stack_cube", "names a task twice"),
        ("", "several joined with"),
    ],
)
def test_a_task_that_does_not_exist_is_refused_with_what_may_have_been_meant(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        chosen_tasks("simpler_env", text)


def test_what_a_user_gets_wrong_is_said_before_the_simulator_is_imported(run_python: Callable[[str], str]) -> None:
    code = """
import sys
from rlvla_envs.base import SuiteConfig
from rlvla_envs.suites import make_env
for wrong in (dict(task="x"), dict(task="all", options={"asets": "x"}), dict(task="all", options={"assets": "/no"}),
              dict(task="all", options={"sim_backend": "physx_gpu"}), dict(task="all", options={"success": "x"})):
    try:
        make_env(SuiteConfig(name="simpler_env", **wrong), 1)
    except ValueError as error:
        print(str(error).splitlines()[0])
print(sorted({"torch", "mani_skill", "sapien"} & set(sys.modules)))
"""
    *said, loaded = run_python(code).splitlines()
    assert loaded == "[]"
    assert len(said) == 5
    for line, part in zip(
        said, ("suite.task is 'x'", "Did you mean 'assets'", "is missing", "physx_cuda", "strict"), strict=True
    ):
        assert part in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_simulation_on_a_gpu_is_refused_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="torch sees no GPU"):
        make_env(SuiteConfig(name="simpler_env", task="all", options={"sim_backend": "physx_cuda"}), 4)


# --- which state is what


@pytest.mark.parametrize(
    ("suite", "counts"), [("simpler_env", [24, 24, 24, 63]), ("simpler_env_ood", [24, 20, 24, 24, 20, 24])]
)
def test_the_evaluation_states_visit_every_configuration_once(suite: str, counts: list[int]) -> None:
    tasks = chosen_tasks(suite, "all")
    visited = [configuration_of(tasks, state) for state in range(sum(counts))]
    assert visited == [(i, k) for i, task in enumerate(tasks) for k in task.configurations]
    assert [len(task.configurations) for task in tasks] == counts
    for state in (-1, sum(counts), FIRST_TRAINING_STATE - 1):
        with pytest.raises(ValueError, match="neither an evaluation state"):
            configuration_of(tasks, state)


def test_the_eggplants_configuration_61_is_no_task() -> None:
    assert 61 not in SUITE_TASKS["simpler_env"]["eggplant_in_basket"].configurations


def test_no_two_configurations_of_a_task_are_alike() -> None:
    for task in EVERY_TASK:
        layouts = {task.layout(k).tobytes() for k in task.configurations}
        assert len(layouts) == len(task.configurations), task.name


def test_training_states_take_turns_over_the_tasks() -> None:
    tasks = chosen_tasks("simpler_env", "stack_cube+carrot_on_plate")
    assert [configuration_of(tasks, FIRST_TRAINING_STATE + i) for i in range(3)] == [(0, None), (1, None), (0, None)]


@every_task
def test_a_training_state_is_near_a_configuration_and_is_none(task: Task) -> None:
    enumerated = np.array([task.layout(k) for k in task.configurations])
    seen = set()
    for state in range(FIRST_TRAINING_STATE, FIRST_TRAINING_STATE + 100):
        layout = task.training_layout(state)
        assert np.array_equal(layout, task.training_layout(state))
        assert not np.array_equal(layout, task.training_layout(state, attempt=1))
        distance = np.linalg.norm((enumerated - layout)[:, :, :2], axis=2).max(axis=1)
        assert 1e-6 < distance.min() < 0.0213  # 15 mm along x and along y
        seen.add(layout.tobytes())
    assert len(seen) == 100


@every_task
def test_no_training_state_puts_one_thing_into_another(task: Task) -> None:
    if task.scene == "sink":
        pytest.skip("the basket is far from the sink's floor")
    for state in range(FIRST_TRAINING_STATE, FIRST_TRAINING_STATE + 200):
        source, target = task.training_layout(state)
        assert clear_of_each_other(task.source, source, task.target, target)


def test_turning_turns_about_the_worlds_vertical() -> None:
    flat = np.array([1.0, 0.0, 0.0, 0.0])
    assert yaw_of(turned(turned(flat, 0.3), 0.4)) == pytest.approx(0.7)
    assert np.linalg.norm(turned(np.array([0.5, 0.5, -0.5, 0.5]), 1.0)) == pytest.approx(1)


# --- when a task is solved


TOUCH = {"force": 1.0, "others": False, "robot": False}


def situation(task: Task, offset: tuple[float, float, float], **changes: Any) -> Situation:
    """The source at an offset from the target; resting on it and touched by nothing else, unless `TOUCH` changes."""
    target = np.array([[-0.16, 0.0, 0.8695]])
    touch = Contacts(*(np.array([changes.pop(key, usual)]) for key, usual in TOUCH.items()))
    start = np.array([[-0.16, -0.15, 0.8875]])
    base = Situation(
        source=target + offset,
        target=target,
        source_start=start,
        target_start=target,
        source_half=np.array([[0.0575, 0.016, 0.019]]),
        target_half=np.array([[0.055, 0.055, 0.003]]),
        speed=np.array([0.0]),
        contacts=lambda: touch,
    )
    return base._replace(**changes)


def solved(name: str, rule: Any, offset: tuple[float, float, float], **changes: Any) -> bool:
    task = next(task for task in EVERY_TASK if task.name == name)
    return bool(task.rules[rule](situation(task, offset, **changes))[0])


def test_strict_wants_the_carrot_on_the_plate_alone_and_let_go() -> None:
    on = (0.0, 0.0, 0.02)
    assert solved("carrot_on_plate", "strict", on)
    assert not solved("carrot_on_plate", "strict", on, others=True)
    assert not solved("carrot_on_plate", "strict", on, robot=True)
    assert not solved("carrot_on_plate", "strict", on, force=0.0)
    assert not solved("carrot_on_plate", "strict", (0.09, 0.0, 0.02))
    assert not solved("carrot_on_plate", "strict", (0.0, 0.0, 0.05))


def test_maniskills_rule_takes_what_is_held_or_half_on_the_table() -> None:
    for changes in ({}, {"others": True}, {"robot": True}):
        assert solved("carrot_on_plate", "maniskill", (0.0, 0.0, 0.02), **changes)
    assert not solved("carrot_on_plate", "maniskill", (0.0, 0.0, 0.02), force=0.0)


def test_the_spoon_may_lie_partly_beside_the_towel_and_is_let_go() -> None:
    assert solved("spoon_on_towel", "strict", (0.07, 0.0, 0.01), others=True, force=0.0)
    assert not solved("spoon_on_towel", "strict", (0.07, 0.0, 0.01), robot=True)
    assert solved("spoon_on_towel", "maniskill", (0.07, 0.0, 0.01), robot=True)


LOW = 0.018  # the height at which the source began, above the target's


@pytest.mark.parametrize(
    ("name", "offset", "changes", "expected"),
    [
        # The source began at (0, -0.15) from the target.
        ("move_away", (0.0, 0.18, LOW), {"force": 0.0}, True),
        ("move_away", (0.0, 0.16, LOW), {"force": 0.0}, False),
        ("move_away", (0.0, -0.175, LOW), {"force": 0.0}, False),
        ("move_right", (0.0, 0.06, LOW), {"force": 0.0}, True),
        ("move_right", (0.0, -0.06, LOW), {"force": 0.0}, False),
        ("move_right", (0.08, 0.06, LOW), {"force": 0.0}, False),
        ("place_near", (0.0, -0.10, LOW), {"force": 0.0}, True),
        ("place_near", (0.0, -0.10, LOW), {"force": 0.1}, False),
        ("place_near", (0.0, -0.13, LOW), {"force": 0.0}, False),
        ("place_right", (0.0, 0.03, LOW), {}, True),
        ("place_right", (0.0, -0.03, LOW), {}, False),
        ("put_in_front", (0.10, 0.0, LOW), {"force": 0.0}, True),
        ("put_in_front", (-0.10, 0.0, LOW), {"force": 0.0}, False),
        ("stack_yellow", (0.0, 0.0, 0.03), {}, True),
    ],
)
def test_the_relation_of_an_out_of_distribution_task(
    name: str, offset: tuple[float, float, float], changes: dict[str, Any], expected: bool
) -> None:
    assert solved(name, "strict", offset, **changes) is expected
    if expected:
        assert not solved(name, "strict", offset, **changes, robot=True)
        assert not solved(name, "strict", offset, **changes, speed=np.array([0.06]))
        moved_target = situation(EVERY_TASK[0], offset).target + np.array([0.04, 0, 0])
        assert not solved(name, "strict", offset, **changes, target_start=moved_target)


# --- assets


@pytest.fixture
def asset_folder(tmp_path: Path) -> Path:
    """A complete folder of empty files with real metadata."""
    data = tmp_path / "data"
    tasks = chosen_tasks("simpler_env", "all")
    for path in required_files(data, tasks):
        (data / path).parent.mkdir(parents=True, exist_ok=True)
        (data / path).write_text("")
    for name in {task.metadata for task in tasks}:
        models = {model: {"bbox": {}} for task in tasks for model in (task.source, task.target)}
        (data / BRIDGE / "custom" / name).write_text(json.dumps(models))
    return tmp_path


def test_a_complete_asset_folder_has_nothing_to_note(asset_folder: Path) -> None:
    assert check_assets(asset_folder, chosen_tasks("simpler_env", "all")) == ()


def test_a_missing_file_is_named_with_the_command_that_brings_it(asset_folder: Path) -> None:
    missing = asset_folder / "data" / BRIDGE / "custom/models/eggplant/collision.obj"
    missing.unlink()
    check_assets(asset_folder, chosen_tasks("simpler_env", "stack_cube"))  # does not need it
    with pytest.raises(ValueError, match="download_asset bridge_v2_real2sim widowx250s") as caught:
        check_assets(asset_folder, chosen_tasks("simpler_env", "all"))
    assert str(missing) in str(caught.value)


def test_a_mesh_that_the_robots_description_names_is_asked_for(asset_folder: Path) -> None:
    urdf = asset_folder / "data/robots/widowx/wx250s.urdf"
    urdf.write_text('<mesh filename="meshes/finger.stl"/>')
    with pytest.raises(ValueError, match="widowx/meshes/finger.stl is missing"):
        check_assets(asset_folder, chosen_tasks("simpler_env", "stack_cube"))


def test_metadata_without_a_model_is_of_another_version(asset_folder: Path) -> None:
    (asset_folder / "data" / BRIDGE / "custom/info_bridge_custom_v0.json").write_text("{}")
    with pytest.raises(ValueError, match="does not describe bridge_carrot_generated_modified.*another\n?.*version"):
        check_assets(asset_folder, chosen_tasks("simpler_env", "carrot_on_plate"))


def test_a_stand_in_is_recognised_by_its_checksum_and_only_where_it_is_used(
    asset_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = "custom/models/eggplant/textured.glb"
    empty = hashlib.sha256(b"").hexdigest()
    monkeypatch.setattr(simpler_assets, "STAND_INS", {path: (empty, "a ball")})
    assert check_assets(asset_folder, chosen_tasks("simpler_env", "all")) == (f"stand-in: {path}: a ball",)
    assert check_assets(asset_folder, chosen_tasks("simpler_env", "stack_cube")) == ()


def test_another_folder_than_the_one_maniskill_was_imported_with_is_refused(
    asset_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MS_ASSET_DIR", "/elsewhere")
    tasks = chosen_tasks("simpler_env", "stack_cube")
    monkeypatch.setitem(sys.modules, "mani_skill", SimpleNamespace(ASSET_DIR=Path("/elsewhere/data")))
    with pytest.raises(ValueError, match="was imported in this process with /elsewhere/data"):
        prepare_assets(str(asset_folder), tasks)
    monkeypatch.setitem(sys.modules, "mani_skill", SimpleNamespace(ASSET_DIR=asset_folder / "data"))
    assert prepare_assets(str(asset_folder), tasks) == ()


# --- what else is refused


@pytest.mark.parametrize(
    ("free", "cure"),
    [
        # Two processes of 1000 MB, and 4 tasks x 12 MB for each environment.
        (4000, "workers.envs_per_actor=20 fits"),
        (1500, "workers.num_actors=1 with one environment each fits"),
        (500, "not even one fits"),
    ],
)
def test_more_environments_than_fit_are_refused_with_what_fits(
    monkeypatch: pytest.MonkeyPatch, free: int, cure: str
) -> None:
    monkeypatch.setattr(suites, "available_mb", lambda: free)
    config = SuiteConfig(name="simpler_env", task="all")
    with pytest.raises(ValueError, match=rf"30 environments in each of 2 processes need about 4880 MB .*{cure}"):
        check_memory(config, 30, 2)
    check_memory(SuiteConfig(), 1000, 16)


def test_a_spare_process_counts_and_is_the_first_to_go(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SuiteConfig(name="simpler_env", task="all")
    # Three processes of 1000 MB and 30 x 4 x 12 MB: 7320.
    monkeypatch.setattr(suites, "available_mb", lambda: 7320)
    check_memory(config, 30, 2, spare=True)
    monkeypatch.setattr(suites, "available_mb", lambda: 7319)
    check_memory(config, 30, 2)
    with pytest.raises(ValueError, match=r"in a spare one need about 7320 MB and 7319 MB .*workers.spare=false fits"):
        check_memory(config, 30, 2, spare=True)
    # Where there is no room for the others, the spare is not the point.
    monkeypatch.setattr(suites, "available_mb", lambda: 4000)
    with pytest.raises(ValueError, match=r"2 processes need about 4880 MB .*workers.envs_per_actor=20 fits"):
        check_memory(config, 30, 2, spare=True)


def test_the_out_of_distribution_tasks_have_one_rule() -> None:
    config = SuiteConfig(name="simpler_env_ood", task="move_away", options={"success": "maniskill"})
    with pytest.raises(ValueError, match="move_away has the one rule that is ours"):
        make_env(config, 1)


# --- the records


def test_metrics_travel_with_their_rows() -> None:
    def result(value: float) -> ChunkResult:
        one = np.ones(1)
        seen = Observation({"camera": np.zeros((1, 2, 2, 3), np.uint8)}, ["do it"])
        return ChunkResult(seen, one, one, one, one, one, {"success_maniskill": np.array([value], np.float32)})

    joined = ChunkResult.concatenate([result(0.0), result(1.0)])
    assert joined.metrics["success_maniskill"].tolist() == [0, 1]


# --- the experts' rotations


def test_rotations_agree_with_scipy() -> None:
    from scipy.spatial.transform import Rotation

    rng = np.random.default_rng(0)
    for vector in rng.uniform(-0.8, 0.8, (20, 3)):
        oracle = Rotation.from_rotvec(vector)
        x, y, z, w = oracle.as_quat()
        assert np.allclose(rotation_by(vector), oracle.as_matrix())
        assert np.allclose(matrix_of(np.array([w, x, y, z])), oracle.as_matrix())
        assert np.allclose(rotation_vector(oracle.as_matrix()), vector)
        assert np.allclose(euler_xyz(oracle.as_matrix()), oracle.as_euler("XYZ"))
