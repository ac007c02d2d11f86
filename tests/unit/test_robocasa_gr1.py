"""RoboCasa-GR1 without its simulator: tasks, conventions, stand-ins for its assets, and that these give no score."""

import struct
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path

import pytest

from rlvla.compose import compose
from rlvla.suites import run
from rlvla_envs.base import SuiteConfig
from rlvla_envs.robocasa_gr1 import (
    ACTION,
    HOME,
    STAND_INS,
    check_ready,
    find_assets,
    make_stand_ins,
    memory_mb,
    outline,
)
from rlvla_envs.robocasa_gr1_standins import (
    ASSETS,
    BOX,
    CATEGORIES,
    REGISTRIES,
    VERSION,
    categories,
    missing_files,
    object_xml,
)
from rlvla_envs.robocasa_gr1_tasks import STATE_NAMES, STATES_PER_TASK, TASKS, chosen_tasks
from rlvla_envs.stand_ins import STAMP, is_current, picture
from rlvla_envs.suites import HELD_OUT, NotReadyError, homes, interpreter_of, make_env, stand_in_maker

ALL = SuiteConfig(name="robocasa_gr1", task="all", image_size=256, num_evaluation_states=1200)


@pytest.fixture
def empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for environments in which there is none."""
    monkeypatch.setenv("RLVLA_SUITES", str(tmp_path))
    return tmp_path


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """A virtual environment's folder with the least package whose assets are missing."""
    package = tmp_path / "lib/python3.11/site-packages/robocasa_gr1"
    toaster = package / ASSETS / "fixtures/toasters/plain"
    toaster.mkdir(parents=True)
    (toaster / "model.xml").write_text('<mujoco><mesh file="visuals/toast.obj"/><texture file="../grey.png"/></mujoco>')
    (package / ASSETS / "walls.yaml").write_text("wall:\n  texture: textures/flat/white.png\n")
    (package / CATEGORIES).parent.mkdir(parents=True)
    table = ", ".join(f"{name}=dict(scale=1.0)" for name in REGISTRIES)
    (package / CATEGORIES).write_text(f"OBJ_CATEGORIES = dict(cup=dict(types=('drink'), {table}))\n")
    return tmp_path


# --- tasks and conventions


def test_there_are_24_tasks_six_of_which_close_something() -> None:
    assert (len(TASKS), len(set(TASKS)), sum(name.endswith("Close") for name in TASKS)) == (24, 24, 6)
    assert chosen_tasks("0+PosttrainPnPNovelFromTrayToPotSplitA") == (TASKS[0], "PosttrainPnPNovelFromTrayToPotSplitA")
    assert outline(ALL) == dict.fromkeys(TASKS, STATES_PER_TASK)


def test_an_action_is_29_absolute_joint_targets_and_the_state_names_the_same_joints() -> None:
    assert [(c.name, c.size) for c in ACTION] == [
        ("left_arm", 7),
        ("right_arm", 7),
        ("left_hand", 6),
        ("right_hand", 6),
        ("waist", 3),
    ]
    assert {c.convention for c in ACTION} == {"absolute, joint targets, radians"}
    assert len(STATE_NAMES) == sum(c.size for c in ACTION) == 29
    assert (STATE_NAMES[0], STATE_NAMES[14], STATE_NAMES[28]) == ("left_arm.0", "left_hand.0", "waist.2")
    # An elbow rests at -2.1: the benchmark's declared [-1, 1] would cut it off.
    assert all(c.low < -2.1 for c in ACTION)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"task": "PnPCupToDrawClose"}, "Did you mean 'PnPCupToDrawerClose'"),
        ({"task": "24"}, "a number below 24"),
        ({"task": "0+PnPCupToDrawerClose"}, "names a task twice"),
        ({"options": {"camera": "agentview"}}, "must be one of ego_view, ego_view_cropped"),
        ({"image_size": 512}, "RoboCasa-GR1 draws 8 to 256 pixels"),
        ({"num_evaluation_states": 100}, "all has 1200 evaluation states"),
    ],
)
def test_what_a_user_gets_wrong_is_said_before_a_simulator_is_looked_for(
    empty_place: Path, changes: dict[str, object], complaint: str
) -> None:
    fields = {"name": "robocasa_gr1", "task": "all", "num_evaluation_states": 1200, "image_size": 256, **changes}
    with pytest.raises(ValueError, match=complaint):
        check_ready(SuiteConfig(**fields))  # type: ignore[arg-type]


