"""Drawing with Vulkan through SAPIEN: the message of a machine that cannot."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator


@contextlib.contextmanager
def building_simulator(suite: str = "ManiSkill") -> Iterator[None]:
    """Around or on whatever creates a scene: one rendering thread, and a cure where nothing can render.

    Args:
        suite: its name for readers.

    Raises:
        RuntimeError: there is no usable Vulkan device.
    """
    # Read by Mesa when the device is created. More threads per simulator only fight each other: the
    # parallelism is one simulator process a core.
    os.environ.setdefault("LP_NUM_THREADS", "1")
    try:
        yield
    except RuntimeError as error:
        if re.search("vulkan|render|device|vk::", str(error), re.IGNORECASE):
            raise RuntimeError(
                f"{suite} cannot render here: {error}. It needs a Vulkan device; on a CPU that is lavapipe "
                "from Mesa 24.3 or newer. Run scripts/setup.sh, which installs it on Debian as root, or install "
                "mesa-vulkan-drivers yourself, and check with vulkaninfo."
            ) from error
        raise
