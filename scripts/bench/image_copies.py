"""Counts every copy of an image, and says where it is made: the bytes are followed, not assumed.

Arrays are followed as a subclass of numpy's, which its functions hand on, and tensors by torch's own dispatch. Not seen
is what leaves both: `numpy.array` of a followed array, and what another process does.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from rlvla_envs.base import ChunkResult, Observation

ROOT = Path(__file__).resolve().parents[2]
SOURCES = tuple(str(ROOT / name) for name in ("rlvla/", "envs/"))
HELPERS = {
    "envs/rlvla_envs/base.py",
    "rlvla/rounds.py",
    "rlvla/policies/policy.py: camera_views",
    "rlvla/learner.py: forward",
}
"""Files and functions where records are put together or cut out; who asked for it is more telling."""

Copies = Counter[str]
"""Bytes by place, as "rlvla/rollout.py: begin"."""

_counts: list[Copies] = []


def _count(nbytes: int) -> None:
    place = "elsewhere"
    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(SOURCES):
            name = str(Path(file).relative_to(ROOT))
            here = f"{name}: {frame.f_code.co_name.strip('<>')}"
            if not {name, here} & HELPERS:
                place = here
                break
        frame = frame.f_back
    for copies in _counts:
        copies[place] += nbytes


_depth = 0


@contextmanager
def _nested() -> Iterator[bool]:
    """Whether this is a call from outside: numpy's functions call each other, and a copy counts once."""
    global _depth
    _depth += 1
    try:
        yield _depth == 1
    finally:
        _depth -= 1


class Followed(np.ndarray):  # type: ignore[type-arg]
    """Pixels whose copies count."""

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        with _nested() as outermost:
            made = super().__array_function__(func, types, args, kwargs)
        if not isinstance(made, np.ndarray):
            return made
        # Some of numpy's functions give back their own class, whatever they were given.
        followed = made.view(Followed)
        given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, np.ndarray)]
        if outermost and _is_new(followed, given):
            _count(followed.nbytes)
        return followed

    def __getitem__(self, key: Any) -> Any:
        made = super().__getitem__(key)
        if _is_new(made, [self]):
            _count(made.nbytes)
        return made

    def copy(self, *args: Any, **kwargs: Any) -> Any:
        _count(self.nbytes)
        return super().copy(*args, **kwargs)


def _is_new(made: Any, given: list[Any]) -> bool:
    return (
        isinstance(made, Followed)
        and made.dtype == np.uint8
        and made.ndim >= 3
        and not any(np.may_share_memory(made, one) for one in given)
    )


class _Tensors(TorchDispatchMode):
    """Counts what torch copies of uint8 tensors with three channels last."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = [x for x in tree_flatten((args, kwargs))[0] if _is_image(x)]
        name = func.overloadpacket.__name__
        if not given or name in ("new_zeros", "new_empty", "zeros_like", "empty_like"):
            return made
        if name in ("index_put_", "copy_"):
            # Written into what is there already: as many bytes as the values have, whose leading ones torch drops.
            _count(args[2 if name == "index_put_" else 1].nbytes)
            return made
        known = {x.untyped_storage().data_ptr() for x in given}
        for tensor in tree_flatten(made)[0]:
            if _is_image(tensor) and tensor.untyped_storage().data_ptr() not in known:
                _count(tensor.nbytes)
        return made


def _is_image(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype == torch.uint8 and x.ndim >= 4 and x.shape[-1] == 3


@contextmanager
def counting_copies() -> Iterator[Copies]:
    """Count in the block. Images have to come from a `FollowedEnv`, or through `follow`."""
    copies: Copies = Counter()
    _counts.append(copies)
    try:
        with _Tensors():
            yield copies
    finally:
        _counts.remove(copies)


def follow(observation: Observation) -> Observation:
    """The same observation, its images followed."""
    images = {name: image.view(Followed) for name, image in observation.images.items()}
    return Observation(images, observation.instruction, observation.state)


class FollowedEnv:
    """A world whose pictures are followed from where it hands them out."""

    def __init__(self, env: Any) -> None:
        self._env = env

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def reset(self, slots: Any, initial_states: Any) -> Observation:
        return follow(self._env.reset(slots, initial_states))

    def step_chunk(self, slots: Any, actions: Any) -> ChunkResult:
        result: ChunkResult = self._env.step_chunk(slots, actions)
        return replace(result, observation=follow(result.observation))
