"""A policy for measurements of speed: drawn, not trained."""

from typing import Any

import numpy as np
import torch

from rlvla.compose import compose
from rlvla.policies.action_stats import ActionStats
from rlvla.policies.architectures import architecture
from rlvla.policies.processor import train_tokenizer
from rlvla.policies.prompted import prompts_for_tokenizer
from rlvla_envs.base import EnvSpec


def untrained_policy(spec: EnvSpec, words: list[str], instruction: str) -> Any:
    """What ``rlvla sft`` would begin with. Its last layer starts at zero; drawn instead, it sees what it is shown.

    Args:
        words: settings of ``rlvla sft`` that choose it.
    """
    config = compose("sft", ["dataset=none", *words]).policy
    rng = np.random.default_rng(0)
    tokenizer = train_tokenizer(prompts_for_tokenizer(spec, [instruction], config), config.vlm.vocab_size)
    stats = ActionStats.of(rng.uniform(-1, 1, (200, spec.action_size)), rng.normal(size=(200, spec.state_size)))
    torch.manual_seed(0)
    policy = architecture(config.name).policy(config, spec, stats, tokenizer)
    policy.initialize()
    with torch.no_grad():
        for parameter in policy.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return policy
