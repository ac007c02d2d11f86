"""What a policy is to the rest of the system, small enough for every architecture.

Axes: B rows, S context tokens, D hidden size, H actions in a chunk, K action channels (padded), C action
channels of the suite, V value features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeGuard

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn import functional as F

from rlvla_algos.distribution import NormalBernoulli
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
    per_token: Mapping[str, Tensor] = field(default_factory=dict)
    """What else an architecture keeps of each token, such as keys and values: [B, S, ...]."""
    per_row: Mapping[str, Tensor] = field(default_factory=dict)
    """What else it keeps of each row: [B, ...]."""

    def __len__(self) -> int:
        return len(self.tokens)

    def repeat(self, times: int) -> "Context":
        """Every row ``times`` times, as a block: rows 0..B-1, then 0..B-1 again."""
        return Context.from_tensordict(torch.cat([self.to_tensordict()] * times))

    def to_tensordict(self) -> TensorDict:
        named: dict[str, Any] = {key: getattr(self, key) for key in CONTEXT_KEYS}
        for key in EXTRA_KEYS:
            if getattr(self, key):
                named[key] = dict(getattr(self, key))
        return TensorDict(named, batch_size=[len(self)])

    @staticmethod
    def from_tensordict(data: TensorDict) -> "Context":
        extra: dict[str, Any] = {key: dict(data[key].items()) for key in EXTRA_KEYS if key in data}
        return Context(*(data[key] for key in CONTEXT_KEYS), **extra)


CONTEXT_KEYS = ("tokens", "mask", "position_ids", "pooled", "state")
EXTRA_KEYS = ("per_token", "per_row")
TOKEN_AXIS = {"mask": 1, "input_ids": 1, "token_type": 1, "position_ids": 2, "tokens": 1}
"""Where the tokens are in what a context or a batch holds by these names."""


def pad_tokens(data: Sequence[TensorDict]) -> list[TensorDict]:
    """Contexts, or the batches they are made of, padded along their tokens to the longest, mask False.

    What a policy adds to them under ``per_token`` is padded as well.
    """
    longest = max(part["mask"].shape[1] for part in data)
    return [_pad_tokens(part, longest - part["mask"].shape[1]) for part in data]


def _pad_tokens(data: TensorDict, extra: int) -> TensorDict:
    if extra == 0:
        return data
    padded = data.copy()
    named: list[Any] = [(name, axis) for name, axis in TOKEN_AXIS.items() if name in padded]
    named += [(("per_token", name), 1) for name in padded.get("per_token", {}).keys()]  # noqa: SIM118 - a TensorDict
    for key, axis in named:
        tensor: Tensor = padded[key]
        padded[key] = F.pad(tensor, (0, 0) * (tensor.ndim - 1 - axis) + (0, extra))
    return padded


class Decision(NamedTuple):
    """One sampled chunk per row, and what PPO needs to score it again."""

    action: Float[np.ndarray, "B H C"]
    """In env units; the simulator clips its own copy."""
    stored: TensorDict
    """[B]: what the policy's kind of sampler scores again (`rlvla.samplers`), ``log_prob`` [B H K] among it."""


class ChunkPolicy(Protocol):
    """What every policy is, however it decodes actions. Each is a `FlowPolicy` or a `DistributionPolicy`."""

    @property
    def env_spec(self) -> EnvSpec:
        """The conventions it was trained under; of a policy of several robots, those of the one it is now."""
        ...

    horizon: int
    """H, of the padded action tensor."""
    channels: int
    """K."""
    value_size: int
    """V: number of value features."""
    context_groups: frozenset[str]
    """Parameter groups that `encode` reads: while none of them is trained, a stored context stays right."""
    frozen_groups: frozenset[str]
    """Parameter groups that are never trained."""

    def collate(self, observation: Observation) -> TensorDict:
        """Images, prompt and state as tensors with batch size [B], on the CPU."""
        ...

    def camera_order(self) -> list[str]:
        """Names of the suite's cameras in the order in which ``batch["images"]`` [B views h w 3] has them.

        These are the pixels of `Observation.views`, as they are: a rollout keeps the simulators' own arrays and not the
        batch, so a crop made in `collate` would be made for deciding and not for learning. `encode` is the place.
        """
        ...

    def context_length(self, instruction: str) -> int:
        """Tokens of an instruction's context, padding included. Only rows of one length are sampled together:
        beside a longer row a decision's last bits would be others."""
        ...

    def encoded_tokens(self, data: TensorDict) -> int:
        """Tokens of a row of decisions, stored with its ``context`` or its ``batch``, that an update's pass runs
        through beside the chunk's own; padding included."""
        ...

    def context_noise(self) -> dict[str, tuple[int, ...]]:
        """Standard normal draws that `encode` reads of each row, by name: ``batch["noise", name]`` is [B, *shape].

        They are drawn with the decision and kept with it, so that it is scored again under the same. Where a batch has
        none, as for the value of a final observation, `encode` takes zeros, and the value must not depend on them.
        """
        ...

    def encode(self, batch: TensorDict) -> Context: ...

    def value_features(self, context: Context) -> Float[Tensor, "B V"]:
        """Detached, always: the critic must not move the backbone."""
        ...

    def action_mask(self) -> Bool[Tensor, "H K"]:
        """Entries that mean something: inside the chunk, an action channel, and not constant in the data."""
        ...

    def noise_mask(self) -> Bool[Tensor, "H K"]:
        """Entries that are drawn and denoised: those of `action_mask`, and padding where the network expects it."""
        ...

    def actions_to_env(self, sample: Float[Tensor, "B H K"]) -> Float[np.ndarray, "B H C"]: ...

    def actions_from_env(self, action: Float[np.ndarray, "B H C"]) -> Float[Tensor, "B H K"]: ...

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """A partition of the parameters: "vlm" is the backbone, which may stay frozen, "expert" what decodes actions;
        an architecture may have more."""
        ...

    def sharding_units(self) -> list[nn.Module]:
        """Modules to wrap one by one under FSDP."""
        ...


