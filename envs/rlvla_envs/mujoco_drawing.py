"""Drawing with MuJoCo: what keeps a suite from being started, with its cure, and cameras that draw when asked."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np


@contextlib.contextmanager
def cured(suite: str, home: str) -> Iterator[None]:
    """Around the building of a simulation.

    Args:
        suite: its name for readers.
        home: what `rlvla suites setup` calls its environment.

    Raises:
        RuntimeError: nothing can be drawn, or packages or files are missing.
    """
    try:
        yield
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        # PyOpenGL ends with any of these where its library or its device is not there.
        if re.search(r"mesa|\bgl[A-Z]|OPENGL|OpenGL|GL context|EGL|framebuffer", str(error)):
            raise RuntimeError(
                f"{suite} cannot draw here: {error}. MUJOCO_GL is {os.environ.get('MUJOCO_GL')}; osmesa needs the "
                "system's library libOSMesa (Debian, Ubuntu: apt-get install libosmesa6)."
            ) from error
        if isinstance(error, ImportError | FileNotFoundError):
            raise RuntimeError(
                f"{suite} cannot start: {error}. `rlvla suites setup {home}` installs it with its assets, or "
                "repairs what is there."
            ) from error
        raise


def make_current(env: Any) -> None:
    """Have OpenGL mean this simulation: before it draws, and before it frees what it drew with.

    robosuite does so when a simulation is built, and never again. What is drawn after another one was built in the same
    process has the other's textures and meshes, or noise once that is closed; and to close one frees the other's.

    Args:
        env: one of robosuite's.
    """
    context = env.sim._render_context_offscreen
    if context is not None:
        context.gl_ctx.make_current()


def close_renderer(renderer: Any) -> None:
    """Close one of `mujoco.Renderer`.

    Its own `close` gives the OpenGL context up first and then frees what it drew with: in whichever context of the
    process is current, where these are the meshes and textures of another simulation.
    """
    if renderer._gl_context is not None and renderer._mjr_context is not None:
        renderer._gl_context.make_current()
        renderer._mjr_context.free()
        renderer._mjr_context = None
    renderer.close()


class Gate:
    """A camera's sensor that draws only when it is open, and else hands out the last picture.

    robosuite reads cameras in the middle of a control step, so a picture drawn after the step would be another one;
    and disabling the observable changes when it is read next. The gate changes neither.
    """

    def __init__(self, env: Any, sensor: Any, shape: tuple[int, int, int]) -> None:
        self._env, self.sensor, self.open = env, sensor, False
        self.picture = np.zeros(shape, dtype=np.uint8)
        self.drawn = 0
        # robosuite sorts observations by this mark of a sensor function.
        self.__modality__ = sensor.__modality__

    def __call__(self, cache: dict[str, Any]) -> np.ndarray:
        if self.open:
            make_current(self._env)
            self.picture = self.sensor(cache)
            self.drawn += 1
        return self.picture
