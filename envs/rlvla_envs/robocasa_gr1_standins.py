"""Stand-ins for RoboCasa-GR1's assets, which this project may neither ship nor download: boxes and grey textures.

With them the suite starts and runs, so that adapter and policy can be tried. Nothing measured with them means anything,
and `EnvSpec.unscored` says so. They lie in a folder of their own and never beside the official ones. Needs the standard
library alone: it reads the package's files and imports nothing of it.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Iterator
from pathlib import Path

from rlvla_envs.stand_ins import colour_of, picture, stamp

VERSION = 1
"""Raised when other files are generated."""

ASSETS = Path("models/assets")
"""In the package."""
CATEGORIES = Path("models/objects/kitchen_objects.py")
REGISTRIES = ("objaverse", "sketchfab", "lightwheel")
"""Libraries of objects that the 24 tasks draw from."""
DOWNLOADED = ("fixtures", "textures", "generative_textures")
"""Folders of ``models/assets``, beside ``objects``, that the package's download fills. Its XML names files elsewhere
too, for kitchens and replaced textures, which nobody can bring and no tabletop task reads."""
OBJECTS_PER_CATEGORY = 2
"""Tasks hold a part of a category's objects back, which wants more than one."""
SHELVES = ("tiered_shelf", "tiered_basket")
"""Objects are put on named places of these."""


def missing_files(package: Path, assets: Path) -> list[Path]:
    """Downloaded files that the package's own XML and YAML files name and that are not there, and categories of objects
    without one.

    Args:
        package: folder of ``robocasa_gr1``.
        assets: folder laid out like its ``models/assets``.
    """
    named = [path for path in sorted(set(_named(assets))) if path.relative_to(assets).parts[0] in DOWNLOADED]
    absent = [path for path in named if not path.is_file()]
    table = categories((package / CATEGORIES).read_text())
    folders = [assets / "objects" / name for names in table.values() for name in names]
    return absent + [path for path in folders if next(path.glob("**/model.xml"), None) is None]


def _named(assets: Path) -> Iterator[Path]:
    """Files under ``assets`` that its own files name; objects, of which there may be gigabytes, bring theirs along."""
    objects = assets / "objects"
    for xml in assets.rglob("*.xml"):
        if objects in xml.parents:
            continue
        for name in re.findall(r'file="([^"]+)"', xml.read_text()):
            path = Path(os.path.normpath(xml.parent / name))
            if path.is_relative_to(assets):
                yield path
    for yaml in assets.rglob("*.yaml"):
        for name in re.findall(r"\btextures/[\w/.-]+\.png", yaml.read_text()):
            yield assets / name


def generate(package: Path, folder: Path) -> int:
    """Write a folder laid out like the package's ``models/assets`` in which nothing is missing.

    Args:
        package: folder of ``robocasa_gr1``.
        folder: replaced where there is one.

    Returns:
        How many files were made up.
    """
    shutil.rmtree(folder, ignore_errors=True)
    # Only what the wheel itself brought: official objects, should there be some, take gigabytes.
    shutil.copytree(package / ASSETS, folder, ignore=shutil.ignore_patterns("objects", "textures"))
    made = 0
    for path in sorted(set(_named(folder))):
        if path.is_file():
            continue
        if path.suffix not in (".png", ".obj"):
            raise RuntimeError(f"{path} is named by the package and is neither a picture nor a mesh; {VERSION=}.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(zlib.crc32(path.name.encode())) if path.suffix == ".png" else BOX.encode())
        made += 1
    for category, folders in sorted(categories((package / CATEGORIES).read_text()).items()):
        for name in folders:
            for number in range(OBJECTS_PER_CATEGORY):
                place = folder / "objects" / name / f"{category}_{number}"
                place.mkdir(parents=True, exist_ok=True)
                (place / "model.xml").write_text(object_xml(category))
                made += 1
    stamp(folder, VERSION, made)
    return made


def categories(source: str) -> dict[str, list[str]]:
    """Folders under ``objects`` of every category, from the source of the package's table.

    >>> categories(
    ...     "OBJ_CATEGORIES = dict(cup=dict(objaverse=dict()), rum=dict(lightwheel=dict(model_folders=['a/b'])))"
    ... )
    {'cup': ['objaverse/cup'], 'rum': ['a/b']}
    """
    table = next(
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OBJ_CATEGORIES"
    )
    assert isinstance(table, ast.Call)
    found: dict[str, list[str]] = {}
    for category in table.keywords:
        assert category.arg is not None
        assert isinstance(category.value, ast.Call)
        for registry in category.value.keywords:
            if registry.arg not in REGISTRIES:
                continue
            assert isinstance(registry.value, ast.Call)
            options = {option.arg: option.value for option in registry.value.keywords}
            own = options.get("model_folders")
            folders = ast.literal_eval(own) if own is not None else [f"{registry.arg}/{category.arg}"]
            found.setdefault(category.arg, []).extend(folders)
    return found


BOX = "".join(
    [
        *(f"v {x} {y} {z}\n" for x in (-0.05, 0.05) for y in (-0.05, 0.05) for z in (-0.05, 0.05)),
        "vt 0 0\nvt 1 0\nvt 0 1\n",
        *(
            f"f {a}/1 {b}/2 {c}/3\n"
            for a, b, c in (
                *((1, 2, 4), (1, 4, 3), (5, 7, 8), (5, 8, 6), (1, 5, 6), (1, 6, 2)),
                *((3, 4, 8), (3, 8, 7), (1, 3, 7), (1, 7, 5), (2, 6, 8), (2, 8, 4)),
            )
        ),
    ]
)
"""A cube with sides of 10 cm, as Wavefront OBJ."""


def object_xml(category: str) -> str:
    """A box in the shape that the benchmark wants of an object; containers are flat, so that others lie on them."""
    flat = category in ("plate", "tray", "cutting_board", "placemat", "bowl", "basket", "pan", "pot", "cardboard_box")
    x, y, z = (0.09, 0.09, 0.01) if flat else (0.12, 0.09, 0.05) if category in SHELVES else (0.03, 0.03, 0.04)
    root = ET.Element("mujoco", model=category)
    ET.SubElement(root, "asset")
    outer = ET.SubElement(ET.SubElement(root, "worldbody"), "body")
    body = ET.SubElement(outer, "body", name="object")
    colour = colour_of(category)
    box = {"type": "box", "size": f"{x} {y} {z}", "pos": "0 0 0"}
    ET.SubElement(body, "geom", {**box, "group": "1", "contype": "0", "conaffinity": "0", "mass": "0", "rgba": colour})
    ET.SubElement(body, "geom", {**box, "group": "0", "density": "100", "rgba": "0.5 0 0 0"})
    if category in SHELVES:
        place = {"type": "box", "size": f"{x} {y} 0.04", "pos": f"0 0 {z + 0.04}", "name": "spawn_0"}
        unseen = {"group": "1", "contype": "0", "conaffinity": "0", "mass": "0", "rgba": "0 0 0 0"}
        ET.SubElement(body, "geom", place | unseen)
    for name, place_of in (
        ("bottom_site", f"0 0 {-z}"),
        ("top_site", f"0 0 {z}"),
        ("horizontal_radius_site", f"{x} {y} 0"),
    ):
        ET.SubElement(outer, "site", {"name": name, "pos": place_of, "size": "0.005", "rgba": "0 0 0 0"})
    return ET.tostring(root, encoding="unicode")
