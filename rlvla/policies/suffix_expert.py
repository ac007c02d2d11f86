"""A small transformer beside a VLM, layer by layer: the action expert of pi0, pi0.5 and SmolVLA.

Layer i of the expert reads keys and values that layer i of the VLM made of the prefix (images, prompt). The prefix sees
nothing of the suffix (state, actions), so its keys and values are made once a decision and read at each denoising step.
Names are those of transformers' decoder layers, so a checkpoint's keys differ from ours by a prefix alone.

Axes: B rows, S prefix tokens, L suffix tokens, d expert width, n key-value heads, e head size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

ROPE_THETA = 10_000.0
"""Of Gemma, and of SmolVLA in place of its VLM's own."""
SHORTEST_PERIOD, LONGEST_PERIOD = 4e-3, 4.0
"""Of the flow time's sines and cosines."""


class Norm(Enum):
    """How a layer normalises: x / rms(x) times w (llama), times 1 + w (gemma), or scaled, shifted and gated by the
    flow time (adaptive)."""

    llama = "llama"
    gemma = "gemma"
    adaptive = "adaptive"


@dataclass(frozen=True, kw_only=True)
class SuffixLayout:
    """Sizes of an expert. Heads and their size are the VLM's, whose keys it reads."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    cross: tuple[bool, ...]
    """One entry a layer: whether it only reads the prefix, through projections of its keys and values (SmolVLA), or
    attends to prefix and suffix alike."""
    norm: Norm
    norm_eps: float
    activation: str
    """silu or gelu_tanh."""


class RMSNorm(nn.Module):
    """Root-mean-square normalisation in fp32, with one weight a channel."""

    def __init__(self, size: int, eps: float, offset: float) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))

    def forward(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, None]:
        return (_unit_rms(x, self.eps) * (self.offset + self.weight.float())).to(x.dtype), None


class AdaptiveRMSNorm(nn.Module):
    """The same with scale, shift and the gate of the branch that follows, all linear in a condition (pi0.5)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.dense = nn.Linear(size, 3 * size)
        nn.init.zeros_(self.dense.weight)
        with torch.no_grad():
            # As in AdaLN-Zero with an open gate: an expert from scratch sees the prefix from the first step.
            self.dense.bias.copy_(torch.cat([torch.zeros(2 * size), torch.ones(size)]))

    def forward(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        assert condition is not None
        scale, shift, gate = self.dense(condition)[:, None].chunk(3, dim=-1)
        return (_unit_rms(x, self.eps) * (1 + scale.float()) + shift.float()).to(x.dtype), gate.to(x.dtype)


def _unit_rms(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)


class Attention(nn.Module):
    def __init__(self, layout: SuffixLayout, cross: bool) -> None:
        super().__init__()
        queries, keys = layout.num_heads * layout.head_size, layout.num_kv_heads * layout.head_size
        read = keys if cross else layout.hidden_size
        self.cross, self.head_size = cross, layout.head_size
        self.q_proj = nn.Linear(layout.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(read, keys, bias=False)
        self.v_proj = nn.Linear(read, keys, bias=False)
        self.o_proj = nn.Linear(queries, layout.hidden_size, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B L d"],
        prefix: tuple[Float[Tensor, "B S n e"], Float[Tensor, "B S n e"]],
        mask: Bool[Tensor, "B 1 L keys"],
        rotary: tuple[Tensor, Tensor],
    ) -> Float[Tensor, "B L d"]:
        def heads(y: Tensor) -> Tensor:
            return y.view(*y.shape[:2], -1, self.head_size)

        before, after = prefix
        q = rotate(heads(self.q_proj(x)), rotary)
        if self.cross:
            # The prefix's keys are rotated already; they are projected as they are.
            k, v = heads(self.k_proj(before.flatten(2))), heads(self.v_proj(after.flatten(2)))
        else:
            k = torch.cat([before.to(x.dtype), rotate(heads(self.k_proj(x)), rotary)], dim=1)
            v = torch.cat([after.to(x.dtype), heads(self.v_proj(x))], dim=1)
        q, k, v = (y.transpose(1, 2).to(x.dtype) for y in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        out: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    def __init__(self, layout: SuffixLayout) -> None:
        super().__init__()
        d, inner = layout.hidden_size, layout.intermediate_size
        self.gelu = layout.activation == "gelu_tanh"
        self.gate_proj = nn.Linear(d, inner, bias=False)
        self.up_proj = nn.Linear(d, inner, bias=False)
        self.down_proj = nn.Linear(inner, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        gate = F.gelu(gate, approximate="tanh") if self.gelu else F.silu(gate)
        y: Tensor = self.down_proj(gate * self.up_proj(x))
        return y


class Layer(nn.Module):
    def __init__(self, layout: SuffixLayout, cross: bool) -> None:
        super().__init__()
        self.self_attn = Attention(layout, cross)
        self.mlp = FeedForward(layout)
        self.input_layernorm = make_norm(layout)
        self.post_attention_layernorm = make_norm(layout)

    def forward(
        self,
        x: Float[Tensor, "B L d"],
        prefix: tuple[Tensor, Tensor],
        mask: Bool[Tensor, "B 1 L keys"],
        rotary: tuple[Tensor, Tensor],
        condition: Float[Tensor, "B d"] | None,
    ) -> Float[Tensor, "B L d"]:
        normed, gate = self.input_layernorm(x, condition)
        x = _add(x, self.self_attn(normed, prefix, mask, rotary), gate)
        normed, gate = self.post_attention_layernorm(x, condition)
        return _add(x, self.mlp(normed), gate)


def make_norm(layout: SuffixLayout) -> nn.Module:
    if layout.norm is Norm.adaptive:
        return AdaptiveRMSNorm(layout.hidden_size, layout.norm_eps)
    return RMSNorm(layout.hidden_size, layout.norm_eps, offset=1.0 if layout.norm is Norm.gemma else 0.0)


def _add(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    return x + (branch if gate is None else branch * gate)


class SuffixExpert(nn.Module):
    """The layers and the projections in and out. What the suffix is made of, the policy decides."""

    def __init__(self, layout: SuffixLayout, channels: int, projections: dict[str, tuple[int, int]]) -> None:
        """
        Args:
            channels: K.
            projections: name -> (inputs, outputs) of linear layers beside those of the action.
        """
        super().__init__()
        self.layout = layout
        self.layers = nn.ModuleList(Layer(layout, cross) for cross in layout.cross)
        self.norm = make_norm(layout)
        self.action_in_proj = nn.Linear(channels, layout.hidden_size)
        for name, (inputs, outputs) in projections.items():
            setattr(self, name, nn.Linear(inputs, outputs))
        self.action_out_proj = nn.Linear(layout.hidden_size, channels)

    def forward(
        self,
        x: Float[Tensor, "B L d"],
        keys: Float[Tensor, "B S layers n e"],
        values: Float[Tensor, "B S layers n e"],
        prefix_mask: Bool[Tensor, "B S"],
        suffix_mask: Bool[Tensor, "B L L"],
        condition: Float[Tensor, "B d"] | None = None,
    ) -> Float[Tensor, "B L d"]:
        """The suffix through all layers.

        Args:
            keys: of the prefix, rotated, for each layer.
            prefix_mask: False on padding, which no suffix token reads.
            suffix_mask: which suffix token (second axis) may read which (third).
            condition: of adaptive norms.
        """
        length, count = x.shape[1], prefix_mask.sum(dim=1)
        steps = torch.arange(length, device=x.device)
        prefix_part = prefix_mask[:, None, None].expand(-1, 1, length, -1)
        both = torch.cat([prefix_part, suffix_mask[:, None]], dim=-1)
        joint = rotary_tables(count[:, None] + steps, self.layout.head_size)
        # A layer that reads the prefix alone counts its own positions from 0, as SmolVLA does.
        own = rotary_tables(steps.expand(len(x), -1), self.layout.head_size)
        for i, layer in enumerate(self.layers):
            cross = self.layout.cross[i]
            prefix = (keys[:, :, i], values[:, :, i])
            x = layer(x, prefix, prefix_part if cross else both, own if cross else joint, condition)
        normed, _ = self.norm(x, condition)
        y: Tensor = normed
        return y


def rotary_tables(positions: Int[Tensor, "B L"], head_size: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, L, 1, e / 2] in fp32."""
    exponent = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32) / head_size
    angle = positions[..., None].float() * ROPE_THETA**-exponent
    return angle.cos()[:, :, None], angle.sin()[:, :, None]


def rotate(x: Float[Tensor, "B L n e"], rotary: tuple[Tensor, Tensor]) -> Float[Tensor, "B L n e"]:
    """Rotate the first half of each head against the second, in fp32."""
    cos, sin = rotary
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def flow_time_sines(tau: Float[Tensor, " B"], size: int) -> Float[Tensor, "B size"]:
    """Sines, then cosines, of 2 pi tau / period, for periods from 4 ms to 4 in geometric steps (openpi)."""
    # In double precision: 2 pi / 0.004 turns single-precision rounding of tau's factor into visible phase.
    fraction = torch.linspace(0, 1, size // 2, dtype=torch.float64, device=tau.device)
    period = SHORTEST_PERIOD * (LONGEST_PERIOD / SHORTEST_PERIOD) ** fraction
    angle = 2 * math.pi * tau.double()[:, None] / period
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


def suffix_mask(valid: Sequence[Bool[Tensor, "B L"]], *, causal: bool) -> Bool[Tensor, "B L L"]:
    """Who reads whom inside the suffix: blocks in order, each seeing itself and those before it.

    Args:
        valid: one mask a block; False entries are read by nobody.
        causal: inside the last block each token sees only itself and earlier ones.
    """
    lengths = [block.shape[1] for block in valid]
    device = valid[0].device
    block = torch.repeat_interleave(torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device))
    order = torch.arange(len(block), device=device)
    allowed = block[None] <= block[:, None]
    if causal:
        allowed &= (order[None] <= order[:, None]) | (block[:, None] < len(lengths) - 1)
    return allowed[None] & torch.cat(list(valid), dim=1)[:, None]
