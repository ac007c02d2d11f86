"""The Qwen vision-language models that policies stand on: their sizes, and what transformers wants to know."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(kw_only=True)
class QwenSizes:
    """What Qwen3-VL and Qwen3.5 have in common, in the names of their own configurations."""

    vocab_size: int = 512
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 2
    num_key_value_heads: int = 1
    head_dim: int = 64
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    mrope_section: tuple[int, ...] = (6, 5, 5)
    vision_depth: int = 2
    vision_hidden_size: int = 64
    vision_intermediate_size: int = 128
    vision_num_heads: int = 2
    patch_size: int = 8
    num_position_embeddings: int = 64
    """Of the vision tower: a square grid that is interpolated to the image's."""
    vision_position_std: float = 0.02
    """Standard deviation of the vision tower's position table at initialisation, from-scratch models only. At
    0.02 it drowns under the patches and the policy stays blind (docs/adr/0004)."""
    vision_patch_std: float = 0.02
    """The same for the patch embedding."""

    def __post_init__(self) -> None:
        self.mrope_section = tuple(self.mrope_section)

    def check_rotation(self, rotated: float) -> None:
        """Raise ValueError where ``mrope_section`` does not divide what a head rotates."""
        if len(self.mrope_section) != 3 or sum(self.mrope_section) != rotated / 2:
            raise ValueError(
                f"policy.vlm.mrope_section is {list(self.mrope_section)}; it must be three numbers that add up to half "
                f"of what a head rotates, {rotated / 2:g}."
            )


@dataclass(kw_only=True)
class VLMConfig(QwenSizes):
    """Sizes of the Qwen3.5 model, in the names of its own configuration."""

    linear_key_head_dim: int = 32
    linear_value_head_dim: int = 32
    linear_num_key_heads: int = 2
    linear_num_value_heads: int = 4
    full_attention_interval: int = 4
    """Every n-th layer is softmax attention, the others are gated linear attention."""
    partial_rotary_factor: float = 0.5


TEXT_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
LINEAR_ATTENTION_SIZES = (
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "full_attention_interval",
)


def vlm_config(config: VLMConfig, ids: dict[str, int]) -> Any:
    """The transformers configuration of a Qwen3.5."""
    from transformers import Qwen3_5Config

    settings = _settings(config, ids)
    settings["text_config"] |= {name: getattr(config, name) for name in LINEAR_ATTENTION_SIZES}
    settings["text_config"]["rope_parameters"]["partial_rotary_factor"] = config.partial_rotary_factor
    return Qwen3_5Config(**settings)


def qwen3_vl_config(config: QwenSizes, ids: dict[str, int], deepstack: Sequence[int]) -> Any:
    """The transformers configuration of a Qwen3-VL.

    Args:
        deepstack: vision layers whose features are added behind the first text layers as well.
    """
    from transformers import Qwen3VLConfig

    settings = _settings(config, ids)
    settings["vision_config"]["deepstack_visual_indexes"] = list(deepstack)
    return Qwen3VLConfig(**settings)


def _settings(config: QwenSizes, ids: dict[str, int]) -> dict[str, Any]:
    """What the configurations of both families take."""
    text: dict[str, Any] = {name: getattr(config, name) for name in TEXT_SIZES}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": config.rope_theta,
        "mrope_section": list(config.mrope_section),
        "mrope_interleaved": True,
    }
    text |= {"pad_token_id": ids["pad"], "tie_word_embeddings": True}
    vision = {
        "depth": config.vision_depth,
        "hidden_size": config.vision_hidden_size,
        "intermediate_size": config.vision_intermediate_size,
        "num_heads": config.vision_num_heads,
        "patch_size": config.patch_size,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": config.hidden_size,
        "num_position_embeddings": config.num_position_embeddings,
    }
    return {
        "text_config": text,
        "vision_config": vision,
        "image_token_id": ids["image"],
        "video_token_id": ids["video"],
        "vision_start_token_id": ids["vision_start"],
        "vision_end_token_id": ids["vision_end"],
        "tie_word_embeddings": True,
    }


def token_ids(tokenizer: Any) -> dict[str, int]:
    """Ids of the special tokens that a Qwen VLM's configuration names."""
    names = {
        "pad": "<|endoftext|>",
        "image": "<|image_pad|>",
        "video": "<|video_pad|>",
        "vision_start": "<|vision_start|>",
        "vision_end": "<|vision_end|>",
    }
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


def widen_vision(vlm: Any, config: QwenSizes) -> None:
    """Widen the vision tower's start, for a model trained from scratch (`QwenSizes.vision_position_std`)."""
    nn.init.normal_(vlm.visual.pos_embed.weight, std=config.vision_position_std)
    nn.init.normal_(vlm.visual.patch_embed.proj.weight, std=config.vision_patch_std)


def with_head(vlm: Any) -> Any:
    """The transformers model that generates, around a backbone whose weights it shares."""
    import transformers

    kind = getattr(transformers, type(vlm).__name__.removesuffix("Model") + "ForConditionalGeneration")
    with torch.device("meta"):
        model = kind(vlm.config)
    model.model = vlm
    model.lm_head.weight = vlm.get_input_embeddings().weight
    return model.eval()
