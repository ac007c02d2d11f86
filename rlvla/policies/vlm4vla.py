"""VLM4VLA: a vision-language model, one learnable action query and a small MLP (papers: VLM4VLA, section 3.2).

It has no flow: SFT regresses the chunk in one pass. For RL the same numbers are a distribution, with a learned
deviation of poses and a Bernoulli of the gripper.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from tensordict import TensorDict
from torch import Tensor, nn

from rlvla.policies.action_stats import ActionStats
from rlvla.policies.architectures import check_name
from rlvla.policies.backbone import VLMConfig, token_ids, vlm_config, widen_vision
from rlvla.policies.base import Context
from rlvla.policies.policy import Policy, PolicyWithDistribution
from rlvla.policies.prompted import PromptedPolicy, pool
from rlvla_algos.distribution import NormalBernoulli, imitation_loss
from rlvla_envs.base import EnvSpec


@dataclass(kw_only=True)
class VLM4VLAConfig:
    """A VLM4VLA policy. Its chunk has the suite's own H and K: nothing is padded."""

    name: str = "vlm4vla"
    vlm: VLMConfig = field(default_factory=VLMConfig)
    feature_size: int = 1024
    """Of what the action query becomes before the two heads read it."""
    head_sizes: tuple[int, ...] = (1024, 512, 256)
    """Hidden layers of the pose head and of the gripper head."""
    gripper: str = "auto"
    """Action component whose channels are binary. auto: every one with "gripper" in its name; none: all are Gaussian.
    Data in between is cut at the middle of its range."""
    gripper_weight: float = 0.01
    """Of the gripper's cross-entropy beside the Huber error of the poses, in SFT."""
    gripper_temperature: float = 1.0
    """Divides the gripper's logit wherever it acts or is scored in RL. After SFT the gripper is nearly certain; above 1
    it explores. SFT and the threshold do not see it."""
    log_std_init: float = -1.6
    """Log of the deviation of poses, in units of half the data's range. RL learns it from there; SFT leaves it."""
    use_state: bool = False
    """Add a projection of normalised proprioception to the action query's output. The paper's model has none."""
    value_uses_state: bool = True
    """Append that state to the critic's features."""

    def __post_init__(self) -> None:
        check_name(self.name, "vlm4vla")
        self.head_sizes = tuple(self.head_sizes)
        positive = {"feature_size": self.feature_size, "gripper_temperature": self.gripper_temperature}
        for name, value in (positive | {"head_sizes": min(self.head_sizes, default=1)}).items():
            if not value > 0:
                raise ValueError(f"policy.{name} is {getattr(self, name)}; it must be positive.")
        if not self.gripper_weight >= 0:
            raise ValueError(f"policy.gripper_weight is {self.gripper_weight}; it must be 0 or more. Usual: 0.01.")
        if not -5 <= self.log_std_init <= 1:
            raise ValueError(f"policy.log_std_init is {self.log_std_init}; it must lie in [-5, 1]. Usual: -2 to -1.6.")


