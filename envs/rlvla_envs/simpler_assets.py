"""The files that the WidowX tasks need: found, checked and named before a simulator starts.

ManiSkill reads the folder from MS_ASSET_DIR when it is imported, ends the process when a file is missing, and does not
notice an older set. Here each of these is an error that says what to do.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from rlvla_envs.simpler_tasks import Task

DOWNLOAD = "python -m mani_skill.utils.download_asset bridge_v2_real2sim widowx250s"

BRIDGE = Path("tasks/bridge_v2_real2sim_dataset")
ROBOT = Path("robots/widowx")
STAGE = {"table": "stages/bridge_table_1_v1.glb", "sink": "stages/bridge_table_1_v2.glb"}
BACKGROUND = {"table": "real_inpainting/bridge_real_eval_1.png", "sink": "real_inpainting/bridge_sink.png"}

_SLAB = "85facae014ff1d566540cd429b4dc059af5ab39a91e36daf1ee6760e62a99beb"
STAND_INS = {
    STAGE["table"]: (_SLAB, "a flat slab instead of the table's mesh; collision only"),
    STAGE["sink"]: (_SLAB, "a flat slab instead of the table's mesh; collision only"),
    "custom/models/eggplant/textured.glb": (
        "8a2c6e12c20d35f547c119de93452df6016044644922a3827ca7ec21127ab8ac",
        "the collision mesh in one colour instead of the textured eggplant",
    ),
}
"""Replacements known by their SHA-256, and what they replace."""


def prepare_assets(option: str | None, tasks: Iterable[Task]) -> tuple[str, ...]:
    """Point ManiSkill at the asset folder, after checking that it holds what the tasks need.

    Args:
        option: ``suite.options.assets``; None takes MS_ASSET_DIR, then ManiSkill's own default.

    Returns:
        A note for every stand-in in use. Whoever reports a number obtained with one says so.

    Raises:
        ValueError: a file or model is missing, or ManiSkill was already imported with another folder.
    """
    root = asset_root(option)
    notes = check_assets(root, tasks)
    loaded = sys.modules.get("mani_skill")
    if loaded is not None and Path(loaded.ASSET_DIR).resolve() != root / "data":
        raise ValueError(
            f"the asset folder is {root}, but ManiSkill was imported in this process with {loaded.ASSET_DIR} and "
            f"cannot change it. Set MS_ASSET_DIR={root} before the program starts."
        )
    os.environ["MS_ASSET_DIR"] = str(root)
    return notes


def asset_root(option: str | None) -> Path:
    """The folder that holds ``data/``: ``suite.options.assets``, else MS_ASSET_DIR, else ManiSkill's default."""
    return Path(option or os.environ.get("MS_ASSET_DIR") or Path.home() / ".maniskill").expanduser().resolve()


def check_assets(root: Path, tasks: Iterable[Task]) -> tuple[str, ...]:
    """The check of `prepare_assets` alone; ``root`` is what MS_ASSET_DIR would be."""
    tasks = tuple(tasks)
    data = root / "data"
    for path in required_files(data, tasks):
        if not (data / path).is_file():
            raise ValueError(
                f"the SimplerEnv assets are incomplete: {data / path} is missing. Download them with\n"
                f"  MS_ASSET_DIR={root} {DOWNLOAD}\nor set suite.options.assets (or MS_ASSET_DIR) to the folder "
                "that holds data/."
            )
    for task in tasks:
        described = json.loads((data / BRIDGE / "custom" / task.metadata).read_text())
        for model in (task.source, task.target):
            if "bbox" not in described.get(model, {}):
                raise ValueError(
                    f"{data / BRIDGE / 'custom' / task.metadata} does not describe {model}: the asset folder is of "
                    f"another version. Download this one's with\n  MS_ASSET_DIR={root} {DOWNLOAD}"
                )
    used = {str(path.relative_to(BRIDGE)) for path in required_files(data, tasks) if path.is_relative_to(BRIDGE)}
    return tuple(
        f"stand-in: {path}: {what}"
        for path, (checksum, what) in STAND_INS.items()
        if path in used and hashlib.sha256((data / BRIDGE / path).read_bytes()).hexdigest() == checksum
    )


def required_files(data: Path, tasks: Iterable[Task]) -> Iterator[Path]:
    """Every file that the tasks open, relative to ``data``. Repeats some."""
    yield ROBOT / "wx250s.srdf"
    yield ROBOT / "wx250s.urdf"
    urdf = data / ROBOT / "wx250s.urdf"
    if urdf.is_file():
        yield from (ROBOT / mesh for mesh in re.findall(r'mesh filename="([^"]+)"', urdf.read_text()))
    for task in tasks:
        yield BRIDGE / "custom" / task.metadata
        yield BRIDGE / STAGE[task.scene]
        yield BRIDGE / BACKGROUND[task.scene]
        for model in (task.source, task.target, *(("sink",) if task.scene == "sink" else ())):
            folder = BRIDGE / "custom/models" / model
            yield folder / "collision.obj"
            # ManiSkill takes the first of these that exists.
            shapes = [folder / f"textured.{suffix}" for suffix in ("obj", "dae", "glb")]
            yield next((shape for shape in shapes if (data / shape).is_file()), shapes[-1])
