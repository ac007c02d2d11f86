"""What suites share, whatever simulates them. Needs numpy alone, so that it runs in a suite's own interpreter."""

from __future__ import annotations

import contextlib
import difflib
import io
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlvla_envs.base import FIRST_TRAINING_STATE, Demonstration, Observation, SuiteConfig, VecEnv

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8


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


def chosen_names(suite: str, names: Sequence[str], choice: str) -> tuple[str, ...]:
    """Names that ``suite.task`` chooses of a suite's own: ``all``, some joined with ``+``, or their numbers.

    >>> chosen_names("s", ("push", "pull"), "1+push")
    ('pull', 'push')

    Raises:
        ValueError: an unknown name, with the nearest one, or one that is named twice.
    """
    chosen: list[str] = []
    for word in choice.split("+"):
        if word == "all":
            chosen += names
        elif word in names:
            chosen.append(word)
        elif word.isdecimal() and int(word) < len(names):
            chosen.append(names[int(word)])
        else:
            close = difflib.get_close_matches(word, [*names, "all"], n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"suite.task is {choice!r}; {word!r} is no task of {suite}.{hint} It must be all, a number below "
                f"{len(names)}, or names as `rlvla suites {suite}` lists them, joined with +."
            )
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"suite.task is {choice!r}, which names a task twice.")
    return tuple(chosen)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Benchmarks print while they build, start and step."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


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


def place_of(num_tasks: int, states_per_task: int, initial_state: int) -> tuple[int, int | None]:
    """Task of an initial state and its number among the task's evaluation states; None for a training state.

    Evaluation states count through those of the first task, then of the second.

    >>> place_of(10, 50, 0), place_of(10, 50, 49), place_of(10, 50, 50), place_of(10, 50, 1_000_003)
    ((0, 0), (0, 49), (1, 0), (3, None))

    Raises:
        ValueError: neither an evaluation nor a training state.
    """
    if initial_state >= FIRST_TRAINING_STATE:
        return initial_state % num_tasks, None
    if not 0 <= initial_state < num_tasks * states_per_task:
        raise ValueError(
            f"initial state {initial_state} is neither an evaluation state (0 to {num_tasks * states_per_task - 1}) "
            f"nor a training state (from {FIRST_TRAINING_STATE})."
        )
    return divmod(initial_state, states_per_task)


def turned(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """A picture turned by 180 degrees."""
    return np.ascontiguousarray(image[::-1, ::-1])


def boxed(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The whole picture in a square, between black bars; enlarged by none, so that it is sharp."""
    height, width = image.shape[:2]
    scale = min(1.0, size / max(height, width))
    if scale < 1:
        import cv2

        smaller = (round(width * scale), round(height * scale))
        image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
        height, width = image.shape[:2]
    square = np.zeros((size, size, 3), dtype=np.uint8)
    top, left = (size - height) // 2, (size - width) // 2
    square[top : top + height, left : left + width] = image
    return square
