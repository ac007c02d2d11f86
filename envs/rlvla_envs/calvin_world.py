"""One simulation of CALVIN's table, started from a chain, stepped, and drawn when asked.

The only file that imports the benchmark, from the user's clone: it is in no package registry.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from rlvla_envs.calvin_tasks import CHAINS, ROBOT_START, Chain, initial_conditions, proprioception, scene_start
from rlvla_envs.common import quiet
from rlvla_envs.mujoco_drawing import cured
from rlvla_envs.slots import After, Look

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

CAMERAS = ("rgb_static", "rgb_gripper")


class World:
    """A table with pictures of ``size`` x ``size`` pixels.

    Args:
        root: clone of mees/calvin with its submodule calvin_env.
        scene: a file of calvin_env/conf/scene.
        limit: steps of a subtask.

    Raises:
        RuntimeError: a package or a file of the clone is missing.
    """

    def __init__(self, root: Path, scene: str, size: int, limit: int) -> None:
        with quiet(), cured("CALVIN", "calvin"):
            if (code := str(root / "calvin_env")) not in sys.path:
                sys.path.insert(0, code)
            tables: Any = importlib.import_module("calvin_env.envs.play_table_env")
            oracle: Any = importlib.import_module("calvin_env.envs.tasks")
            # The benchmark's own import of hydra: this package has none.
            hydra = tables.hydra
            with hydra.initialize_config_dir(config_dir=str(root / "calvin_env/conf"), version_base=None):
                config = hydra.compose(
                    config_name="config_data_collection",
                    overrides=[
                        *("cameras=static_and_gripper", f"scene={scene}", "use_vr=false", "env.use_egl=false"),
                        *("env.use_scene_info=true", f"data_path={root / 'calvin_env/data'}"),
                    ],
                )
            self._env: Any = hydra.utils.instantiate(config.env, show_gui=False, use_vr=False, use_scene_info=True)
            rules = root / "calvin_models/conf/callbacks/rollout/tasks/new_playtable_tasks.yaml"
            self._oracle: Any = oracle.Tasks(_read(rules)["tasks"])
            self._words = _read(root / "calvin_models/conf/annotations/new_playtable_validation.yaml")
            self._chains = chains(root)
        # A step draws; a policy looks once a chunk.
        self._draw = self._env.get_camera_obs
        self._env.get_camera_obs = lambda: ({}, {})
        self._root, self._size, self._limit = root, size, limit
        self._chain = Chain(("",), limit)
        self._before: Any = None
        self._robot: Float[np.ndarray, "15"] = np.zeros(15)
        self.after = After()

    @property
    def language(self) -> str:
        """Of the subtask that is to be solved now: the benchmark's one sentence of its validation."""
        return str(self._words[self._chain.subtask][0])

    def start_stored(self, index: int) -> Look:
        """Start the chain of this number."""
        condition, subtasks = self._chains[index]
        return self._start(dict(condition), tuple(subtasks))

    def start_drawn(self, seed: int) -> Look:
        """Start a chain that is drawn as the benchmark drew its own."""
        conditions = initial_conditions()
        condition = conditions[seed % len(conditions)]
        before = np.random.get_state()
        try:
            # It seeds numpy's global generator with the last number.
            (subtasks,) = _planner(self._root).get_sequences_for_state2((condition, 1, seed % 2**32))
        finally:
            np.random.set_state(before)
        return self._start(condition, tuple(map(str, subtasks)))

    def _start(self, condition: dict[str, int | str], subtasks: tuple[str, ...]) -> Look:
        # Its reset leaves the last command of the episode before, which is a part of the state.
        self._env.robot.gripper_action = 1
        seen = self._env.reset(robot_obs=np.array(ROBOT_START), scene_obs=scene_start(condition))
        self._chain, self._robot = Chain(subtasks, self._limit), seen["robot_obs"]
        self._before, self.after = self._env.get_info(), After(metrics=self._chain.metrics())
        return self.see()

    def step(self, action: Float[np.ndarray, "7"], *, draw: bool) -> tuple[bool, Look]:
        """One control step; whether the whole chain is solved, and what is seen."""
        # The benchmark scales the array that it is given in place, and takes 1 and -1 alone for the gripper.
        command = np.append(action[:6], 1.0 if action[6] > 0 else -1.0)
        seen, _, _, now = self._env.step(command)
        self._robot = seen["robot_obs"]
        subtask = self._chain.subtask
        solved = subtask in self._oracle.get_task_info_for_set(self._before, now, {subtask})
        self.after = self._chain.step(solved)
        if solved:
            # A subtask is a change between its own first moment and now.
            self._before = now
        return self._chain.solved == len(self._chain.subtasks), self.see() if draw else self._unseen()

    def see(self) -> Look:
        """Draw what is there now."""
        pictures, _ = self._draw()
        return Look(tuple(self._scaled(pictures[name]) for name in CAMERAS), proprioception(self._robot))

    def film(self) -> UInt8[np.ndarray, "h w 3"]:
        """A picture for people."""
        return np.ascontiguousarray(self._draw()[0][CAMERAS[0]])

    def close(self) -> None:
        with quiet():
            self._env.close()

    def _unseen(self) -> Look:
        return Look(None, proprioception(self._robot))

    def _scaled(self, picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "s s 3"]:
        """The static camera has 200 x 200 pixels, the one in the hand 84 x 84."""
        if picture.shape[0] == self._size:
            return np.ascontiguousarray(picture)
        import cv2

        smaller = picture.shape[0] > self._size
        way = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
        scaled: UInt8[np.ndarray, "s s 3"] = cv2.resize(picture, (self._size, self._size), interpolation=way)
        return scaled


@functools.lru_cache(maxsize=1)
def chains(root: Path) -> list[tuple[dict[str, int | str], tuple[str, ...]]]:
    """(initial condition, subtasks) of the benchmark's 1000 evaluation chains."""
    found = [(dict(condition), tuple(map(str, tasks))) for condition, tasks in _planner(root).get_sequences(CHAINS)]
    if len(found) != CHAINS:
        raise RuntimeError(f"the clone {root} gives {len(found)} chains instead of {CHAINS}: it is of another version.")
    return found


@functools.lru_cache(maxsize=1)
def _planner(root: Path) -> Any:
    """The benchmark's multistep_sequences.py, without the torch that the rest of its package wants."""
    name, file = "multistep_sequences", root / "calvin_models/calvin_agent/evaluation/multistep_sequences.py"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    parents = ["calvin_agent", "calvin_agent.evaluation"]
    helper: Any = ModuleType("calvin_agent.evaluation.utils")
    helper.temp_seed = _seeded
    for parent in parents:
        sys.modules.setdefault(parent, ModuleType(parent))
    sys.modules["calvin_agent.evaluation.utils"] = helper
    # The processes that it starts look for its functions here.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """What the benchmark calls temp_seed."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


def _read(file: Path) -> Any:
    import yaml

    return yaml.safe_load(file.read_text())
