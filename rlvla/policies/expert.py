"""The action expert of Qwen-VLA: a single-stream DiT over VLM hidden states and the noisy chunk.

Section 2.2 fixes what is here: one sequence, joint self-attention, AdaLN on flow time, m-RoPE continued from the
backbone, and the parameter counts. The paper is silent on heads, on normalisation of queries and keys, on the
attention mask and on gates; the choices are bidirectional attention, RMSNorm on queries and keys, and a gate
after each branch. docs/adr/0003-expert.md says why.
"""

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

FLOW_TIME_FEATURES = 256


@dataclass(kw_only=True)
class ExpertConfig:
    """Sizes of the DiT. The paper's: 16 blocks of 1536, SwiGLU 10240, K = 64, 1.149 B parameters."""

    hidden_size: int = 96
    num_blocks: int = 2
    num_heads: int = 3
    ffn_size: int = 192
    """Of the SwiGLU."""
    channels: int = 8
    """K: action channels after zero-padding."""
    horizon: int = 8
    """H: longest chunk; a suite's may be shorter."""
    mrope_section: tuple[int, ...] = (6, 5, 5)
    """Rotary frequencies for time, height and width; they add up to half the size of a head."""
    context_positions: int = 0
    """Length of a table of learned positions added to context tokens; 0 has none, as in the paper. A small
    expert trained from scratch does not find the right image token without (docs/adr/0004)."""
    gate_init: float = 0.0
    """Start of the AdaLN gates. 0 is AdaLN-Zero; 1 lets a small expert see the context from the first step."""

    def __post_init__(self) -> None:
        self.mrope_section = tuple(self.mrope_section)
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"policy.expert.hidden_size is {self.hidden_size}, which {self.num_heads} heads do not divide."
            )
        half = self.hidden_size // self.num_heads // 2
        if sum(self.mrope_section) != half or len(self.mrope_section) != 3:
            raise ValueError(
                f"policy.expert.mrope_section is {list(self.mrope_section)}; it must be three numbers that add "
                f"up to half the head size, {half}."
            )


class Loop(NamedTuple):
    """What the denoising steps of one context share."""

    inputs: Float[Tensor, "B C d"]
    """Tokens of the context and the state."""
    rotary: tuple[Tensor, Tensor]
    key_mask: Bool[Tensor, "B 1 1 L"] | None
    modulations: tuple[Float[Tensor, "N 6d"], ...] = ()
    """Of each block at each step, where they were computed before."""
    final: Float[Tensor, "N 2d"] | None = None


def flow_time_features(tau: Float[Tensor, " B"]) -> Float[Tensor, "B 256"]:
    """Sines and cosines of 1000 tau, as diffusion models encode time."""
    half = FLOW_TIME_FEATURES // 2
    frequency = torch.exp(-torch.log(torch.tensor(1e4)) * torch.arange(half, device=tau.device) / half)
    angle = 1000 * tau.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Block(nn.Module):
    """Attention and SwiGLU, each modulated and gated by the flow time: 30 d^2 parameters at the paper's sizes."""

    def __init__(self, config: ExpertConfig) -> None:
        super().__init__()
        d, head_size = config.hidden_size, config.hidden_size // config.num_heads
        self.num_heads = config.num_heads
        self.modulation = nn.Linear(d, 6 * d)
        self.qkv = nn.Linear(d, 3 * d)
        self.query_norm = nn.RMSNorm(head_size)
        self.key_norm = nn.RMSNorm(head_size)
        self.out = nn.Linear(d, d)
        self.ffn_in = nn.Linear(d, 2 * config.ffn_size)
        self.ffn_out = nn.Linear(config.ffn_size, d)
        nn.init.zeros_(self.modulation.weight)
        with torch.no_grad():
            bias = torch.zeros(6, d)
            bias[[2, 5]] = config.gate_init
            self.modulation.bias.copy_(bias.flatten())

    def forward(
        self,
        x: Float[Tensor, "B L d"],
        time: Float[Tensor, "B d"],
        rotary: tuple[Tensor, Tensor],
        key_mask: Bool[Tensor, "B 1 1 L"] | None,
        modulation: Float[Tensor, "B 6d"] | None = None,
        wanted: int | None = None,
    ) -> Float[Tensor, "B W d"]:
        """
        Args:
            modulation: what ``time`` is modulated to, where that is known; ``time`` is not read then.
            wanted: W, how many of the last positions are asked for; all L where None. The others are still attended
                to, and are not computed any further.
        """
        if modulation is None:
            modulation = self.modulation(time)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation[:, None].chunk(6, dim=-1)
        batch, length, d = x.shape
        h = F.layer_norm(x, (d,)) * (1 + scale_a) + shift_a
        q, k, v = self.qkv(h).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        # Under autocast they are narrower than the norms, which would then take a slow way.
        q, k = (part.to(self.query_norm.weight.dtype) for part in (q, k))
        rotary_q = rotary
        if wanted is not None:
            x, q, rotary_q = x[:, -wanted:], q[:, :, -wanted:], (rotary[0][:, :, -wanted:], rotary[1][:, :, -wanted:])
        q, k = _rotate(self.query_norm(q), rotary_q), _rotate(self.key_norm(k), rotary)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)
        x = x + gate_a * self.out(attended.transpose(1, 2).reshape(x.shape))
        h = F.layer_norm(x, (d,)) * (1 + scale_f) + shift_f
        value, gate = self.ffn_in(h).chunk(2, dim=-1)
        y: Tensor = x + gate_f * self.ffn_out(F.silu(gate) * value)
        return y


