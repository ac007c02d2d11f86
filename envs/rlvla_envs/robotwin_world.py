"""One simulation of one RoboTwin task: set up from a seed, stepped, and drawn when asked.

The only file that imports the benchmark. What the benchmark wants a GPU or cuRobo for is replaced here, in memory and
before it is used (`patch`); its files are not changed.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlvla_envs.common import boxed, quiet
from rlvla_envs.robotwin_standins import EMBODIMENT
from rlvla_envs.robotwin_tasks import MOVES, seeds_to_try
from rlvla_envs.slots import After, Look
from rlvla_envs.vulkan_drawing import building_simulator

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

CAMERAS = ("head_camera", "left_camera", "right_camera")
CLEAR_EVERY = 5
"""Episodes after which the renderer forgets textures and meshes, as in the benchmark's own configuration."""
CLUTTER_X, CLUTTER_Y = (-0.59, 0.59), (-0.34, 0.34)
"""Metres; the benchmark's own, see `World._set_up`."""


class Code(NamedTuple):
    """The benchmark's own code for one task."""

    task: Callable[[], Any]
    passed_over: tuple[type[Exception], ...]
    """Raised where a seed cannot be used: its objects do not stand still."""
    describe: Callable[..., list[dict[str, Any]]]
    """Instructions of an episode."""
    settings: dict[str, Any]
    """Arguments of ``setup_demo``."""


class World:
    """A simulation of ``task`` with pictures of ``size`` x ``size`` pixels.

    Args:
        code: see `load`.
        words: ``seen`` or ``unseen`` instructions.
        seeds: of every evaluation state, those to try in turn.
    """

    tries = MOVES
    """Seeds for an episode."""

    def __init__(self, task: str, code: Code, size: int, words: str, seeds: Sequence[Sequence[int]]) -> None:
        self._name, self._code, self._size, self._words, self._seeds = task, code, size, words, seeds
        self._task: Any = None
        self._episodes = 0
        self._random: Any = None
        self.language, self.seed, self.after = "", 0, After()

    def start_stored(self, index: int) -> Look:
        return self._start(self._seeds[index])

    def start_drawn(self, seed: int) -> Look:
        return self._start(seeds_to_try(seed, self.tries))

    def _start(self, seeds: Sequence[int]) -> Look:
        """Begin with the first of ``seeds`` that can be used.

        Raises:
            RuntimeError: none does.
        """
        complaint: Exception | None = None
        for moves, seed in enumerate(seeds):
            self._forget()
            try:
                with building_simulator("RoboTwin"), cured(), quiet(), self._own_random():
                    self._task = self._set_up(seed)
            except self._code.passed_over as error:
                complaint = error
                continue
            self.seed, self.language = seed, self._told(seed)
            self.after = After(metrics=self._measured(moves))
            return self.see()
        raise RuntimeError(
            f"{self._name} cannot begin with any of the seeds {', '.join(map(str, seeds))}: {complaint}. "
            "One of suite.options.seeds has to be taken out of that list."
        )

    def _set_up(self, seed: int) -> Any:
        task = self._code.task()
        # The benchmark moves these limits in place with every table that stands aside, for all later episodes.
        task.get_cluttered_table = lambda: type(task).get_cluttered_table(task, xlim=[*CLUTTER_X], ylim=[*CLUTTER_Y])
        task.setup_demo(now_ep_num=0, seed=seed, is_test=True, **copy.deepcopy(self._code.settings))
        task._update_render()
        # An action is hundreds of physics steps, and the benchmark hands each to the renderer. What it draws from
        # random numbers on the way, such as flickering lights, stays; who looks pays for a scene that can be seen.
        task.scene.update_render = lambda: None
        return task

    def _told(self, seed: int) -> str:
        found = self._code.describe(self._name, [self._episode_info()], 1, seed)
        sentences = found[0][self._words] if found else []
        if not sentences:
            raise RuntimeError(
                f"RoboTwin has no {self._words} instruction for {self._name}; set suite.options.instructions."
            )
        return str(sentences[0])

    def _episode_info(self) -> dict[str, str]:
        """What the instruction's blanks are filled with."""
        # Of three tasks the expert plays to find out which arm takes what, and leaves the scene as it is then. Where it
        # is told that planning has failed, it says the same and moves nothing.
        self._task.plan_success = False
        try:
            return dict(self._task.get_info())
        finally:
            self._task.plan_success = True

    def _measured(self, moves: int) -> dict[str, float]:
        """See `ChunkResult.metrics`."""
        return {"seed_moves": float(moves)}

    def step(self, action: Float[np.ndarray, "14"], *, draw: bool) -> tuple[bool, Look]:
        """Go to these joints, as fast as mplib allows; whether the task was solved on the way, and what is seen."""
        with quiet(), self._own_random():
            self._task.take_action(action, action_type="qpos")
        return bool(self._task.eval_success), self.see() if draw else Look(None, self._state())

    def see(self) -> Look:
        """Draw what is there now."""
        self._show()
        cameras = self._task.cameras
        cameras.update_picture()
        pictures = cameras.get_rgb()
        return Look(tuple(boxed(pictures[name]["rgb"], self._size) for name in CAMERAS), self._state())

    def film(self) -> UInt8[np.ndarray, "480 640 3"]:
        """A picture for people."""
        self._show()
        return np.ascontiguousarray(self._task.cameras.get_observer_rgb())

    def close(self) -> None:
        self._forget(clear=True)

    def _show(self) -> None:
        type(self._task.scene).update_render(self._task.scene)

    def _state(self) -> Float[np.ndarray, "14"]:
        """Where the joints were last told to be, as in the benchmark's data: not where they are."""
        robot = self._task.robot
        joints = robot.get_left_arm_jointState() + robot.get_right_arm_jointState()
        return np.asarray(joints, dtype=np.float32)

    def _forget(self, *, clear: bool = False) -> None:
        if self._task is None:
            return
        self._episodes += 1
        with quiet():
            self._task.close_env(clear_cache=clear or self._episodes % CLEAR_EVERY == 0)
        self._task = None

    @contextlib.contextmanager
    def _own_random(self) -> Iterator[None]:
        """The benchmark draws from numpy's global generator, which the simulations of a process would share."""
        before = np.random.get_state()
        if self._random is not None:
            np.random.set_state(self._random)
        try:
            yield
        finally:
            self._random = np.random.get_state()
            np.random.set_state(before)


