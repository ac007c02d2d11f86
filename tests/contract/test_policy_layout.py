"""Policy folders that exist go on loading: the names and sizes of weights and options are pinned, policy by policy."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import pytest

from rlvla.policies.policy import Policy
from rlvla_envs.base import SuiteConfig
from rlvla_envs.suites import make_env

PINNED = {
    "pi05_toy": "6b93169abca109c9",
    "pi0_toy": "d8dfa732836a5259",
    "qwen_gr00t_toy": "432761be4bded64d",
    "qwen_oft_toy": "6de5c101af4ea504",
    "qwen_pi_toy": "c75f1fc1469c4404",
    "qwen_vla_toy": "6e07948e871befa9",
    "smolvla_toy": "37236e8817b14333",
    "twinbrain_vla_toy": "f86ad7b6ed86f889",
    "uam_toy": "f73c29eebaf5b018",
    "vlm4vla_toy": "c94f1dbff09672f7",
}
"""A change means that folders written before are refused: say so in CHANGELOG.md, and how to move."""


def options(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from options(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def digest(policy: Policy) -> str:
    weights = [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in policy.state_dict().items()]
    return hashlib.sha256("\n".join(sorted(weights) + sorted(options(asdict(policy.config)))).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", PINNED)
def test_weights_and_options_have_the_names_and_sizes_that_they_had(
    make_policy: Callable[..., Policy], name: str
) -> None:
    policy = make_policy(name, make_env(SuiteConfig(name="toy", image_size=32), 1).spec)
    assert digest(policy) == PINNED[name]
