"""How many rows go through the networks of a policy."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Passes:
    """Rows that were run: a decision is one row."""

    vlm: int = 0
    expert: int = 0
    expert_training: int = 0
    """Those of them that keep what a gradient needs."""


@contextmanager
def counting(policy: Any) -> Iterator[Passes]:
    """Count what goes through ``policy.vlm`` and ``policy.expert`` in the block."""
    found = Passes()

    def encoded(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        found.vlm += len(kwargs["input_ids"])

    def denoised(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows = len(args[0])
        found.expert += rows
        found.expert_training += rows * torch.is_grad_enabled()

    hooks = [
        policy.vlm.register_forward_pre_hook(encoded, with_kwargs=True),
        policy.expert.register_forward_pre_hook(denoised, with_kwargs=True),
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