class VLM4VLA(PromptedPolicy, PolicyWithDistribution):
    """The policy. See `rlvla.policies.base.DistributionPolicy` for what each method promises."""

    def __init__(self, config: VLM4VLAConfig, env_spec: EnvSpec, stats: ActionStats, tokenizer: Any) -> None:
        from transformers import Qwen3_5Model

        horizon, channels = env_spec.chunk_size, env_spec.action_size
        binary = torch.from_numpy(binary_channels(env_spec, config.gripper))
        super().__init__(config, env_spec, stats, tokenizer, horizon=horizon, channels=channels, part="policy")
        self._binary: Tensor
        self.register_buffer("_binary", binary, persistent=False)
        self.vlm: Any = Qwen3_5Model(vlm_config(config.vlm, token_ids(tokenizer)))
        width = config.vlm.hidden_size
        # As the backbone draws its own embeddings.
        self.query = nn.Parameter(torch.empty(width).normal_(std=0.02))
        self.state_in = nn.Linear(env_spec.state_size, width) if config.use_state and env_spec.state_size else None
        self.projector = _mlp(width, width // 2, config.feature_size)
        binaries = int(binary.sum())
        sizes = (config.feature_size, *config.head_sizes)
        self.pose_head = _mlp(*sizes, horizon * (channels - binaries)) if binaries < channels else None
        self.gripper_head = _mlp(*sizes, horizon * binaries) if binaries else None
        self.log_std = nn.Parameter(torch.full((channels,), config.log_std_init))
        self.value_size = width + (env_spec.state_size if config.value_uses_state else 0)
        self.eval()

    def check_embodiment(self, env_spec: EnvSpec) -> None:
        # Its heads have as many outputs as the suite's chunk has numbers.
        Policy.check_embodiment(self, env_spec)

    def initialize(self) -> None:
        widen_vision(self.vlm, self.config.vlm)

    def prompt(self, instruction: str) -> str:
        """With a last token that holds the action query's place: `encode` puts the query there."""
        placeholder: str = self.tokenizer.pad_token
        return super().prompt(instruction) + placeholder

    def encode(self, batch: TensorDict) -> Context:
        """One token a row: the action query's last hidden state, which has read everything before it."""
        mask = batch["mask"]
        # Causal layers: the query must be the last valid token, and what is padded after it has no effect on it.
        place = mask.sum(dim=1) - 1
        rows = torch.arange(len(place), device=place.device)
        is_query = torch.arange(mask.shape[1], device=place.device) == place[:, None]
        embedded = self.vlm.get_input_embeddings()(batch["input_ids"])
        tokens = self.vlm(
            inputs_embeds=torch.where(is_query[..., None], self.query.to(embedded.dtype), embedded),
            attention_mask=mask.long(),
            mm_token_type_ids=batch["token_type"],
            position_ids=batch["position_ids"].transpose(0, 1),
            use_cache=False,
            **self.image_inputs(self.vlm, batch),
        ).last_hidden_state
        return Context(
            tokens[rows, place][:, None],
            torch.ones_like(mask[:, :1]),
            batch["position_ids"][rows, :, place][..., None],
            pool(tokens, mask),
            batch["state"],
        )

    def distribution(self, context: Context) -> NormalBernoulli:
        """Gaussian poses about the regressed ones, and a Bernoulli of each gripper channel."""
        location = self._regress(context)
        location = torch.where(self._binary, location / self.config.gripper_temperature, location)
        shape = (len(location), 1, self.channels)
        return NormalBernoulli(location, self.log_std.float().expand(shape), self._binary.expand(shape))

    def imitation_loss(
        self, context: Context, action: Float[Tensor, "B H K"], mask: Bool[Tensor, "B H K"]
    ) -> Float[Tensor, ""]:
        return imitation_loss(
            self._regress(context), self._binary[None, None], action, mask, self.config.gripper_weight
        )

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The action query is an input of the backbone and is trained with it, so that a stored context stays right
        while the backbone is frozen."""
        vlm = [self.query, *self.vlm.parameters()]
        known = {id(parameter) for parameter in vlm}
        return {"vlm": vlm, "expert": [p for p in self.parameters() if id(p) not in known]}

    def sharding_units(self) -> list[nn.Module]:
        return [*self.vlm.visual.blocks, *self.vlm.language_model.layers]

    def _regress(self, context: Context) -> Float[Tensor, "B H K"]:
        """Poses in [-1, 1] and gripper logits, 0 where nothing is meant; in single precision."""
        hidden = context.tokens[:, 0]
        if self.state_in is not None:
            hidden = hidden + self.state_in(context.state.to(hidden.dtype))
        features = self.projector(hidden)
        location = torch.zeros(len(hidden), self.horizon, self.channels, device=hidden.device)
        if self.pose_head is not None:
            location[..., ~self._binary] = torch.tanh(self._chunk(self.pose_head(features)))
        if self.gripper_head is not None:
            location[..., self._binary] = self._chunk(self.gripper_head(features))
        return location * self._action_mask

    def _chunk(self, flat: Float[Tensor, "B N"]) -> Float[Tensor, "B H n"]:
        return flat.float().view(len(flat), self.horizon, -1)


def binary_channels(spec: EnvSpec, gripper: str) -> Bool[np.ndarray, " C"]:
    """Which action channels are a gripper's.

    Raises:
        ValueError: the suite has no action component of that name; the message lists those it has.
    """
    names = [component.name for component in spec.action]
    if gripper not in ("auto", "none", *names):
        raise ValueError(
            f"policy.gripper is {gripper!r}, and the action components of {spec.suite} are {', '.join(names)}. Name "
            "one of them, or set auto (every one with gripper in its name) or none."
        )
    chosen = [(gripper == "auto" and "gripper" in name) or gripper == name for name in names]
    return np.repeat(chosen, [component.size for component in spec.action])


def _mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them, drawn as in the paper's code: Xavier's uniform weights, biases of zero."""
    layers: list[nn.Module] = []
    for size, following in pairwise(sizes):
        linear = nn.Linear(size, following)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
