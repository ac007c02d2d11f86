"""What the suites on ManiSkill share: options, the message of a machine that cannot render, an expert's episode."""

import contextlib
import difflib
import os
import re
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float

from rlvla_envs.base import Demonstration, Observation, SuiteConfig, VecEnv


def check_options(config: SuiteConfig, known: set[str]) -> None:
    """Raise ValueError for an option the suite does not have, with the nearest one."""
    unknown = set(config.options) - known
    if unknown:
        close = difflib.get_close_matches(min(unknown), known, n=1)
        raise ValueError(
            f"suite.options has {', '.join(sorted(unknown))}, which {config.name} does not know."
            + (f" Did you mean {close[0]!r}?" if close else "")
            + f" Options: {', '.join(sorted(known))}."
        )


@contextlib.contextmanager
def building_simulator() -> Iterator[None]:
    """Around or on whatever creates a scene: one rendering thread, and a cure where nothing can render.

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
                f"ManiSkill cannot render here: {error}. It needs a Vulkan device; on a CPU that is lavapipe "
                "from Mesa 24.3 or newer. Run scripts/setup.sh, which installs it on Debian as root, or install "
                "mesa-vulkan-drivers yourself, and check with vulkaninfo."
            ) from error
        raise


def record_expert(
    env: VecEnv,
    first: Observation,
    act: Callable[[], np.ndarray],
    low: Float[np.ndarray, " A"] | float,
    high: Float[np.ndarray, " A"] | float,
) -> Demonstration:
    """Play an expert in slot 0 to the end of the episode that ``first`` began, looking before every action."""
    frames, actions = [first], []
    while True:
        action = np.clip(act(), low, high).astype(np.float32)
        actions.append(action)
        result = env.step_chunk([0], action[None, None])
        if result.done[0]:
            break
        frames.append(result.observation)
    episode = Observation.concatenate(frames)
    return Demonstration(
        episode.images, episode.state, np.stack(actions), episode.instruction[0], bool(result.success[0])
    )
