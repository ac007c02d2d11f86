"""The flow head of starVLA's QwenPI: a DiT as wide as the VLM, each block of which attends to another layer of it.

It is the head of QwenGR00T (`gr00t_head`: time, sign, parts and names are the same) with two differences: block i reads
the i-th of the VLM's last hidden states instead of the last alone, and the action's MLP reads the blocks' output as it
is, without a last norm and projection. starVLA's checkpoints hold that projection all the same.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlvla.policies.gr00t_head import Block, FlowHead, TimestepEncoder


@dataclass(kw_only=True)
class LayerwiseHeadConfig:
    """Sizes of the head, which is as wide as the VLM. starVLA's: as many blocks as the VLM has layers, heads of 64."""

    num_blocks: int = 2
    """At most the VLM's layers and its embedding."""
    head_dim: int = 32
    """Of attention; it must divide the VLM's width."""
    hidden_size: int = 96
    """Of the two-layer MLPs that read the state and write the action; 1024 in starVLA."""
    num_future_tokens: int = 8
    """Learned tokens before the chunk. The sequence is state, these, chunk."""
    interleave_self_attention: bool = True
    """Every second block attends to the sequence itself. False has all blocks attend to the VLM, as starVLA's code did
    before it had use_canonical_forward."""
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
        for name in ("num_blocks", "head_dim", "hidden_size", "num_future_tokens", "num_time_buckets"):
            if getattr(self, name) < 1:
                raise ValueError(f"policy.expert.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.horizon > self.max_positions:
            raise ValueError(
                f"policy.expert.horizon is {self.horizon}; it must be at most max_positions, {self.max_positions}."
            )

    def check_vlm(self, layers: int, width: int) -> None:
        """Raise ValueError where the VLM has too few layers, or a width that heads do not divide."""
        if self.num_blocks > layers + 1:
            raise ValueError(
                f"policy.expert.num_blocks is {self.num_blocks}; the VLM has {layers} layers, whose states and the "
                f"embedding are {layers + 1}."
            )
        if width % self.head_dim:
            raise ValueError(
                f"policy.expert.head_dim is {self.head_dim}; it must divide the head's width, which is the VLM's: "
                f"{width}."
            )

    @property
    def readers(self) -> tuple[int, ...]:
        """Blocks that attend to the VLM."""
        return tuple(i for i in range(self.num_blocks) if not (self.interleave_self_attention and i % 2))


class LayerwiseDiT(nn.Module):
    """Blocks that attend to one context each, or to the sequence itself."""

    def __init__(self, config: LayerwiseHeadConfig, width: int) -> None:
        super().__init__()
        self.readers = config.readers
        self.timestep_encoder = TimestepEncoder(width)
        heads = width // config.head_dim
        self.transformer_blocks = nn.ModuleList(
            Block(width, heads, width if i in self.readers else None) for i in range(config.num_blocks)
        )

    def forward(
        self,
        x: Float[Tensor, "B L d"],
        contexts: Float[Tensor, "B S n d"],
        bucket: Int[Tensor, " B"],
        own_mask: Bool[Tensor, "B 1 1 L"] | None,
        context_mask: Bool[Tensor, "B 1 1 S"] | None,
    ) -> Float[Tensor, "B L d"]:
        time = self.timestep_encoder(bucket)
        for i, block in enumerate(self.transformer_blocks):
            context = contexts[:, :, self.readers.index(i)] if i in self.readers else x
            x = block(x, context, time, own_mask, context_mask)
        return x


class LayerwiseHead(FlowHead):
    """Velocity of the action chunk given the states of several layers of a VLM."""

    def __init__(self, config: LayerwiseHeadConfig, width: int, state_size: int) -> None:
        super().__init__(
            LayerwiseDiT(config, width),
            config,
            width=width,
            output_size=width,
            context_size=width,
            state_size=state_size,
        )


def read_layers(states: tuple[Float[Tensor, "B S D"], ...], config: LayerwiseHeadConfig) -> Float[Tensor, "B S n D"]:
    """Of a VLM's hidden states, embeddings first, those that blocks read: the last ``num_blocks``, one a block."""
    last = states[-config.num_blocks :]
    return torch.stack([last[i] for i in config.readers], dim=2)
