"""The critic's options beside the paper's: tokens weighed by a learned query, and the time that is left."""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlvla.config import AlgoConfig, CriticConfig, CriticPool
from rlvla.policies.base import ValueHead
from rlvla.policies.policy import Policy
from rlvla_envs.base import Observation


class Critic(ValueHead):
    """A value head that may read the tokens of a context, and may know the time.

    What the attention finds stands beside the policy's own features, so that nothing is lost that the plain head sees.
    """

    def __init__(self, num_features: int, config: AlgoConfig, token_size: int) -> None:
        """
        Args:
            num_features: V, of the policy.
            token_size: D of its contexts; 0 without attention.
        """
        self.timed = config.critic.time_to_limit
        super().__init__(num_features + token_size + self.timed, config.value_hidden_sizes)
        self.query = nn.Linear(token_size, 1, bias=False) if token_size else None

    def read(
        self, features: Float[Tensor, "B V"], tokens: Float[Tensor, "B S D"], mask: Bool[Tensor, "B S"]
    ) -> Float[Tensor, "B W"]:
        if self.query is None:
            return features
        tokens = tokens.detach().to(self.query.weight.dtype)
        weight = self.query(tokens)[..., 0].masked_fill(~mask, -math.inf).softmax(dim=-1)
        pooled = (weight[..., None] * tokens).sum(dim=1)
        return torch.cat([features.to(pooled.dtype), pooled], dim=-1)

    def read_rows(
        self, features: Float[Tensor, "B V"], tokens: Float[Tensor, "B S D"], mask: Bool[Tensor, "B S"]
    ) -> Float[Tensor, "B W"]:
        if self.query is None:
            return features
        rows = [
            self.read(features[i : i + 1], tokens[i : i + 1, mask[i]], mask[i : i + 1, mask[i]])
            for i in range(len(features))
        ]
        return torch.cat(rows)

    def value(self, features: Float[Tensor, "*B W"], time_left: Float[Tensor, "*B"] | None) -> Float[Tensor, "*B"]:
        if self.timed:
            assert time_left is not None
            features = torch.cat([features, time_left[..., None].to(features.dtype)], dim=-1)
        value: Tensor = self(features)
        return value


def make_value_head(policy: Policy, config: AlgoConfig, device: str) -> ValueHead:
    """The critic that a configuration asks for."""
    if config.critic == CriticConfig():
        return ValueHead(policy.value_size, config.value_hidden_sizes).to(device)
    attends = config.critic.pool is CriticPool.attention
    return Critic(policy.value_size, config, token_size(policy, device) if attends else 0).to(device)


@torch.no_grad()
def token_size(policy: Policy, device: str) -> int:
    """D of the contexts of a policy, found by having it look at a black image."""
    spec = policy.env_spec
    images = {camera.name: np.zeros((1, camera.height, camera.width, 3), dtype=np.uint8) for camera in spec.cameras}
    state = np.zeros((1, spec.state_size), dtype=np.float32) if spec.state_size else None
    seen = Observation(images=images, instruction=[""], state=state)
    return int(policy.encode(policy.collate(seen).to(device)).tokens.shape[-1])


def time_left(executed_steps: Int[Tensor, "E T"], max_episode_steps: int) -> Float[Tensor, "E T"]:
    """Share of the time limit that was left when each decision was taken."""
    before = executed_steps.cumsum(dim=1) - executed_steps
    return 1 - before.float() / max_episode_steps
