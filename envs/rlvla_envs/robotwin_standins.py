"""Stand-ins for RoboTwin's assets, which this project may neither ship nor download: a robot of boxes, plain pictures.

With them the tasks that want no objects start and run, so that adapter and policy can be tried: the others name meshes
of which nobody could make up the places to grasp. Nothing measured with them means anything, and `EnvSpec.unscored`
says so. Needs the standard library alone.
"""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path
from typing import Any

from rlvla_envs.stand_ins import colour_of, picture, stamp

VERSION = 1
"""Raised when other files are generated."""

EMBODIMENT = "aloha-agilex"
"""The robot of the published evaluations."""
REQUIRED = (
    f"assets/embodiments/{EMBODIMENT}/config.yml",
    "assets/background_texture/seen",
    "assets/background_texture/unseen",
    "assets/objects/same.json",
    "assets/objects/objaverse/list.json",
)
"""Of the official snapshot: what a suite cannot start without. Every task has folders of objects beside these."""
TEXTURES = 4
"""Of each kind; the benchmark counts what is there and draws a number."""
CLUTTER = ("box", "brick", "cube")
"""Things that lie about on a randomized table."""
CLUTTER_SIDE = 0.04
"""Metres."""

SIDES = {"left": 0.3, "right": -0.3}
"""Where an arm's foot is, metres to the robot's left."""
FOOT = 0.85
"""Metres above the floor: 11 cm above the table."""
UPPER, FORE, WRIST = 0.35, 0.35, 0.1
"""Metres."""
HOME = (0.0, -0.9, 1.5, 0.0, 0.3, 0.0)
"""Radians: over the table's near edge, looking down."""
FINGER_WAY = 0.045
"""Metres that a finger moves."""
JOINTS = (
    # Axis, where it is on the link before, lowest and highest angle, the link's length.
    ("0 0 1", 0.0, -2.6, 2.6, 0.0),
    ("0 1 0", 0.0, -2.0, 2.0, UPPER),
    ("0 1 0", UPPER, -2.8, 2.8, FORE),
    ("1 0 0", FORE, -2.0, 2.0, 0.0),
    ("0 1 0", 0.0, -1.8, 1.8, WRIST),
    ("1 0 0", WRIST, -3.1, 3.1, 0.05),
)


def missing_files(root: Path) -> list[Path]:
    """What an official snapshot must have and ``root`` lacks."""
    return [root / name for name in REQUIRED if not (root / name).exists()]


def generate(folder: Path) -> int:
    """Write a folder laid out like the official snapshot, with a robot and without objects.

    Args:
        folder: replaced where there is one.

    Returns:
        How many files were made up.
    """
    shutil.rmtree(folder, ignore_errors=True)
    robot = folder / "assets/embodiments" / EMBODIMENT
    files: dict[Path, bytes] = {
        robot / "robot.urdf": robot_urdf().encode(),
        # YAML reads JSON.
        robot / "config.yml": json.dumps(robot_config(), indent=1).encode(),
    }
    for kind in ("seen", "unseen"):
        for number in range(TEXTURES):
            file = folder / "assets/background_texture" / kind / f"{number}.png"
            files[file] = picture(zlib.crc32(f"{kind}{number}".encode()))
    objects = folder / "assets/objects"
    files[objects / "same.json"] = b"{}"
    files[objects / "objaverse/list.json"] = json.dumps(clutter_list()).encode()
    for name in CLUTTER:
        files[objects / "objaverse" / name / "0/model.urdf"] = clutter_urdf(name).encode()
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    stamp(folder, VERSION, len(files))
    return len(files)


def robot_config() -> dict[str, Any]:
    """What the benchmark asks of an embodiment's config.yml."""
    arms = {side: [f"{side}_joint{i + 1}" for i in range(len(JOINTS))] for side in SIDES}
    return {
        "urdf_path": "robot.urdf",
        "joint_stiffness": 1000,
        "joint_damping": 200,
        "gripper_stiffness": 1000,
        "gripper_damping": 200,
        "planner": "mplib_RRT",
        "move_group": [f"{side}_link6" for side in SIDES],
        "ee_joints": [f"{side}_joint6" for side in SIDES],
        "arm_joints_name": list(arms.values()),
        "gripper_name": [
            {"base": f"{side}_finger1_joint", "mimic": [[f"{side}_finger2_joint", 1.0, 0.0]]} for side in SIDES
        ],
        "gripper_bias": 0.12,
        "gripper_scale": [0.0, FINGER_WAY],
        "homestate": [list(HOME) for _ in SIDES],
        # Behind the table, looking at it.
        "robot_pose": [[0, -0.65, 0, 0.7071, 0, 0, 0.7071]],
        "grasp_perfect_direction": ["front_right", "front_left"],
        "rotate_lim": [0, 0],
        "static_camera_list": [
            {"name": "head_camera", "position": [0, -0.45, 1.35], "forward": [0, 0.6, -0.8], "left": [-1, 0, 0]}
        ],
    }


