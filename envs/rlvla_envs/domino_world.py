"""One simulation of one DOMINO task: RoboTwin's world with an object that moves, from the user's clone.

The only file that imports the clone, whose top-level packages are called ``envs`` and ``script``: it belongs into an
interpreter of its own, never into a trainer.
"""

from __future__ import annotations

import importlib
import os
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlvla_envs.common import quiet
from rlvla_envs.domino_score import EpisodeFacts, manipulation_score, route_completion
from rlvla_envs.robotwin_world import Code, World, cured, patch, settings_of
from rlvla_envs.slots import After, Look

if TYPE_CHECKING:
    from jaxtyping import Float

CONFIG = "demo_clean_dynamic"
"""Of the clone's task_config."""


class UnsolvedError(Exception):
    """The clone's expert did not solve a seed, so nobody knows how the object would move."""


class DominoWorld(World):
    """`World` in which an object moves until a gripper touches it.

    The benchmark's expert solves the episode first, since the object's way is the one on which the expert met it; a
    seed that it does not solve is passed over.
    """

    tries = 50
    _moves = 0
    _info: dict[str, str]
    _first: Float[np.ndarray, "2 3"]

    def _set_up(self, seed: int) -> Any:
        info, motion = self._expert(seed)
        task = super()._set_up(seed)
        task._metrics_tracker, task._saved_dynamic_motion_info = None, motion
        if not task.init_dynamic_motion_for_eval():
            task.close_env()
            raise UnsolvedError(f"the object's way of seed {seed} crosses what it must not")
        self._info = info
        rules = task.get_dynamic_motion_config()
        self._object = rules["target_actor"]
        self._lift, self._lifted_object = rules.get("check_z_threshold"), rules.get("check_z_actor", self._object)
        self._height, self._lifted = float(self._lifted_object.get_pose().p[2]), False
        self._stops = bool(rules.get("stop_on_contact", True))
        self._robot = {link.name for side in ("left", "right") for link in _entity(task, side).get_links()}
        self._first, self._touched = _hands(task), set[str]()
        return task

    def _expert(self, seed: int) -> tuple[dict[str, str], Any]:
        """What the expert says of the episode that it solved: blanks of the instruction, and the object's way."""
        task = super()._set_up(seed)
        try:
            said = task.play_once()
            solved = bool(task.plan_success and task.check_success())
        except Exception as error:
            # As the benchmark: whatever its expert runs into, the seed is not used.
            raise UnsolvedError(f"the expert failed with seed {seed}: {error}") from error
        finally:
            task.close_env()
        motion = getattr(task, "_saved_dynamic_motion_info", None)
        if not solved or motion is None:
            raise UnsolvedError(f"the expert did not solve seed {seed}")
        return dict(said["info"]), motion

    def _episode_info(self) -> dict[str, str]:
        return self._info

    def _measured(self, moves: int) -> dict[str, float]:
        self._moves = moves
        return self._metrics(success=False, out_of_bounds=False)

    def step(self, action: Float[np.ndarray, "14"], *, draw: bool) -> tuple[bool, Look]:
        success, look = super().step(action, draw=draw)
        task = self._task
        self._touched |= self._clutter_contacts()
        self._lifted |= (
            self._lift is not None and float(self._lifted_object.get_pose().p[2]) - self._height > self._lift
        )
        # Solved by pushing is not solved where the object has to be lifted.
        lost = success and self._lift is not None and not self._lifted
        success, away = success and not lost, False
        if not success and not lost:
            with quiet():
                if self._stops and task.check_gripper_contact_dynamic_object():
                    task.stop_dynamic_object_motion()
                moving = not getattr(task, "_dynamic_object_stopped", False)
                away = moving and not task.check_dynamic_object_boundary()
            lost = away or bool(getattr(task, "eval_fail", False))
        self.after = After(lost=lost, metrics=self._metrics(success=success, out_of_bounds=away))
        return success, look

    def _metrics(self, *, success: bool, out_of_bounds: bool) -> dict[str, float]:
        facts = EpisodeFacts(
            success=success,
            hands_first=self._first,
            hands_last=_hands(self._task),
            target_last=np.asarray(self._object.get_pose().p, dtype=np.float64),
            out_of_bounds=out_of_bounds,
            clutter_touched=len(self._touched),
        )
        return {
            "manipulation_score": manipulation_score(facts),
            "route_completion": route_completion(facts),
            "seed_moves": float(self._moves),
        }

    def _clutter_contacts(self) -> set[str]:
        """Things on the table that are no part of the task and that the robot touches now."""
        clutter = set(getattr(self._task, "_clutter_actor_refs", {}))
        if not clutter:
            return set()
        pairs = [{body.entity.name for body in contact.bodies} for contact in self._task.scene.get_contacts()]
        return {name for pair in pairs if pair & self._robot for name in pair & clutter}


def load(task: str, root: Path, shader: str, level: int, coefficient: float) -> Code:
    """The clone's code for a task.

    Args:
        root: clone of H-EmbodVis/DOMINO, with RoboTwin's assets in its folder ``assets``. One process has one, and
            works in it: the benchmark's paths are relative.
        shader: see `robotwin_world.load`.
        level: 1 constant speed, 2 a polynomial, 3 pieces of both.
        coefficient: of the speed.

    Raises:
        RuntimeError: a package or a file is missing.
    """
    with cured("DOMINO"), quiet():
        import yaml

        os.chdir(root)
        for folder in (root, root / "description/utils"):
            if str(folder) not in sys.path:
                sys.path.insert(0, str(folder))
        # Without it the expert cannot plan; the benchmark only prints so and fails later.
        importlib.import_module("curobo")
        patch("envs", shader, plans_joints_only=False)
        settings, cameras = (
            yaml.safe_load((root / f"task_config/{name}.yml").read_text()) for name in (CONFIG, "_camera_config")
        )
        settings |= {"use_dynamic": True, "dynamic_level": level, "dynamic_coefficient": coefficient}
        code: Any = importlib.import_module("generate_episode_instructions")

        def describe(name: str, episodes: list[dict[str, str]], count: int, seed: int) -> list[dict[str, Any]]:
            # The clone draws from Python's global generator.
            before = random.getstate()
            random.seed(seed)
            try:
                return list(code.generate_episode_descriptions(name, episodes, count))
            finally:
                random.setstate(before)

        return Code(
            task=getattr(importlib.import_module(f"envs.{task}"), task),
            passed_over=(importlib.import_module("envs.utils.create_actor").UnStableError, UnsolvedError),
            describe=describe,
            settings=settings_of(task, settings, cameras, root),
        )


def _entity(task: Any, side: str) -> Any:
    return getattr(task.robot, f"{side}_entity")


def _hands(task: Any) -> Float[np.ndarray, "2 3"]:
    poses = (task.robot.get_left_ee_pose(), task.robot.get_right_ee_pose())
    return np.array([pose[:3] for pose in poses], dtype=np.float64)
