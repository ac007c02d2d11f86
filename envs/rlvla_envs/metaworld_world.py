"""One simulation of one Meta-World task: started from a seed, stepped, and drawn when asked.

The only file that imports the benchmark.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from rlvla_envs.common import turned
from rlvla_envs.metaworld_tasks import proprioception
from rlvla_envs.mujoco_drawing import close_renderer, cured
from rlvla_envs.slots import Look

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

FILM_SIZE = 256
MOVED_BY_RESETS = ("body_pos", "site_pos")
"""Arrays of the model, not of its state, into which the benchmark writes where objects and goals are."""


class World:
    """A simulation of ``task`` with pictures of ``size`` x ``size`` pixels from ``camera``.

    Raises:
        RuntimeError: the benchmark is not installed, or nothing can be drawn.
    """

    def __init__(self, task: str, size: int, camera: str) -> None:
        with cured("Meta-World", "metaworld"):
            # Read when MuJoCo is imported. OSMesa draws without any device.
            os.environ.setdefault("MUJOCO_GL", "osmesa")
            import mujoco
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS

            self._mujoco: Any = mujoco
            side = max(size, FILM_SIZE)
            self._env: Any = ALL_V3_ENVIRONMENTS[task](width=side, height=side)
            self._renderer: Any = mujoco.Renderer(self._env.model, size, size)
        env = self._env
        # The goal is a part of the observation, for experts; its range was kept without it.
        env._partially_observable = False
        env.__dict__.pop("sawyer_observation_space", None)
        env.seeded_rand_vec, env._set_task_called = True, True
        # Episodes are ended by the caller; the benchmark would refuse the step after its own limit.
        env.max_path_length = sys.maxsize
        self._untouched = {name: getattr(env.model, name).copy() for name in MOVED_BY_RESETS}
        self._camera, self._size = camera, size
        self._film_renderer: Any = None
        self.seen: Float[np.ndarray, "39"] = np.zeros(39)
        """The benchmark's last observation, with what experts may know and policies may not."""

    def start_stored(self, index: int) -> Look:
        """Start with objects and goal that ``index`` alone decides."""
        return self._start(index)

    def start_drawn(self, seed: int) -> Look:
        return self._start(seed)

    def _start(self, seed: int) -> Look:
        """Draw where objects and goal are, then begin the episode, as the benchmark does when it makes its tasks.

        Its reset places everything twice, before and after it clears the simulation. Only with places that are drawn
        already do both agree; else the first picture shows, in half of the tasks, objects and goals up to 20 cm from
        where they are.
        """
        env, model, data = self._env, self._env.model, self._env.data
        for name, values in self._untouched.items():
            getattr(model, name)[:] = values
        # Places depend on where an object lay in the episode before.
        self._mujoco.mj_resetData(model, data)
        env.np_random = np.random.default_rng(seed)
        env._freeze_rand_vec = False
        env.reset()
        env._freeze_rand_vec = True
        env.reset()
        # A goal is moved after the simulation has computed where everything is.
        self._mujoco.mj_kinematics(model, data)
        self.seen = env._get_obs()
        return self._look(draw=True)

    def step(self, action: Float[np.ndarray, "4"], *, draw: bool) -> tuple[bool, Look]:
        """One control step; whether the task is solved, and what is seen."""
        self.seen, _, _, _, info = self._env.step(action)
        return bool(info["success"]), self._look(draw)

    def film(self) -> UInt8[np.ndarray, "h w 3"]:
        """A picture for people."""
        if self._film_renderer is None:
            self._film_renderer = self._mujoco.Renderer(self._env.model, FILM_SIZE, FILM_SIZE)
        return self._drawn(self._film_renderer)

    def close(self) -> None:
        for renderer in (self._renderer, self._film_renderer):
            if renderer is not None:
                close_renderer(renderer)
        self._env.close()

    def _look(self, draw: bool) -> Look:
        return Look((self._drawn(self._renderer),) if draw else None, proprioception(self.seen))

    def _drawn(self, renderer: Any) -> UInt8[np.ndarray, "h w 3"]:
        renderer.update_scene(self._env.data, camera=self._camera)
        # The benchmark's corner cameras hang upside-down.
        return turned(renderer.render())