def test_the_yaml_has_the_published_limit_and_all_states() -> None:
    config = compose("collect", ["suite=robocasa_gr1"]).suite
    assert (config.max_episode_steps, config.num_evaluation_states, config.image_size) == (720, 24 * 50, 256)
    assert "robocasa_gr1" in HELD_OUT
    assert memory_mb(config, 2) - memory_mb(config, 1) > 1000


# --- where it lives


def test_a_suite_that_is_not_set_up_is_refused_with_the_command(empty_place: Path) -> None:
    for ask in (check_ready, interpreter_of, lambda c: make_env(c, 1)):
        with pytest.raises(NotReadyError, match="robocasa_gr1 is not set up") as caught:
            ask(ALL)
        assert caught.value.fix == "rlvla suites setup robocasa_gr1"
    (found,) = run(compose("suites", ["status", "robocasa_gr1"]))["environments"]
    assert (found["folder"], found["status"]) == (str(empty_place / "robocasa_gr1"), "not set up")


def test_everything_in_the_environment_has_an_exact_version() -> None:
    lines = HOME.requirements()
    assert {"praxis-robocasa-gr1==0.2.0", "praxis-robosuite==1.5.2.post1", "mujoco==3.3.1", "numpy==2.2.5"} <= set(
        lines
    )
    assert all(line.count("==") == 1 and "://" not in line for line in lines)
    assert not any(line.startswith("torch") for line in lines)


# --- assets


def test_missing_assets_are_counted_and_both_cures_are_named(prefix: Path) -> None:
    # A mesh, a texture of the toaster, a texture of a wall, three libraries of objects.
    package = prefix / "lib/python3.11/site-packages/robocasa_gr1"
    assert len(missing_files(package, package / ASSETS)) == 6
    with pytest.raises(NotReadyError, match=r"6 files and folders of objects are missing.*stand_ins=true") as caught:
        find_assets(prefix)
    assert caught.value.fix == f"{prefix}/bin/python -m robocasa_gr1.scripts.download_tabletop_assets -y"


def test_stand_ins_leave_nothing_missing_and_touch_nothing_official(prefix: Path) -> None:
    package = prefix / "lib/python3.11/site-packages/robocasa_gr1"
    before = sorted(package.rglob("*"))
    # Three named files, and two objects in each of three libraries.
    assert make_stand_ins(prefix) == 3 + 2 * 3
    assert sorted(package.rglob("*")) == before
    assert missing_files(package, prefix / STAND_INS) == []
    found = find_assets(prefix)
    assert found.folder == prefix / STAND_INS
    assert "download_tabletop_assets" in found.unscored
    assert "smoke_test=true" in found.unscored


def test_official_assets_win_over_stand_ins_and_give_a_score(prefix: Path) -> None:
    make_stand_ins(prefix)
    assets = prefix / "lib/python3.11/site-packages/robocasa_gr1" / ASSETS
    for path in missing_files(assets.parents[1], assets):
        whole = path / "cup_0/model.xml" if path.name == "cup" else path
        whole.parent.mkdir(parents=True, exist_ok=True)
        whole.write_text("<mujoco/>")
    assert find_assets(prefix) == (assets, "")


def test_files_that_no_download_brings_are_not_missed_and_nothing_is_written_outside_the_stand_ins(
    prefix: Path,
) -> None:
    package = prefix / "lib/python3.11/site-packages/robocasa_gr1"
    kitchen = package / ASSETS / "arenas/kitchen.xml"
    kitchen.parent.mkdir()
    # Of a kitchen, and outside the assets.
    kitchen.write_text('<mujoco><mesh file="sink.obj"/><texture file="../../../../../../../ceramic.png"/></mujoco>')
    assert len(missing_files(package, package / ASSETS)) == 6
    before = {path for path in prefix.rglob("*") if prefix / STAND_INS not in path.parents}
    make_stand_ins(prefix)
    after = {path for path in prefix.rglob("*") if prefix / STAND_INS not in path.parents}
    assert after - before == {prefix / STAND_INS}


