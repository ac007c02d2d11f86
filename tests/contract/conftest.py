"""For tests of a suite in an interpreter of its own: a module says its ``CONFIG`` and gets worlds of it."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from rlvla_envs.base import SuiteConfig, VecEnv
from rlvla_envs.suites import NotReadyError, check_ready, interpreter_of
from tests.worlds import opened


@pytest.fixture(scope="module")
def config(request: pytest.FixtureRequest) -> SuiteConfig:
    """The module's ``CONFIG``."""
    found: SuiteConfig = request.module.CONFIG
    return found


@pytest.fixture(scope="module")
def python(config: SuiteConfig) -> str:
    """The suite's interpreter; who asks is skipped, with the command, where there is none."""
    try:
        check_ready(config)
    except NotReadyError as error:
        pytest.skip(f"{error} Run: {error.fix}")
    found = interpreter_of(config)
    if found is None:
        pytest.skip(f"{config.name} is in this interpreter, and has none of its own")
    return found


@pytest.fixture(scope="module")
def build(config: SuiteConfig, python: str) -> Iterator[Callable[..., VecEnv]]:
    """``build(num_envs, **changes of CONFIG)``; closed after the module."""
    with opened() as make:
        yield lambda num_envs, **changes: make(replace(config, **changes), num_envs)


@pytest.fixture(scope="module")
def world(build: Callable[..., VecEnv]) -> VecEnv:
    """Two slots that tests share."""
    return build(2)
