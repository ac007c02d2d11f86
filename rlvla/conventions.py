"""A suite's conventions, before its simulators are there."""

from dataclasses import asdict

from rlvla.probes import ProbeError, ask
from rlvla_envs.base import EnvSpec, SuiteConfig


def ask_conventions(suite: SuiteConfig, *, deadline_s: float) -> EnvSpec:
    """Start a suite in a process of its own, and ask.

    Raises:
        RuntimeError: it does not start.
    """
    try:
        return EnvSpec.from_dict(ask("rlvla_envs.trial:conventions", asdict(suite), deadline_s=deadline_s))
    except ProbeError as error:
        raise RuntimeError(
            f"suite {suite.name} does not start: {error}\n`rlvla doctor suite={suite.name}` says what it lacks."
        ) from error