def test_a_category_without_an_object_is_missing_though_its_library_has_others(prefix: Path) -> None:
    package = prefix / "lib/python3.11/site-packages/robocasa_gr1"
    other = package / ASSETS / "objects" / REGISTRIES[0] / "spoon/spoon_0/model.xml"
    other.parent.mkdir(parents=True)
    other.write_text("<mujoco/>")
    assert package / ASSETS / "objects" / REGISTRIES[0] / "cup" in missing_files(package, package / ASSETS)


def test_stand_ins_of_another_release_or_half_written_are_not_taken(prefix: Path) -> None:
    make_stand_ins(prefix)
    stamp = prefix / STAND_INS / STAMP
    for content in ('{"version": 0}', "{", ""):
        stamp.write_text(content)
        assert not is_current(prefix / STAND_INS, VERSION)
        with pytest.raises(NotReadyError, match="its stand-ins are of another release"):
            find_assets(prefix)
    make_stand_ins(prefix)
    assert find_assets(prefix).unscored


def test_a_category_may_name_folders_of_its_own() -> None:
    folders = "model_folders=['objaverse/alcohol']"
    source = f"OBJ_CATEGORIES = dict(rum=dict(graspable=True, aigen=dict(), objaverse=dict({folders})))"
    assert categories(source) == {"rum": ["objaverse/alcohol"]}


def test_a_picture_is_a_whole_png_in_one_colour() -> None:
    data = picture(0)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (8, 8)
    body = data[data.index(b"IDAT") + 4 : -16]
    rows = zlib.decompress(body)
    # A filter byte and eight pixels in each of eight rows; the seed 0 is the darkest grey.
    assert rows == (b"\0" + bytes([96] * 24)) * 8
    assert picture(1) != data


def test_the_box_is_closed_and_ten_centimetres_wide() -> None:
    corners = [tuple(map(float, line.split()[1:])) for line in BOX.splitlines() if line.startswith("v ")]
    faces = [[int(c.split("/")[0]) - 1 for c in line.split()[1:]] for line in BOX.splitlines() if line.startswith("f ")]
    assert (len(corners), len(faces)) == (8, 12)
    # Of a closed surface that looks outwards: every edge once in each direction, and the volume is positive.
    edges = [(f[i], f[(i + 1) % 3]) for f in faces for i in range(3)]
    assert sorted(edges) == sorted((b, a) for a, b in edges)

    def signed(f: list[int]) -> float:
        (a, b, c), (d, e, g), (h, i, j) = (corners[k] for k in f)
        return (a * (e * j - g * i) - b * (d * j - g * h) + c * (d * i - e * h)) / 6

    assert sum(map(signed, faces)) == pytest.approx(0.1**3)


@pytest.mark.parametrize(("category", "places"), [("cup", 0), ("plate", 0), ("tiered_shelf", 1)])
def test_an_object_has_the_sites_that_placing_it_asks_for(category: str, places: int) -> None:
    root = ET.fromstring(object_xml(category))
    sites = {site.get("name"): site.get("pos", "").split() for site in root.findall("./worldbody/body/site")}
    assert set(sites) == {"bottom_site", "top_site", "horizontal_radius_site"}
    assert float(sites["bottom_site"][2]) == -float(sites["top_site"][2]) < 0
    geoms = root.findall("./worldbody/body/body/geom")
    assert sum((geom.get("name") or "").startswith("spawn_") for geom in geoms) == places
    assert [geom.get("group") for geom in geoms].count("0") == 1


def test_only_suites_without_assets_of_their_own_have_stand_ins() -> None:
    assert {name for name, home in homes().items() if stand_in_maker(home)} == {"robocasa_gr1", "robotwin"}
    with pytest.raises(ValueError, match="stand_ins=true, but metaworld installs its own assets"):
        run(compose("suites", ["setup", "metaworld", "stand_ins=true"]))
