"""Qwen-VLA: a Qwen3.5 vision-language model and a flow-matching action expert (papers: Qwen-VLA, section 2).

Size is configuration: the 4.54 B + 1.15 B model of the paper and the tiny one that trains on two CPU cores are
the same class with different YAML (configs/policy).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from tensordict import TensorDict
from torch import Tensor, nn

from rlvla.policies.action_stats import ActionStats
from rlvla.policies.base import Context
from rlvla.policies.expert import Expert, ExpertConfig
from rlvla.policies.processor import patchify
from rlvla.policies.prompt import embodiment_prompt
from rlvla_envs.base import EnvSpec, Observation

PAD_TO = 16
"""Tokens that a context's length is rounded up to."""


@dataclass(kw_only=True)
class VLMConfig:
    """Sizes of the Qwen3.5 model, in the names of its own configuration."""

    vocab_size: int = 512
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 2
    num_key_value_heads: int = 1
    head_dim: int = 64
    linear_key_head_dim: int = 32
    linear_value_head_dim: int = 32
    linear_num_key_heads: int = 2
    linear_num_value_heads: int = 4
    full_attention_interval: int = 4
    """Every n-th layer is softmax attention, the others are gated linear attention."""
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 0.5
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


@dataclass(kw_only=True)
class QwenVLAConfig:
    """A Qwen-VLA policy."""

    name: str = "qwen_vla"
    vlm: VLMConfig = field(default_factory=VLMConfig)
    expert: ExpertConfig = field(default_factory=ExpertConfig)
    num_denoising_steps: int = 4
    """N: Euler steps from noise to action, in SFT evaluation, rollouts and the learner alike. 2 to 10."""
    use_state: bool = True
    """Give the expert one token of normalised proprioception. The paper's model has none."""
    value_uses_state: bool = True
    """Append that state to the critic's features. The paper's critic sees the VLM only."""

    def __post_init__(self) -> None:
        if self.name != "qwen_vla":
            raise ValueError(f"policy.name is {self.name!r}; policies: qwen_vla.")
        if self.num_denoising_steps < 1:
            raise ValueError(
                f"policy.num_denoising_steps is {self.num_denoising_steps}; it must be at least 1, and 2 for PPO."
            )


def vlm_config(config: VLMConfig, token_ids: dict[str, int]) -> Any:
    """The transformers configuration of the backbone."""
    from transformers import Qwen3_5Config

    text = {
        name: getattr(config, name)
        for name in [
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_num_key_heads",
            "linear_num_value_heads",
            "full_attention_interval",
            "max_position_embeddings",
        ]
    }
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": config.rope_theta,
        "partial_rotary_factor": config.partial_rotary_factor,
        "mrope_section": list(config.mrope_section),
        "mrope_interleaved": True,
    }
    text |= {"pad_token_id": token_ids["pad"], "tie_word_embeddings": True}
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
    return Qwen3_5Config(
        text_config=text,
        vision_config=vision,
        image_token_id=token_ids["image"],
        video_token_id=token_ids["video"],
        vision_start_token_id=token_ids["vision_start"],
        vision_end_token_id=token_ids["vision_end"],
        tie_word_embeddings=True,
    )