class FlowPolicy(ChunkPolicy, Protocol):
    """A policy whose action decoder is a flow. One SDE sampler and one log-prob stand above it."""

    num_denoising_steps: int

    def velocity(
        self,
        context: Context,
        sample: Float[Tensor, "B H K"],
        tau: Float[Tensor, " B"],
        step: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B H K"]:
        """v = Y_1 - Y_0 at flow time tau, 1 being noise."""
        ...


class DistributionPolicy(ChunkPolicy, Protocol):
    """A policy whose action decoder gives a distribution over the chunk in one pass."""

    def distribution(self, context: Context) -> NormalBernoulli:
        """Over chunks in the policy's own units, before any clipping."""
        ...

    def imitation_loss(
        self, context: Context, action: Float[Tensor, "B H K"], mask: Bool[Tensor, "B H K"]
    ) -> Float[Tensor, ""]:
        """What SFT minimises: of demonstrated chunks, as `actions_from_env` gives them, where ``mask`` is True."""
        ...


def has_distribution(policy: ChunkPolicy) -> TypeGuard[DistributionPolicy]:
    """Which of the two kinds a policy is. `rlvla.samplers` asks; nobody else should have to."""
    return hasattr(policy, "distribution")


def trained_groups(policy: ChunkPolicy, train_vlm: bool, freeze: Sequence[str] = ()) -> list[str]:
    """Names of the parameter groups that are trained, the expert first and the backbone last.

    Args:
        freeze: groups that are not, beside ``frozen_groups`` (`rlvla.policies.groups.check_groups`).
    """
    frozen = policy.frozen_groups.union(freeze)
    names = [n for n in policy.parameter_groups() if n not in frozen and (n != "vlm" or train_vlm)]
    return sorted(names, key=lambda name: (name == "vlm", name != "expert"))


def context_is_fixed(policy: ChunkPolicy, train_vlm: bool, freeze: Sequence[str] = ()) -> bool:
    """Whether contexts stay what they are while the policy is trained, so that they can be stored and used again."""
    return not policy.context_groups.intersection(trained_groups(policy, train_vlm, freeze))


class ValueHead(nn.Module):
    """Scalar value of detached features: linear as in Qwen-VLA (section 4.2), or with hidden layers.

    `rlvla.critic.Critic` reads more.
    """

    timed = False
    """Whether `value` reads the time."""

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

    def read(
        self, features: Float[Tensor, "B V"], tokens: Float[Tensor, "B S D"], mask: Bool[Tensor, "B S"]
    ) -> Float[Tensor, "B W"]:
        """What `value` needs of contexts, given the policy's value features."""
        return features

    def read_rows(
        self, features: Float[Tensor, "B V"], tokens: Float[Tensor, "B S D"], mask: Bool[Tensor, "B S"]
    ) -> Float[Tensor, "B W"]:
        """`read`, with bits that do not depend on which rows there are: for rollouts."""
        return features

    def value(self, features: Float[Tensor, "*B W"], time_left: Float[Tensor, "*B"] | None) -> Float[Tensor, "*B"]:
        """Values of what was `read`.

        Args:
            time_left: share of the time limit that is left, in [0, 1]; None where the head is not ``timed``.
        """
        value: Tensor = self(features)
        return value
