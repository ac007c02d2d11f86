"""Trials: draw a picture, play a chunk, ask for conventions. Each in a process of its own: a broken driver ends it."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from rlvla_envs.base import FIRST_TRAINING_STATE, SuiteConfig
from rlvla_envs.suites import make_env


def draw(device: str) -> dict[str, Any]:
    """Draw a white box with Vulkan through SAPIEN. Only a picture proves a driver: an old one loads, then throws.

    Args:
        device: "cpu" (a software driver) or "cuda".

    Returns:
        ``right``: whether the box is where it should be.
    """
    os.environ.setdefault("LP_NUM_THREADS", "1")
    import sapien

    system = sapien.render.RenderSystem(device)
    scene = sapien.Scene([sapien.physx.PhysxCpuSystem(), system])
    scene.set_ambient_light([1, 1, 1])
    box = scene.create_actor_builder()
    box.add_box_visual(half_size=[0.1, 0.1, 0.1])
    box.build_static(name="box")
    camera = scene.add_camera("camera", width=16, height=16, fovy=1.0, near=0.01, far=10.0)
    camera.set_entity_pose(sapien.Pose([-0.5, 0, 0]))
    scene.update_render()
    camera.take_picture()
    colour = camera.get_picture("Color")
    # White in the middle; alpha is 0 where there is nothing.
    return {"right": bool(colour[8, 8].min() > 0 and colour[0, 0, 3] == 0)}


def play(config: dict[str, Any]) -> dict[str, Any]:
    """Start a suite with one environment, begin an episode and run a chunk that asks for the middle of every range.

    Args:
        config: the fields of a `SuiteConfig`.

    Returns:
        ``spec`` as a dictionary, the episode's ``instruction``, ``blank`` (cameras that showed one colour only) and
        ``peak_mb`` of this process, None where the system does not say.
    """
    env = make_env(SuiteConfig(**config), 1)
    first = env.reset([0], [FIRST_TRAINING_STATE])
    middle = [(c.low + c.high) / 2 for c in env.spec.action for _ in range(c.size)]
    action = np.nan_to_num(np.asarray(middle, dtype=np.float32))  # an open range has no middle
    env.step_chunk([0], np.tile(action, (1, env.spec.chunk_size, 1)))
    return {
        "spec": env.spec.to_dict(),
        "instruction": first.instruction[0],
        "blank": [name for name, image in first.images.items() if image.min() == image.max()],
        "peak_mb": _peak_mb(),
    }


def conventions(config: dict[str, Any]) -> dict[str, Any]:
    """`EnvSpec.to_dict` of a suite, which is started with one environment to ask; ``config`` as for `play`."""
    env = make_env(SuiteConfig(**config), 1)
    try:
        return env.spec.to_dict()
    finally:
        env.close()


def _peak_mb() -> int | None:
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    return int(found[1]) // 1024 if found else None
