"""Worlds that a test module opens, closed after it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rlvla_envs.base import SuiteConfig, VecEnv
from rlvla_envs.suites import make_env


@contextmanager
def opened() -> Iterator[Callable[[SuiteConfig, int], VecEnv]]:
    """`make_env`, whose worlds are closed at the end."""
    worlds: list[VecEnv] = []

    def make(config: SuiteConfig, num_envs: int) -> VecEnv:
        worlds.append(make_env(config, num_envs))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()
