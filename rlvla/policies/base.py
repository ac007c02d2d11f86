"""What a policy is to the rest of the system, small enough for every architecture.

Axes: B rows, S context tokens, D hidden size, H actions in a chunk, K action channels (padded), C action
channels of the suite, V value features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn import functional as F

from rlvla_envs.base import EnvSpec, Observation


@dataclass(frozen=True)
class Context:
    """Everything the action expert and the critic need of one observation. Indexable by row, storable."""

    tokens: Float[Tensor, "B S D"]
    mask: Bool[Tensor, "B S"]
    """False on padding."""
    position_ids: Int[Tensor, "B 3 S"]
    """Time, height and width positions of the backbone's m-RoPE."""
    pooled: Float[Tensor, "B D"]
    """Mean over valid tokens, detached."""
    state: Float[Tensor, "B P"]
    """Normalised proprioceptive state; P may be 0."""

    def __len__(self) -> int:
        return len(self.tokens)

    def repeat(self, times: int) -> "Context":
        """Every row ``times`` times, as a block: rows 0..B-1, then 0..B-1 again."""
        return Context(*(torch.cat([t] * times) for t in self._fields()))

    def to_tensordict(self) -> TensorDict:
        return TensorDict(dict(zip(CONTEXT_KEYS, self._fields(), strict=True)), batch_size=[len(self)])

    @staticmethod
    def from_tensordict(data: TensorDict) -> "Context":
        return Context(*(data[key] for key in CONTEXT_KEYS))

    def _fields(self) -> tuple[Tensor, ...]:
        return self.tokens, self.mask, self.position_ids, self.pooled, self.state


CONTEXT_KEYS = ("tokens", "mask", "position_ids", "pooled", "state")


def pad_tokens(data: Sequence[TensorDict]) -> list[TensorDict]:
    """Contexts, or the batches they are made of, padded along their tokens to the longest, mask False."""
    longest = max(part["mask"].shape[1] for part in data)
    return [_pad_tokens(part, longest - part["mask"].shape[1]) for part in data]


def _pad_tokens(data: TensorDict, extra: int) -> TensorDict:
    if extra == 0:
        return data
    padded = data.copy()
    for name, width in (
        ("mask", (0, extra)),
        ("input_ids", (0, extra)),
        ("token_type", (0, extra)),
        ("position_ids", (0, extra)),
        ("tokens", (0, 0, 0, extra)),
    ):
        if name in padded:
            padded[name] = F.pad(padded[name], width)
    return padded


class Decision(NamedTuple):
    """One sampled chunk per row, and what PPO needs to score it again."""

    action: Float[np.ndarray, "B H C"]
    """In env units; the simulator clips its own copy."""
    before: Float[Tensor, "B H K"]
    after: Float[Tensor, "B H K"]
    mean: Float[Tensor, "B H K"]
    log_prob: Float[Tensor, "B H K"]
    step: Int[Tensor, " B"]
    """Which denoising step was stochastic."""


class FlowPolicy(Protocol):
    """A policy whose action decoder is a flow. One SDE sampler and one log-prob stand above it."""

    env_spec: EnvSpec
    """The conventions it was trained under."""
    num_denoising_steps: int
    horizon: int
    """H, of the padded action tensor."""
    channels: int
    """K."""
    value_size: int
    """V: number of value features."""

    def collate(self, observation: Observation) -> TensorDict:
        """Images, prompt and state as tensors with batch size [B], on the CPU."""
        ...

    def context_length(self, instruction: str) -> int:
        """Tokens of an instruction's context, padding included. Only rows of one length are sampled together:
        beside a longer row a decision's last bits would be others."""
        ...

    def encode(self, batch: TensorDict) -> Context: ...

    def value_features(self, context: Context) -> Float[Tensor, "B V"]:
        """Detached, always: the critic must not move the backbone."""
        ...

    def velocity(
        self,
        context: Context,
        sample: Float[Tensor, "B H K"],
        tau: Float[Tensor, " B"],
        step: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B H K"]:
        """v = Y_1 - Y_0 at flow time tau, 1 being noise."""
        ...

    def action_mask(self) -> Bool[Tensor, "H K"]:
        """Entries that mean something: inside the chunk, an action channel, and not constant in the data."""
        ...

    def actions_to_env(self, sample: Float[Tensor, "B H K"]) -> Float[np.ndarray, "B H C"]: ...

    def actions_from_env(self, action: Float[np.ndarray, "B H C"]) -> Float[Tensor, "B H K"]: ...

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """A partition of the parameters: "vlm", "expert"."""
        ...

    def sharding_units(self) -> list[nn.Module]:
        """Modules to wrap one by one under FSDP."""
        ...


class ValueHead(nn.Module):
    """Scalar value of detached features: linear as in Qwen-VLA (section 4.2), or with hidden layers."""

    def __init__(self, num_features: int, hidden_sizes: tuple[int, ...] = ()) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        size = num_features
        for hidden in hidden_sizes:
            layers += [nn.Linear(size, hidden), nn.SiLU()]
            size = hidden
        self.layers = nn.Sequential(*layers, nn.Linear(size, 1))

    def forward(self, features: Float[Tensor, "*B V"]) -> Float[Tensor, "*B"]:
        # In the head's own precision: the features may be bfloat16.
        value: Tensor = self.layers(features.to(next(self.layers.parameters()).dtype))
        return value[..., 0]
