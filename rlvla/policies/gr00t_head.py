"""The flow head of starVLA's QwenGR00T, which comes from GR00T N1: a DiT that attends to a VLM's hidden states.

Names and shapes of the weights are those of `action_model.*` in starVLA's checkpoints, which are diffusers' names; so a
loader has to change one prefix. Three conventions are easily mistaken, and tests hold them:

* The head counts s = 1 - tau from 0 (noise) to 1 (data) and predicts data - noise. At the border of this module the
  time is a bucket of s and the velocity is ours, noise - data.
* A block's modulation is (scale, shift), the last one's (shift, scale).
* The two sinusoids differ: the DiT's is cosines first over n - 1, the action encoder's sines first over n.

starVLA trains with dropout of 0.2. There is none here: what a policy did must be what it is scored as.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

TIMESTEP_FEATURES = 256


@dataclass(kw_only=True)
class Gr00tHeadConfig:
    """Sizes of the head. starVLA's DiT-B: 16 blocks of 12 heads of 64, MLPs of 1024, 32 future tokens."""

    num_blocks: int = 2
    num_heads: int = 3
    head_dim: int = 32
    """A block is num_heads x head_dim wide."""
    hidden_size: int = 96
    """Of the two-layer MLPs that read the state and write the action."""
    output_size: int = 96
    """Of the DiT's last layer, which the action's MLP reads."""
    num_future_tokens: int = 8
    """Learned tokens before the chunk. The sequence is state, these, chunk."""
    interleave_self_attention: bool = True
    """Every second block attends to the sequence itself. False has all blocks attend to the context."""
    max_positions: int = 64
    """Length of the table of learned positions of the chunk."""
    num_time_buckets: int = 1000
    """Into which flow time is cut."""
    channels: int = 8
    """K: action channels after zero-padding."""
    horizon: int = 8
    """H: longest chunk; a suite's may be shorter."""
    context_positions: int = 0
    """Length of a table of learned positions added to context tokens; 0 has none, as in starVLA. A small head trained
    from scratch does not find the right image token without (docs/adr/0004)."""

    def __post_init__(self) -> None:
        for name in ("num_blocks", "num_heads", "hidden_size", "output_size", "num_future_tokens", "num_time_buckets"):
            if getattr(self, name) < 1:
                raise ValueError(f"policy.expert.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.width % 2:
            raise ValueError(
                f"policy.expert.num_heads x head_dim is {self.width}; it must be even, for sines and cosines of time."
            )
        if self.horizon > self.max_positions:
            raise ValueError(
                f"policy.expert.horizon is {self.horizon}; it must be at most max_positions, {self.max_positions}."
            )

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim


def step_buckets(step: Int[Tensor, " B"], num_steps: int, num_buckets: int) -> Int[Tensor, " B"]:
    """Time buckets of denoising steps, 0 being the first: floor(buckets k / N), in integers.

    starVLA takes int(k / N * 1000). From a flow time in single precision that would be another bucket for some steps,
    for example 199 instead of 200 for the second of N = 5.
    """
    return step * num_buckets // num_steps


def time_buckets(tau: Float[Tensor, " B"], num_buckets: int) -> Int[Tensor, " B"]:
    """Time buckets of any flow times, as SFT draws them: the nearest of 0, 1, ..., buckets - 1 to buckets (1 - tau).

    On a grid whose N divides the number of buckets this is `step_buckets`, however tau was rounded; else it may be one
    bucket more.
    """
    return ((1 - tau.double()) * num_buckets).round().long().clamp(0, num_buckets - 1)


class TwoLayer(nn.Module):
    """Linear, ReLU, linear."""

    def __init__(self, size_in: int, hidden_size: int, size_out: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(size_in, hidden_size)
        self.layer2 = nn.Linear(hidden_size, size_out)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer2(F.relu(self.layer1(x)))
        return y


class ActionEncoder(nn.Module):
    """Noisy action and flow time as one token for each time step of the chunk."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(channels, width)
        self.layer2 = nn.Linear(2 * width, width)
        self.layer3 = nn.Linear(width, width)

    def forward(self, sample: Float[Tensor, "B H K"], bucket: Int[Tensor, " B"]) -> Float[Tensor, "B H d"]:
        action = self.layer1(sample)
        half = action.shape[-1] // 2
        frequency = torch.exp(-math.log(1e4) * torch.arange(half, device=bucket.device) / half)
        angle = bucket[:, None].float() * frequency
        time = torch.cat([angle.sin(), angle.cos()], dim=-1).to(action.dtype)
        both = torch.cat([action, time[:, None].expand_as(action)], dim=-1)
        y: Tensor = self.layer3(F.silu(self.layer2(both)))
        return y


class TimestepEmbedder(nn.Module):
    """The two layers behind the sinusoid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(TIMESTEP_FEATURES, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: Float[Tensor, "B 256"]) -> Float[Tensor, "B d"]:
        y: Tensor = self.linear_2(F.silu(self.linear_1(features.to(self.linear_1.weight.dtype))))
        return y


class TimestepEncoder(nn.Module):
    """Flow time as the vector that modulates the DiT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(width)

    def forward(self, bucket: Int[Tensor, " B"]) -> Float[Tensor, "B d"]:
        half = TIMESTEP_FEATURES // 2
        frequency = torch.exp(-math.log(1e4) * torch.arange(half, device=bucket.device) / (half - 1))
        angle = bucket[:, None].float() * frequency
        y: Tensor = self.timestep_embedder(torch.cat([angle.cos(), angle.sin()], dim=-1))
        return y


class AdaptiveNorm(nn.Module):
    """A layer norm whose scale and shift are read off the flow time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, x: Float[Tensor, "B L d"], time: Float[Tensor, "B d"]) -> Float[Tensor, "B L d"]:
        scale, shift = self.linear(F.silu(time))[:, None].chunk(2, dim=-1)
        y: Tensor = F.layer_norm(x, (x.shape[-1],), eps=1e-5) * (1 + scale) + shift
        return y


class Attention(nn.Module):
    """Softmax attention from a sequence to itself or to a context."""

    def __init__(self, width: int, num_heads: int, context_size: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(context_size, width)
        self.to_v = nn.Linear(context_size, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(
        self, x: Float[Tensor, "B L d"], context: Float[Tensor, "B S D"], key_mask: Bool[Tensor, "B 1 1 S"] | None
    ) -> Float[Tensor, "B L d"]:
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)
        y: Tensor = self.to_out[0](attended.transpose(1, 2).flatten(2))
        return y


class GeluIn(nn.Module):
    """The first layer of a block's feed-forward part; its weights are called ``net.0.proj``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.gelu(self.proj(x), approximate="tanh")
        return y


class FeedForward(nn.Module):
    """Four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # The place of diffusers' dropout: the weights behind it are called ``net.2``.
        self.net = nn.Sequential(GeluIn(width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


class Block(nn.Module):
    """Attention behind an adaptive norm, a feed-forward part behind a plain one; no gates."""

    def __init__(self, width: int, num_heads: int, context_size: int | None) -> None:
        super().__init__()
        self.attends_to_itself = context_size is None
        self.norm1 = AdaptiveNorm(width)
        self.attn1 = Attention(width, num_heads, context_size or width)
        self.ff = FeedForward(width)

    def forward(
        self,
        x: Float[Tensor, "B L d"],
        context: Float[Tensor, "B S D"],
        time: Float[Tensor, "B d"],
        own_mask: Bool[Tensor, "B 1 1 L"] | None,
        context_mask: Bool[Tensor, "B 1 1 S"] | None,
    ) -> Float[Tensor, "B L d"]:
        h = self.norm1(x, time)
        if self.attends_to_itself:
            x = x + self.attn1(h, h, own_mask)
        else:
            x = x + self.attn1(h, context, context_mask)
        y: Tensor = x + self.ff(F.layer_norm(x, (x.shape[-1],), eps=1e-5))
        return y


class DiT(nn.Module):
    """Blocks that attend to the context, and by default every second one to the sequence itself."""

    def __init__(self, config: Gr00tHeadConfig, context_size: int) -> None:
        super().__init__()
        width = config.width
        self.timestep_encoder = TimestepEncoder(width)
        itself = [config.interleave_self_attention and i % 2 == 1 for i in range(config.num_blocks)]
        self.transformer_blocks = nn.ModuleList(
            Block(width, config.num_heads, None if own else context_size) for own in itself
        )
        self.proj_out_1 = nn.Linear(width, 2 * width)
        self.proj_out_2 = nn.Linear(width, config.output_size)

    def forward(
        self,
        x: Float[Tensor, "B L d"],
        context: Float[Tensor, "B S D"],
        bucket: Int[Tensor, " B"],
        own_mask: Bool[Tensor, "B 1 1 L"] | None,
        context_mask: Bool[Tensor, "B 1 1 S"] | None,
    ) -> Float[Tensor, "B L o"]:
        time = self.timestep_encoder(bucket)
        for block in self.transformer_blocks:
            x = block(x, context, time, own_mask, context_mask)
        shift, scale = self.proj_out_1(F.silu(time))[:, None].chunk(2, dim=-1)
        y: Tensor = self.proj_out_2(F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale) + shift)
        return y


class FlowHead(nn.Module):
    """What starVLA's two flow heads share: the sequence before their blocks and the action's MLP behind them.

    Args:
        model: the blocks.
        width: of the sequence.
        output_size: what the action's MLP reads.
        context_size: of what the blocks attend to.
    """

    def __init__(
        self, model: nn.Module, config: Any, *, width: int, output_size: int, context_size: int, state_size: int
    ) -> None:
        super().__init__()
        self.config = config
        self.model: Any = model
        self.state_encoder = TwoLayer(state_size, config.hidden_size, width) if state_size else None
        self.action_encoder = ActionEncoder(config.channels, width)
        self.action_decoder = TwoLayer(output_size, config.hidden_size, config.channels)
        self.future_tokens = nn.Embedding(config.num_future_tokens, width)
        self.position_embedding = nn.Embedding(config.max_positions, width)
        for table in (self.future_tokens, self.position_embedding):
            nn.init.normal_(table.weight, std=0.02)
        self.positions = None
        if config.context_positions:
            self.positions = nn.Parameter(torch.randn(config.context_positions, context_size) * 0.5)

    def forward(
        self,
        tokens: Float[Tensor, "B S ..."],
        mask: Bool[Tensor, "B S"],
        state: Float[Tensor, "B P"],
        sample: Float[Tensor, "B H K"],
        action_mask: Bool[Tensor, "H K"],
        bucket: Int[Tensor, " B"],
    ) -> Float[Tensor, "B H K"]:
        """Noise - data, in single precision and zero where ``action_mask`` is.

        Padded entries of ``sample`` are zeroed on the way in, padded steps and context tokens are hidden as keys, so a
        chunk padded to H x K and the same chunk unpadded have the same velocity.

        Args:
            tokens: the VLM's hidden states, [B S D], or [B S n D] for n blocks.
        """
        batch, horizon, _ = sample.shape
        dtype = self.action_decoder.layer1.weight.dtype
        context = tokens.to(dtype)
        if self.positions is not None:
            # Counted over valid tokens: a token has its position however its row is padded.
            positions = self.positions[(mask.cumsum(dim=1) - 1).clamp(min=0)]
            context = context + positions.view(*mask.shape, *[1] * (context.ndim - 3), -1)
        parts = [] if self.state_encoder is None else [self.state_encoder(state.to(dtype))[:, None]]
        parts.append(self.future_tokens.weight.expand(batch, -1, -1))
        chunk = self.action_encoder((sample * action_mask).to(dtype), bucket)
        parts.append(chunk + self.position_embedding.weight[:horizon])
        x = torch.cat(parts, dim=1)

        own = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
        own[-horizon:] = action_mask.any(dim=-1)
        # A mask keeps SDPA off its fastest kernel: hand one over only when something is padded.
        own_mask = None if bool(own.all()) else own.expand(batch, 1, 1, -1)
        context_mask = None if bool(mask.all()) else mask[:, None, None]
        hidden = self.model(x, context, bucket, own_mask, context_mask)
        # The network's velocity points from noise to data, ours from data to noise.
        velocity: Tensor = -self.action_decoder(hidden[:, -horizon:]).float() * action_mask
        return velocity


class Gr00tHead(FlowHead):
    """Velocity of the action chunk given a VLM's last hidden states."""

    def __init__(self, config: Gr00tHeadConfig, context_size: int, state_size: int) -> None:
        super().__init__(
            DiT(config, context_size),
            config,
            width=config.width,
            output_size=config.output_size,
            context_size=context_size,
            state_size=state_size,
        )
