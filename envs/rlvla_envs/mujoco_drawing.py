"""What keeps a MuJoCo suite from being started, as an error with its cure."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator


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
