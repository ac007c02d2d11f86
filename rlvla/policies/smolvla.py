"""SmolVLA: the first layers of SmolVLM2 and an expert that reads them, every second layer by cross-attention (LeRobot).

State is the last token of the prefix. Action tokens read earlier ones only, so a chunk shorter than the checkpoint's is
what its first steps would have been.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from rlvla.policies.action_stats import ActionStats
from rlvla.policies.architectures import check_name
from rlvla.policies.prefix import ExpertSizes, Fit, PrefixOptions, PrefixPolicy, PrefixSizes
from rlvla.policies.suffix_expert import ROPE_THETA, Norm
from rlvla_envs.base import EnvSpec


@dataclass(kw_only=True)
class SmolVLMSizes(PrefixSizes):
    """Sizes of SmolVLM2, in the names of its own configuration."""

    num_hidden_layers: int = 2
    """Layers that are used: the first 16 of 32 in SmolVLA."""
    rms_norm_eps: float = 1e-5
    image_size: int = 32
    """Side of the square that images are resized to: 512 in SmolVLA."""
    scale_factor: int = 2
    """Patches that become one image token, on each side: 4 in SmolVLM2."""

    @property
    def image_tokens(self) -> int:
        return (self.image_size // (self.patch_size * self.scale_factor)) ** 2

    def __post_init__(self) -> None:
        unit = self.patch_size * self.scale_factor
        if self.image_size % unit:
            raise ValueError(
                f"policy.vlm.image_size is {self.image_size}, which patches of {self.patch_size}, merged "
                f"{self.scale_factor} by {self.scale_factor}, do not divide; choose a multiple of {unit}."
            )


@dataclass(kw_only=True)
class SmolVLAConfig(PrefixOptions):
    """A SmolVLA policy."""

    name: str = "smolvla"
    vlm: SmolVLMSizes = field(default_factory=SmolVLMSizes)
    expert: ExpertSizes = field(default_factory=ExpertSizes)
    self_attention_every: int = 2
    """Expert layers 0, n, 2n, ... attend to prefix and actions alike, the others to the prefix alone; 0 leaves none
    of the first kind, 1 none of the second."""
    image_fit: Fit = Fit.bottom_right
    clean_prompt: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.name, "smolvla")
        if self.self_attention_every < 0:
            raise ValueError(
                f"policy.self_attention_every is {self.self_attention_every}; it must be 0 or more. Usual: 2."
            )


class SmolVLA(PrefixPolicy):
    """The policy. See `rlvla.policies.base.FlowPolicy` for what each method promises.

    The projection of the state belongs to the group "vlm": `encode` reads it, and a stored context must stay right
    while the backbone is frozen.
    """

    causal = True

    def __init__(self, config: SmolVLAConfig, env_spec: EnvSpec, stats: ActionStats, tokenizer: Any) -> None:
        from transformers import SmolVLMModel

        super().__init__(config, env_spec, stats, tokenizer, state_limit=config.expert.state_channels)
        sizes, d = config.vlm, config.expert.hidden_size
        self.vlm = SmolVLMModel(_smolvlm(sizes))
        self.state_proj = nn.Linear(config.expert.state_channels, sizes.hidden_size)
        every = config.self_attention_every
        projections = {"action_time_mlp_in": (2 * d, d), "action_time_mlp_out": (d, d)}
        self.expert = self.make_expert(
            Norm.llama,
            projections,
            norm_eps=sizes.rms_norm_eps,
            activation="silu",
            cross=[every == 0 or i % every > 0 for i in range(sizes.num_hidden_layers)],
        )
        self.eval()

    @property
    def language(self) -> Any:
        return self.vlm.text_model

    @property
    def vision(self) -> Any:
        return self.vlm.vision_model

    def noise_mask(self) -> Bool[Tensor, "H K"]:
        if not self.config.denoise_padding:
            return self.action_mask()
        # Channels only: what steps past the suite's chunk hold, its own steps never read.
        steps = torch.arange(self.horizon, device=self._action_mask.device) < self.env_spec.chunk_size
        return steps[:, None].expand(-1, self.channels)

    def embed_images(self, pixels: Float[Tensor, "N 3 size size"]) -> Float[Tensor, "N tokens D"]:
        features: Tensor = self.vlm.connector(self.vlm.vision_model(pixel_values=pixels).last_hidden_state)
        return features * math.sqrt(features.shape[-1])

    def embed_text(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        embedded: Tensor = self.language.embed_tokens(ids)
        return embedded * math.sqrt(embedded.shape[-1])

    def embed_state(self, state: Float[Tensor, "B P"]) -> Float[Tensor, "B 1 D"]:
        padded = F.pad(state, (0, self.config.expert.state_channels - state.shape[1]))
        token: Tensor = self.state_proj(padded.to(self.state_proj.weight.dtype))[:, None]
        return token

    def embed_suffix(
        self, sample: Float[Tensor, "B H K"], state: Float[Tensor, "B P"], time: Float[Tensor, "B d"]
    ) -> tuple[list[Tensor], None]:
        return [self.fuse_time(sample, time)], None


def _smolvlm(sizes: SmolVLMSizes) -> Any:
    """The transformers configuration of the backbone."""
    from transformers import SmolVLMConfig

    text = {
        "model_type": "llama",
        "rms_norm_eps": sizes.rms_norm_eps,
        "max_position_embeddings": 8192,
        # LeRobot rotates by 10,000 whatever the VLM was trained with, and its checkpoints have learnt that.
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return SmolVLMConfig(
        text_config=sizes.text() | text,
        vision_config=sizes.vision(),
        scale_factor=sizes.scale_factor,
        image_token_id=sizes.vocab_size,
    )