def load(task: str, config: str, assets: Path, shader: str) -> Code:
    """The installed benchmark's code for a task.

    Args:
        config: of its task configurations: ``demo_clean`` or ``demo_randomized``.
        assets: folder in which there is ``assets``. One process has one.
        shader: ``default`` rasterizes; ``rt`` traces rays as the benchmark does, which wants a GPU that can.

    Raises:
        RuntimeError: the benchmark is not installed or a file is missing.
    """
    with cured(), quiet():
        point_to(assets)
        patch("robotwin.envs", shader)
        read: Any = importlib.import_module("robotwin.config").load_task_config
        return Code(
            task=getattr(importlib.import_module(f"robotwin.envs.{task}"), task),
            passed_over=(importlib.import_module("robotwin.envs.utils.create_actor").UnStableError,),
            describe=importlib.import_module("robotwin.description").generate_episode_descriptions,
            settings=settings_of(task, read(config), read("_camera_config"), assets),
        )


def settings_of(task: str, config: dict[str, Any], cameras: dict[str, Any], assets: Path) -> dict[str, Any]:
    """What the benchmark's evaluation passes to ``setup_demo``."""
    import yaml

    robot = assets / "assets/embodiments" / EMBODIMENT
    embodiment = yaml.safe_load((robot / "config.yml").read_text())
    head = cameras[config["camera"]["head_camera_type"]]
    return {
        **config,
        "task_name": task,
        "head_camera_h": head["h"],
        "head_camera_w": head["w"],
        "left_robot_file": str(robot),
        "right_robot_file": str(robot),
        "dual_arm_embodied": True,
        "left_embodiment_config": embodiment,
        "right_embodiment_config": embodiment,
        "embodiment_name": EMBODIMENT,
        "eval_mode": True,
        "render_freq": 0,
    }


def point_to(assets: Path) -> None:
    """Say where the assets are, in the two variables that the benchmark reads."""
    for name in ("ROBOTWIN_ASSETS_ROOT", "ASSETS_PATH"):
        os.environ[name] = str(assets)


def patch(package: str, shader: str, *, plans_joints_only: bool = True) -> None:
    """Make the benchmark run without a GPU, cuRobo and open3d. Before any of its tasks is imported.

    * open3d, 400 MB, is imported and used for point clouds alone, which nobody here asks for.
    * Its renderer traces rays and removes their noise on a GPU; ``default`` rasterizes, which Mesa's lavapipe can.
    * Its robot builds a cuRobo planner, on a GPU, for poses; joint targets want mplib's time parameterization alone.

    Args:
        package: of the benchmark's code: ``robotwin.envs``, or ``envs`` in a clone.
        shader: see `load`.
        plans_joints_only: replace the planner; who wants the benchmark's expert does not.
    """
    if "open3d" not in sys.modules and importlib.util.find_spec("open3d") is None:
        sys.modules["open3d"] = ModuleType("open3d")
    render: Any = importlib.import_module("sapien.render")
    if not hasattr(render, "rlvla_set_camera_shader_dir"):
        render.rlvla_set_camera_shader_dir = render.set_camera_shader_dir
        render.rlvla_set_ray_tracing_denoiser = render.set_ray_tracing_denoiser
    original, denoise = render.rlvla_set_camera_shader_dir, render.rlvla_set_ray_tracing_denoiser
    render.set_camera_shader_dir = lambda _: original(shader)
    render.set_ray_tracing_denoiser = denoise if shader == "rt" else lambda _: None
    if not plans_joints_only:
        return
    robot: Any = importlib.import_module(f"{package}.robot.robot")
    planner: Any = importlib.import_module(f"{package}.robot.planner").MplibPlanner

    def set_planner(self: Any, scene: Any = None) -> None:
        self.communication_flag = False
        for side in ("left", "right"):
            names = ("urdf_path", "srdf_path", "move_group", "entity_origion_pose", "entity", "planner_type")
            found = planner(*(getattr(self, f"{side}_{name}") for name in names), scene)
            # The first plans fingers, the second joints.
            setattr(self, f"{side}_planner", found)
            setattr(self, f"{side}_mplib_planner", found)

    robot.Robot.set_planner = set_planner


@contextlib.contextmanager
def cured(name: str = "RoboTwin") -> Iterator[None]:
    """Around what reads the benchmark's files.

    Raises:
        RuntimeError: a package or a file is missing; the message has the cure.
    """
    try:
        yield
    except (ImportError, FileNotFoundError) as error:
        raise RuntimeError(
            f"{name} cannot start: {error}. `rlvla suites setup robotwin` installs RoboTwin's code or repairs what is "
            f"there; docs/how-to/robotwin.md says what else {name} needs."
        ) from error