class QwenVLA(nn.Module):
    """The policy. See `rlvla.policies.base.FlowPolicy` for what each method promises."""

    def __init__(self, config: QwenVLAConfig, env_spec: EnvSpec, stats: ActionStats, tokenizer: Any) -> None:
        from transformers import Qwen3_5Model

        super().__init__()
        _check_sizes(config, env_spec, tokenizer)
        self.config, self.env_spec, self.stats, self.tokenizer = config, env_spec, stats, tokenizer
        self.num_denoising_steps = config.num_denoising_steps
        self.horizon, self.channels = config.expert.horizon, config.expert.channels
        self.vlm: Any = Qwen3_5Model(vlm_config(config.vlm, _token_ids(tokenizer)))
        state_size = env_spec.state_size if config.use_state else 0
        self.expert = Expert(config.expert, config.vlm.hidden_size, state_size, config.vlm.rope_theta)
        self.value_size = config.vlm.hidden_size + (env_spec.state_size if config.value_uses_state else 0)
        mask = np.zeros((self.horizon, self.channels), dtype=np.bool_)
        mask[: env_spec.chunk_size, : env_spec.action_size] = stats.active
        self._action_mask: Tensor
        self.register_buffer("_action_mask", torch.from_numpy(mask), persistent=False)
        self._layouts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        # A policy is deterministic given its noise: no dropout in SFT, rollouts, or updates, so that the
        # ratio before the first step is 1. It stays in eval mode; gradients do not need train mode.
        self.eval()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves and casts as every module does, but rotary frequencies stay in fp32: a position in the hundreds
        does not fit into the 8 bits of a bfloat16."""
        rotary: list[Any] = [m for m in self.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
        kept = [module.inv_freq.float() for module in rotary]
        nn.Module._apply(self, fn, recurse)  # type: ignore[no-untyped-call]
        for module, frequency in zip(rotary, kept, strict=True):
            if not module.inv_freq.is_meta:
                module.inv_freq = frequency.to(module.inv_freq.device)
        return self

    def initialize_vision(self) -> None:
        """Widen the vision tower's start, for a model trained from scratch (`VLMConfig.vision_position_std`)."""
        visual, vlm = self.vlm.visual, self.config.vlm
        nn.init.normal_(visual.pos_embed.weight, std=vlm.vision_position_std)
        nn.init.normal_(visual.patch_embed.proj.weight, std=vlm.vision_patch_std)

    def collate(self, observation: Observation) -> TensorDict:
        """Right-padded prompts, positions and images; raises as `context_length` does."""
        layouts = [self._layout(text) for text in observation.instruction]
        length = max(self.context_length(text) for text in observation.instruction)
        batch = len(observation)
        ids = torch.full((batch, length), self.tokenizer.pad_token_id)
        mask = torch.zeros((batch, length), dtype=torch.bool)
        token_type = torch.zeros((batch, length), dtype=torch.long)
        position_ids = torch.zeros((batch, 3, length), dtype=torch.long)
        for row, (row_ids, row_type, row_positions) in enumerate(layouts):
            n = len(row_ids)
            ids[row, :n], mask[row, :n], token_type[row, :n] = row_ids, True, row_type
            position_ids[row, :, :n] = row_positions
        cameras = [camera.name for camera in self.env_spec.cameras]
        state = observation.state if observation.state is not None else np.zeros((batch, 0), np.float32)
        return TensorDict(
            {
                "input_ids": ids,
                "mask": mask,
                "token_type": token_type,
                "position_ids": position_ids,
                "images": torch.from_numpy(np.stack([observation.images[c] for c in cameras], axis=1)),
                "state": torch.from_numpy(self.stats.normalize_state(state)),
            },
            batch_size=[batch],
        )

    def context_length(self, instruction: str) -> int:
        """A multiple of PAD_TO where the expert's table allows it, so that most instructions share a length.

        Raises:
            ValueError: a prompt longer than the expert's table of context positions.
        """
        length = len(self._layout(instruction)[0])
        limit = self.config.expert.context_positions
        if limit and length > limit:
            raise ValueError(
                f"the prompt and images take {length} tokens; policy.expert.context_positions allows {limit}. "
                "Shorten the instruction or train with a larger table."
            )
        padded = -(-length // PAD_TO) * PAD_TO
        return min(padded, limit) if limit else padded

    def encode(self, batch: TensorDict) -> Context:
        images = batch["images"]
        rows, views, height, width = images.shape[:4]
        patch = self.config.vlm.patch_size
        grid = torch.tensor([[1, height // patch, width // patch]]).expand(rows * views, -1)
        tokens = self.vlm(
            input_ids=batch["input_ids"],
            attention_mask=batch["mask"].long(),
            pixel_values=patchify(images.flatten(0, 1), patch, 2, 2).to(self.vlm.dtype),
            image_grid_thw=grid.to(images.device),
            mm_token_type_ids=batch["token_type"],
            position_ids=batch["position_ids"].transpose(0, 1),
            use_cache=False,
        ).last_hidden_state
        mask = batch["mask"]
        weight = mask[..., None].to(tokens.dtype)
        pooled = ((tokens * weight).sum(dim=1) / weight.sum(dim=1)).detach()
        return Context(tokens, mask, batch["position_ids"], pooled, batch["state"])

    def value_features(self, context: Context) -> Float[Tensor, "B V"]:
        parts = [context.pooled]
        if self.config.value_uses_state:
            parts.append(context.state)
        return torch.cat(parts, dim=-1).detach()

    def velocity(
        self,
        context: Context,
        sample: Float[Tensor, "B H K"],
        tau: Float[Tensor, " B"],
        step: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B H K"]:
        del step  # This expert reads tau itself; policies with bucketed times read the step.
        velocity: Tensor = self.expert(
            context.tokens, context.mask, context.position_ids, context.state, sample, self._action_mask, tau
        )
        return velocity

    def action_mask(self) -> Bool[Tensor, "H K"]:
        return self._action_mask

    def actions_to_env(self, sample: Float[Tensor, "B H K"]) -> Float[np.ndarray, "B H C"]:
        """Clipped to the quantiles' range first: outside it the data says nothing, and SFT never went there."""
        spec = self.env_spec
        chunk = sample[:, : spec.chunk_size, : spec.action_size].float().clamp(-1, 1)
        return self.stats.denormalize(chunk.cpu().numpy())

    def actions_from_env(self, action: Float[np.ndarray, "B H C"]) -> Float[Tensor, "B H K"]:
        batch, horizon, channels = action.shape
        padded = torch.zeros(batch, self.horizon, self.channels)
        padded[:, :horizon, :channels] = torch.from_numpy(self.stats.normalize(action))
        return padded * self._action_mask.cpu()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"vlm": list(self.vlm.parameters()), "expert": list(self.expert.parameters())}

    def sharding_units(self) -> list[nn.Module]:
        return [*self.vlm.visual.blocks, *self.vlm.language_model.layers, *self.expert.blocks]

    def _layout(self, instruction: str) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids [L], image marks [L] and m-RoPE positions [3 L] of one prompt; cached.

        transformers computes the positions in a Python loop over rows with host synchronisation. They depend on
        the prompt alone, so it does so once per instruction.
        """
        if instruction not in self._layouts:
            spec, tok = self.env_spec, self.tokenizer
            content: list[dict[str, str]] = [{"type": "image"} for _ in spec.cameras]
            content.append({"type": "text", "text": embodiment_prompt(spec, instruction)})
            text = tok.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            unit = self.config.vlm.patch_size * 2
            pieces = text.split("<|image_pad|>")
            filled = pieces[0]
            for camera, piece in zip(spec.cameras, pieces[1:], strict=True):
                num_tokens = (camera.height // unit) * (camera.width // unit)
                filled += "<|image_pad|>" * num_tokens + piece
            ids = torch.tensor([tok(filled, add_special_tokens=False)["input_ids"]])
            image = (ids == self.vlm.config.image_token_id).long()
            grid = torch.tensor(
                [
                    [1, c.height // self.config.vlm.patch_size, c.width // self.config.vlm.patch_size]
                    for c in spec.cameras
                ]
            )
            positions, _ = self.vlm.get_rope_index(
                ids, mm_token_type_ids=image, image_grid_thw=grid, attention_mask=torch.ones_like(ids)
            )
            self._layouts[instruction] = (ids[0], image[0], positions[:, 0])
        return self._layouts[instruction]


def prompts_for_tokenizer(spec: EnvSpec, instructions: Iterable[str]) -> list[str]:
    """Chat turns like those the policy will read, to train a small tokenizer on."""
    turns = []
    for instruction in instructions:
        body = embodiment_prompt(spec, instruction)
        turns.append(f"<|im_start|>user\n{body}<|im_end|>\n<|im_start|>assistant\n")
    return turns


def _token_ids(tokenizer: Any) -> dict[str, int]:
    names = {
        "pad": "<|endoftext|>",
        "image": "<|image_pad|>",
        "video": "<|video_pad|>",
        "vision_start": "<|vision_start|>",
        "vision_end": "<|vision_end|>",
    }
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


def _check_sizes(config: QwenVLAConfig, spec: EnvSpec, tokenizer: Any) -> None:
    """Everything that must fit, before a parameter is allocated."""
    problems = []
    if spec.action_size > config.expert.channels:
        problems.append(
            f"the suite has {spec.action_size} action channels, policy.expert.channels pads to "
            f"{config.expert.channels}; raise it"
        )
    if spec.chunk_size > config.expert.horizon:
        problems.append(
            f"suite.chunk_size is {spec.chunk_size}, policy.expert.horizon pads to {config.expert.horizon}; raise it"
        )
    if len(tokenizer) > config.vlm.vocab_size:
        problems.append(
            f"the tokenizer has {len(tokenizer)} tokens, policy.vlm.vocab_size is {config.vlm.vocab_size}; raise it"
        )
    if len({(c.height, c.width) for c in spec.cameras}) > 1:
        sizes = ", ".join(f"{c.name} {c.height} x {c.width}" for c in spec.cameras)
        problems.append(f"all cameras must have one size, and they are {sizes}; change suite.image_size")
    unit = config.vlm.patch_size * 2
    problems += [
        f"camera {c.name} is {c.height} x {c.width}, which merged patches of {unit} pixels do not divide; "
        "change suite.image_size"
        for c in spec.cameras
        if c.height % unit or c.width % unit
    ]
    if problems:
        raise ValueError("the policy does not fit the suite: " + "; ".join(problems) + ".")
