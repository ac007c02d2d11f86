"""One simulation of one RoboCasa-GR1 task: started from a seed, stepped, and drawn when asked.

The only file that imports the benchmark.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from rlvla_envs.common import quiet
from rlvla_envs.mujoco_drawing import Gate, cured, make_current
from rlvla_envs.robocasa_gr1_tasks import STREAMS
from rlvla_envs.slots import Look

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

ROBOT = "GR1ArmsAndWaistFourierHands"
CAMERA = "egoview_image"
FILM_SIZE = (480, 300)
"""Width and height; the head camera's picture is 1280 x 800."""
PARTS = {
    "left_arm": "left",
    "right_arm": "right",
    "left_hand": "left_gripper",
    "right_hand": "right_gripper",
    "waist": "torso",
}
"""The benchmark's data has the first names, robosuite the second."""


class World:
    """A simulation of ``task`` with pictures of ``size`` x ``size`` pixels.

    Args:
        assets: folder that the benchmark shall read. One process has one.
        cropped: pictures of the part that GR00T's own data shows.

    Raises:
        RuntimeError: the benchmark is not installed, a file is missing, or nothing can be drawn.
    """

    def __init__(self, task: str, size: int, assets: Path, *, cropped: bool) -> None:
        with quiet(), cured("RoboCasa-GR1", "robocasa_gr1"):
            # Read when MuJoCo is imported. OSMesa draws without any device.
            os.environ.setdefault("MUJOCO_GL", "osmesa")
            _point_to(assets)
            from robocasa_gr1.models.robots import gather_robot_observations
            from robocasa_gr1.utils.gym_utils.gymnasium_groot import GrootRoboCasaEnv

            self._wrapper: Any = GrootRoboCasaEnv(env_name=task, robots_name=ROBOT)
        self._env: Any = self._wrapper.env
        self._joints: Any = gather_robot_observations
        self._size, self._cropped = size, cropped
        self._gate: Gate | None = None
        self.language = ""

    def start_stored(self, index: int) -> Look:
        """Start with the objects and places that ``index`` alone decides."""
        return self._start(index)

    def start_drawn(self, seed: int) -> Look:
        return self._start(seed)

    def _start(self, seed: int) -> Look:
        """The benchmark's own seeding reaches numpy's global generator only; scenes come from the simulation's own."""
        self._env.rng = np.random.default_rng(seed)
        before = np.random.get_state()
        np.random.seed(seed % 2**32)
        # A reset frees the cameras of the scene before.
        make_current(self._env)
        try:
            with quiet(), cured("RoboCasa-GR1", "robocasa_gr1"):
                seen = self._env.reset()
        finally:
            np.random.set_state(before)
        # A reset builds the scene, and its cameras, anew.
        observable = self._env._observables[CAMERA]
        self._gate = observable._sensor = Gate(self._env, observable._sensor, seen[CAMERA].shape)
        self._gate.picture = seen[CAMERA]
        # What the benchmark's data has as instructions; the first words say which joints may move.
        self.language = f"unlocked_waist: {self._env.get_ep_meta().get('lang', '')}"
        return self._look(seen)

    def step(self, action: Float[np.ndarray, "29"], *, draw: bool) -> tuple[bool, Look]:
        """One control step; whether the task is solved, and what is seen."""
        assert self._gate is not None
        self._gate.open = draw
        seen, reward, _, _ = self._env.step(self._command(action))
        return bool(reward > 0), self._look(seen if draw else None)

    def film(self) -> UInt8[np.ndarray, "h w 3"]:
        """A picture for people."""
        width, height = FILM_SIZE
        make_current(self._env)
        picture = self._env.sim.render(width=width, height=height, camera_name="egoview")
        return np.ascontiguousarray(picture[::-1])

    def close(self) -> None:
        make_current(self._env)
        self._env.close()

    def _command(self, action: Float[np.ndarray, "29"]) -> Float[np.ndarray, " n"]:
        """The 29 numbers at robosuite's places."""
        controller = self._env.robots[0].composite_controller
        command = np.zeros(controller.action_limits[0].shape)
        first = 0
        for name, size in STREAMS:
            begin, end = controller._action_split_indexes[PARTS[name]]
            command[begin:end] = action[first : first + size]
            first += size
        return command

    def _look(self, seen: Any) -> Look:
        """Args: seen: robosuite's observations; None where nothing was drawn."""
        joints = self._joints(self._env)
        state = np.concatenate([joints[f"robot0_{PARTS[name]}"] for name, _ in STREAMS]).astype(np.float32)
        return Look(None if seen is None else (self._picture(seen[CAMERA]),), state)

    def _picture(self, raw: UInt8[np.ndarray, "800 1280 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """The benchmark's own way from the camera to 256 x 256; smaller ones by area from there."""
        upright = np.ascontiguousarray(raw[::-1])
        scale = self._wrapper.process_img_cotrain if self._cropped else self._wrapper.process_img
        picture: UInt8[np.ndarray, "h w 3"] = scale(upright)
        if self._size != picture.shape[0]:
            import cv2

            picture = cv2.resize(picture, (self._size, self._size), interpolation=cv2.INTER_AREA)
        return np.ascontiguousarray(picture)


class _Pointed(importlib.abc.MetaPathFinder):
    """Tells the benchmark's models where the assets are before any of its modules has read the place."""

    def __init__(self, assets: Path) -> None:
        self.assets = assets

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "robocasa_gr1.models":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                module.assets_root = str(self.assets)

            loader.exec_module = exec_module
        return spec


def _point_to(assets: Path) -> None:
    if "robocasa_gr1" not in sys.modules:
        finder = _Pointed(assets)
        sys.meta_path.insert(0, finder)
        try:
            import robocasa_gr1
        finally:
            sys.meta_path.remove(finder)
    import robocasa_gr1.models

    if Path(robocasa_gr1.models.assets_root) != assets:
        raise RuntimeError(
            f"this process has read {robocasa_gr1.models.assets_root} and cannot read {assets} as well; start another."
        )
