"""QwenOFT of starVLA: action queries in the prompt, and an MLP that regresses one action from each query's last state.

It has no flow: one pass of the VLM decides. For RL the regressed chunk is the mean of a Gaussian with a learned
deviation for each channel, which no checkpoint has. The weights of the head are named as `action_model.*` in starVLA's
checkpoints.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from tensordict import TensorDict
from torch import Tensor, nn

from rlvla.policies.action_stats import ActionStats
from rlvla.policies.architectures import check_name
from rlvla.policies.backbone import token_ids, widen_vision
from rlvla.policies.base import Context
from rlvla.policies.brain import BrainConfig, PromptConfig, build_brain
from rlvla.policies.policy import PolicyWithDistribution
from rlvla.policies.prompted import PromptedPolicy, pool
from rlvla_algos.distribution import NormalBernoulli
from rlvla_envs.base import EnvSpec


@dataclass(kw_only=True)
class QwenOftConfig:
    """A QwenOFT policy."""

    name: str = "qwen_oft"
    vlm: BrainConfig = field(default_factory=BrainConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    query: str = "🔍"
    """Text of one action query; it must be one token however often it is repeated. starVLA's is a magnifying glass."""
    horizon: int = 8
    """H: action queries in the prompt; a suite's chunk may be shorter."""
    channels: int = 8
    """K: action channels after zero-padding."""
    num_blocks: int = 2
    """Residual blocks of the head. They are twice as wide as the VLM."""
    log_std_init: float = -1.6
    """Log of the deviation of actions, in units of half the data's range. RL learns it from there; SFT leaves it."""
    use_state: bool = False
    """Add a projection of normalised proprioception to each query's output. starVLA's has none."""
    value_uses_state: bool = True
    """Append that state to the critic's features, which are the mean of the VLM's hidden states."""
    image_sizes: tuple[int, ...] = ()
    """Sides of the squares that images are resized to, one after the other; empty takes the suite's images as they are.
    starVLA resizes to 224, Qwen3-VL's processor then to 256."""
    cameras: tuple[str, ...] = ()
    """Order of the suite's cameras in the prompt; empty is the suite's own."""

    def __post_init__(self) -> None:
        check_name(self.name, "qwen_oft")
        self.image_sizes, self.cameras = tuple(self.image_sizes), tuple(self.cameras)
        for name in ("horizon", "channels", "num_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"policy.{name} is {getattr(self, name)}; it must be at least 1.")
        if not self.query:
            raise ValueError("policy.query is empty; it must be a text that the tokenizer writes as one token.")
        if not -5 <= self.log_std_init <= 1:
            raise ValueError(f"policy.log_std_init is {self.log_std_init}; it must lie in [-5, 1]. Usual: -2 to -1.6.")

    def request(self, instruction: str) -> str:
        """An instruction with the queries behind it, as starVLA writes them."""
        queries = self.query * self.horizon
        return f"{instruction} Please predict the next {self.horizon} robot actions: <action>{queries}<action>."

    def tokenizer_texts(self, spec: EnvSpec, instructions: list[str]) -> list[str]:
        """What a tokenizer that is trained for this policy must write briefly: all but the queries."""
        texts = [self.prompt.without_images(spec, self.request(text)) for text in instructions]
        return [text.replace(self.query, "") for text in texts]


class ResidualBlock(nn.Module):
    """Norm, linear, ReLU, beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Float[Tensor, "*B d"]) -> Float[Tensor, "*B d"]:
        y: Tensor = x + self.ffn(x)
        return y


class ResidualMLP(nn.Module):
    """Between two norms: in, ReLU, residual blocks; then out."""

    def __init__(self, size_in: int, width: int, size_out: int, num_blocks: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(size_in)
        self.fc1 = nn.Linear(size_in, width)
        self.mlp_resnet_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(num_blocks))
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, size_out)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B K"]:
        y = torch.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            y = block(y)
        out: Tensor = self.fc2(self.layer_norm2(y))
        return out


class RegressionHead(nn.Module):
    """One action from each query."""

    def __init__(self, size_in: int, channels: int, num_blocks: int) -> None:
        super().__init__()
        self.model = ResidualMLP(size_in, 2 * size_in, channels, num_blocks)

    def forward(self, queries: Float[Tensor, "B H D"]) -> Float[Tensor, "B H K"]:
        y: Tensor = self.model(queries.to(self.model.fc1.weight.dtype))
        return y.float()


class QwenOft(PromptedPolicy, PolicyWithDistribution):
    """The policy. See `rlvla.policies.base.DistributionPolicy` for what each method promises."""

    def __init__(self, config: QwenOftConfig, env_spec: EnvSpec, stats: ActionStats, tokenizer: Any) -> None:
        super().__init__(
            config, env_spec, stats, tokenizer, horizon=config.horizon, channels=config.channels, part="policy"
        )
        self._query_id = _check_query(config, tokenizer)
        self.vlm: Any = build_brain(config.vlm, token_ids(tokenizer))
        width = config.vlm.hidden_size
        self.expert = RegressionHead(width, config.channels, config.num_blocks)
        self.state_in = nn.Linear(env_spec.state_size, width) if config.use_state and env_spec.state_size else None
        self.log_std = nn.Parameter(torch.full((config.channels,), config.log_std_init))
        self.value_size = width + (env_spec.state_size if config.value_uses_state else 0)
        self.eval()

    def initialize(self) -> None:
        widen_vision(self.vlm, self.config.vlm)

    def prompt(self, instruction: str) -> str:
        turns = self.config.prompt.chat(self.env_spec, self.config.request(instruction))
        text: str = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return text

    def encode(self, batch: TensorDict) -> Context:
        """H tokens a row: the last hidden states of the last H queries, in their order."""
        mask = batch["mask"]
        tokens = self.vlm(
            input_ids=batch["input_ids"],
            attention_mask=mask.long(),
            mm_token_type_ids=batch["token_type"],
            position_ids=batch["position_ids"].transpose(0, 1),
            use_cache=False,
            **self.image_inputs(self.vlm, batch),
        ).last_hidden_state
        # Padding may be the query's own token.
        is_query = (batch["input_ids"] == self._query_id) & mask
        places = torch.arange(mask.shape[1], device=mask.device).where(is_query, -1)
        # An instruction may hold the token too; the queries come last.
        places = places.topk(self.horizon, dim=1).values.sort(dim=1).values
        rows = torch.arange(len(mask), device=mask.device)[:, None]
        return Context(
            tokens[rows, places],
            torch.ones_like(places, dtype=torch.bool),
            batch["position_ids"].transpose(1, 2)[rows, places].transpose(1, 2),
            pool(tokens, mask),
            batch["state"],
        )

    def distribution(self, context: Context) -> NormalBernoulli:
        """Gaussian about the regressed chunk. A gripper is one of its channels, cut at 0.5 where it acts."""
        location = self._regress(context)
        shape = (len(location), 1, self.channels)
        log_std = self.log_std.float().expand(shape)
        return NormalBernoulli(location, log_std, torch.zeros(shape, dtype=torch.bool, device=location.device))

    def imitation_loss(
        self, context: Context, action: Float[Tensor, "B H K"], mask: Bool[Tensor, "B H K"]
    ) -> Float[Tensor, ""]:
        """Mean absolute error, as in starVLA."""
        return ((self._regress(context) - action).abs() * mask).sum() / mask.sum().clamp(min=1)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        vlm = list(self.vlm.parameters())
        known = {id(parameter) for parameter in vlm}
        return {"vlm": vlm, "expert": [p for p in self.parameters() if id(p) not in known]}

    def sharding_units(self) -> list[nn.Module]:
        return [*self.vlm.visual.blocks, *self.vlm.language_model.layers]

    def _regress(self, context: Context) -> Float[Tensor, "B H K"]:
        queries = context.tokens
        if self.state_in is not None:
            queries = queries + self.state_in(context.state.to(queries.dtype))[:, None]
        location: Tensor = self.expert(queries) * self._action_mask
        return location


def _check_query(config: QwenOftConfig, tokenizer: Any) -> int:
    """The query's token.

    Raises:
        ValueError: the tokenizer writes H queries as fewer of them, so that some action would have none.
    """
    ids = tokenizer(config.query, add_special_tokens=False)["input_ids"]
    written = tokenizer(config.request(""), add_special_tokens=False)["input_ids"]
    count = written.count(ids[0])
    if count < config.horizon:
        raise ValueError(
            f"policy.query is {config.query!r}, and the tokenizer writes {config.horizon} of them with {count} of its "
            f"token {ids[0]}; there must be one for each action. Give the tokenizer of the checkpoint's base VLM, or "
            "another policy.query."
        )
    first: int = ids[0]
    return first