def robot_urdf() -> str:
    """Two arms of boxes on one post: six hinges, two fingers and a camera each."""
    robot = ET.Element("robot", name="stand-in")
    _box_link(robot, "base", (0.2, 0.8, FOOT - 0.1), (0, 0, (FOOT - 0.1) / 2), "0.3 0.3 0.35 1")
    for side, place in SIDES.items():
        before = "base"
        for i, (axis, along, low, high, length) in enumerate(JOINTS):
            link = f"{side}_link{i + 1}"
            thick = 0.05 - 0.005 * i
            _box_link(robot, link, (max(length, thick), thick, thick), (length / 2, 0, 0), colour_of(link))
            origin = f"0 {place} {FOOT}" if i == 0 else f"{along} 0 0"
            _joint(robot, f"{side}_joint{i + 1}", "revolute", (before, link), origin, axis, (low, high))
            before = link
        for number, way in ((1, 1), (2, -1)):
            finger = f"{side}_finger{number}"
            _box_link(robot, finger, (0.08, 0.01, 0.02), (0.04, 0.005 * way, 0), "0.1 0.1 0.1 1")
            _joint(robot, f"{finger}_joint", "prismatic", (before, finger), "0.05 0 0", f"0 {way} 0", (0, FINGER_WAY))
        ET.SubElement(robot, "link", name=f"{side}_camera")
        # Behind and above the fingers, tilted towards their tips.
        joint = ET.SubElement(robot, "joint", name=f"{side}_camera_joint", type="fixed")
        ET.SubElement(joint, "parent", link=before)
        ET.SubElement(joint, "child", link=f"{side}_camera")
        ET.SubElement(joint, "origin", xyz="-0.05 0 0.08", rpy="0 0.4 0")
    return ET.tostring(robot, encoding="unicode")


def clutter_list() -> dict[str, Any]:
    """What the benchmark asks of objaverse/list.json: names, and how much room each takes."""
    full = [f"{name}_0" for name in CLUTTER]
    return {
        "item_names": list(CLUTTER),
        "list_of_items": {name: ["0"] for name in CLUTTER},
        "z_max": dict.fromkeys(full, CLUTTER_SIDE),
        "radius": dict.fromkeys(full, CLUTTER_SIDE * 0.75),
        "z_offset": dict.fromkeys(full, 0.0),
    }


def clutter_urdf(name: str) -> str:
    """A cube that stands on its origin."""
    root = ET.Element("robot", name=name)
    _box_link(root, name, (CLUTTER_SIDE,) * 3, (0, 0, CLUTTER_SIDE / 2), colour_of(name))
    return ET.tostring(root, encoding="unicode")


def _box_link(
    robot: ET.Element, name: str, size: tuple[float, float, float], place: tuple[float, float, float], colour: str
) -> None:
    link = ET.SubElement(robot, "link", name=name)
    inertial = ET.SubElement(link, "inertial")
    ET.SubElement(inertial, "mass", value="1")
    ET.SubElement(inertial, "inertia", ixx="0.01", iyy="0.01", izz="0.01", ixy="0", ixz="0", iyz="0")
    for kind in ("visual", "collision"):
        part = ET.SubElement(link, kind)
        ET.SubElement(part, "origin", xyz=" ".join(map(str, place)))
        ET.SubElement(ET.SubElement(part, "geometry"), "box", size=" ".join(map(str, size)))
        if kind == "visual":
            ET.SubElement(ET.SubElement(part, "material", name=f"{name}_colour"), "color", rgba=colour)


def _joint(
    robot: ET.Element,
    name: str,
    kind: str,
    links: tuple[str, str],
    origin: str,
    axis: str,
    limits: tuple[float, float],
) -> None:
    joint = ET.SubElement(robot, "joint", name=name, type=kind)
    ET.SubElement(joint, "parent", link=links[0])
    ET.SubElement(joint, "child", link=links[1])
    ET.SubElement(joint, "origin", xyz=origin)
    ET.SubElement(joint, "axis", xyz=axis)
    ET.SubElement(joint, "limit", lower=str(limits[0]), upper=str(limits[1]), effort="1000", velocity="10")