class Expert(nn.Module):
    """Velocity of the action chunk given the VLM's hidden states."""

    fp32_layers = ("action_out",)

    def __init__(self, config: ExpertConfig, context_size: int, state_size: int, rope_theta: float) -> None:
        super().__init__()
        d = config.hidden_size
        self.config = config
        self.context_in = nn.Linear(context_size, d)
        self.state_in = nn.Linear(state_size, d) if state_size else None
        self.positions = None
        if config.context_positions:
            self.positions = nn.Parameter(torch.randn(config.context_positions, d) * 0.5)
        self.action_in = nn.Sequential(nn.Linear(config.channels, d), nn.SiLU(), nn.Linear(d, d))
        last = nn.Linear(d, config.channels)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.action_out = nn.Sequential(nn.Linear(d, d), nn.SiLU(), last)
        self.time_in = nn.Sequential(nn.Linear(FLOW_TIME_FEATURES, d), nn.SiLU(), nn.Linear(d, d))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.final_modulation = nn.Linear(d, 2 * d)
        self.rope_theta = rope_theta

    def forward(
        self,
        tokens: Float[Tensor, "B S D"],
        mask: Bool[Tensor, "B S"],
        position_ids: Int[Tensor, "B 3 S"],
        state: Float[Tensor, "B P"],
        sample: Float[Tensor, "B H K"],
        action_mask: Bool[Tensor, "H K"] | Bool[Tensor, "B H K"],
        tau: Float[Tensor, " B"],
        loop: Loop | None = None,
        step: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B H K"]:
        """Padded entries of ``sample`` are zeroed on the way in and padded steps are hidden as keys, so a chunk
        padded to H x K and the same chunk unpadded have the same velocity.

        Args:
            loop: of `prepare`, for the same context; ``step`` is then where each row is on its grid.
        """
        if loop is None:
            loop = self.prepare(tokens, mask, position_ids, state, action_mask, sample.shape[1])
        dtype = self.context_in.weight.dtype
        x = torch.cat([loop.inputs, self.action_in((sample * action_mask).to(dtype))], dim=1)
        if torch.is_autocast_enabled(x.device.type):
            # Sums of what all blocks add: bfloat16 would drop the small ones.
            x = x.float()
        if loop.final is None or step is None:
            time = F.silu(self.time_in(flow_time_features(tau).to(x.dtype)))
            known: list[Tensor | None] = [None] * len(self.blocks)
        else:
            time = loop.final
            known = [modulation[step] for modulation in loop.modulations]
        horizon = sample.shape[1]
        for number, (block, modulation) in enumerate(zip(self.blocks, known, strict=True), 1):
            # Only the chunk is read behind the last block: what it makes of the context would be thrown away.
            wanted = horizon if number == len(self.blocks) else None
            x = block(x, time, loop.rotary, loop.key_mask, modulation, wanted)
        final = self.final_modulation(time) if loop.final is None or step is None else loop.final[step]
        shift, scale = final[:, None].chunk(2, dim=-1)
        actions = F.layer_norm(x[:, -horizon:], (x.shape[-1],)) * (1 + scale) + shift
        # A velocity of 8 bits would be noise in every log-probability; this layer costs nothing.
        with torch.autocast(x.device.type, enabled=False):
            exact = next(self.action_out.parameters()).dtype
            velocity: Tensor = self.action_out(actions.to(exact)).float() * action_mask
        return velocity

    def prepare(
        self,
        tokens: Float[Tensor, "B S D"],
        mask: Bool[Tensor, "B S"],
        position_ids: Int[Tensor, "B 3 S"],
        state: Float[Tensor, "B P"],
        action_mask: Bool[Tensor, "H K"] | Bool[Tensor, "B H K"],
        horizon: int,
        grid: Float[Tensor, " N"] | None = None,
    ) -> Loop:
        """What does not depend on the sample.

        Args:
            grid: flow times of the steps to come; their modulations, a fifth of the weights, are then read once and
                not at each step.
        """
        batch = len(tokens)
        dtype = self.context_in.weight.dtype
        context = self.context_in(tokens.to(dtype))
        if self.positions is not None:
            context = context + self.positions[: tokens.shape[1]]
        parts, masks = [context], [mask]
        if self.state_in is not None:
            parts.append(self.state_in(state.to(dtype))[:, None])
            masks.append(mask.new_ones(batch, 1))
        masks.append(action_mask.any(dim=-1).expand(batch, horizon))
        inputs, valid = torch.cat(parts, dim=1), torch.cat(masks, dim=1)
        # A mask keeps SDPA off its fastest kernel: hand one over only when something is padded.
        key_mask = None if bool(valid.all()) else valid[:, None, None]
        rotary = self._rotary(mask, position_ids, valid.shape[1] - tokens.shape[1])
        if grid is None:
            return Loop(inputs, rotary, key_mask)
        time = F.silu(self.time_in(flow_time_features(grid.to(tokens.device)).to(dtype)))
        modulations = tuple(cast(Block, block).modulation(time) for block in self.blocks)
        return Loop(inputs, rotary, key_mask, modulations, self.final_modulation(time))

    def _rotary(
        self, mask: Bool[Tensor, "B S"], position_ids: Int[Tensor, "B 3 S"], num_new: int
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, 1, L, head]: the context keeps its positions, what follows counts on from
        the largest valid one on all three axes, as the backbone itself does for text after an image."""
        last = (position_ids * mask[:, None]).amax(dim=(1, 2))
        new = last[:, None] + 1 + torch.arange(num_new, device=mask.device)
        positions = torch.cat([position_ids, new[:, None].expand(-1, 3, -1)], dim=2)

        half = sum(self.config.mrope_section)
        frequency = self.rope_theta ** (-torch.arange(half, device=mask.device) / half)
        angle = positions[..., None].float() * frequency  # [B 3 L half]
        # Interleaved as in Qwen3.5: frequencies go t h w t h w ... until an axis has used up its section.
        merged = angle[:, 0].clone()
        for axis in (1, 2):
            chosen = slice(axis, 3 * self.config.mrope_section[axis], 3)
            merged[..., chosen] = angle[:, axis, :, chosen]
        full = torch.cat([merged, merged], dim=-1)[:, None]
        # That of what is rotated: a frozen matrix may be narrower.
        norms = (block.query_norm for block in self.blocks if isinstance(block, Block))
        dtype = next((norm.weight.dtype for norm in norms), torch.float32)
        return full.cos().to(dtype), full.sin().to(dtype)


def _rotate(x: Float[Tensor, "B n L h"], rotary: tuple[Tensor, Tensor]) -> Float[Tensor, "B n L h"]:
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
