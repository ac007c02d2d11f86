"""Observations as a Qwen VLM reads them: prompts with image tokens, m-RoPE positions, patches."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from tensordict import TensorDict
from torch import Tensor

from rlvla.policies.action_stats import ActionStats
from rlvla.policies.policy import Policy, camera_views, check_cameras, check_sizes
from rlvla.policies.processor import patchify, resize
from rlvla.policies.prompt import embodiment_prompt
from rlvla_envs.base import Camera, EnvSpec, Observation

PAD_TO = 16
"""Tokens that a context's length is rounded up to."""
IMAGE = "<|image_pad|>"


class Layout(NamedTuple):
    """One prompt with its images' places."""

    ids: Tensor
    """[L]"""
    image: Tensor
    """[L]: 1 on image tokens."""
    positions: Tensor
    """[3 L]: m-RoPE."""


class PromptedPolicy(Policy):
    """A policy whose context is one prompt with all camera images, read by `self.vlm`: a base model of transformers
    with ``visual`` and ``language_model`` that merges 2 x 2 patches."""

    vlm: Any
    context_limit: int = 0
    """Longest context; 0 has no limit."""

    def __init__(
        self,
        config: Any,
        env_spec: EnvSpec,
        stats: ActionStats,
        tokenizer: Any,
        *,
        horizon: int,
        channels: int,
        part: str = "policy.expert",
    ) -> None:
        """Check that all fits, before a parameter is allocated.

        Args:
            part: where a user sets H and K.

        Raises:
            ValueError: as `check_sizes`.
        """
        _check(config, env_spec, tokenizer, horizon, channels, part)
        super().__init__(config, env_spec, stats, tokenizer, horizon=horizon, channels=channels)
        self._part = part

    def check_embodiment(self, env_spec: EnvSpec) -> None:
        _check(self.config, env_spec, self.tokenizer, self.horizon, self.channels, self._part)

    def prompt(self, instruction: str) -> str:
        """The chat text of one observation, with one image token for each camera."""
        return self._embodiment_chat(instruction)

    def _embodiment_chat(self, instruction: str, *, images: bool = True, num_actions: int | None = None) -> str:
        """Qwen-VLA's (section 2.3).

        Args:
            images: False leaves the cameras out.
            num_actions: how many the prompt asks for; the suite's chunk where not given.
        """
        cameras = self.env_spec.cameras if images else ()
        content: list[dict[str, str]] = []
        for camera in cameras:
            image = [{"type": "image"}]
            if len(cameras) > 1:
                # Which view is which (Qwen-VLA, section 3.2.1). One camera has nothing to be told from.
                start, end = view_tags(camera)
                image = [{"type": "text", "text": start}, *image, {"type": "text", "text": end}]
            content += image
        content.append({"type": "text", "text": embodiment_prompt(self.env_spec, instruction, num_actions)})
        turn = [{"role": "user", "content": content}]
        text: str = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return text

    def collate(self, observation: Observation) -> TensorDict:
        """Right-padded prompts, positions and images; raises as `context_length` does."""
        length = max(self.context_length(text) for text in observation.instruction)
        batch = self._collate([self.prompt(text) for text in observation.instruction], observation, length)
        batch["images"] = camera_views(observation, self.camera_order())
        return batch

    def collate_text(self, observation: Observation, num_actions: Sequence[int]) -> TensorDict:
        """The same without images, each row asking for so many actions: `encode` then reads text alone."""
        prompts = [
            self._embodiment_chat(text, images=False, num_actions=number)
            for text, number in zip(observation.instruction, num_actions, strict=True)
        ]
        return self._collate(prompts, observation, max(self._padded(len(self.layout(text).ids)) for text in prompts))

    def _collate(self, prompts: Sequence[str], observation: Observation, length: int) -> TensorDict:
        batch = len(observation)
        state = observation.state if observation.state is not None else np.zeros((batch, 0), np.float32)
        return TensorDict(
            {
                **self.pack([self.layout(text) for text in prompts], length),
                "state": torch.from_numpy(self.pad_state(self.stats.normalize_state(state))),
            },
            batch_size=[batch],
        )

    def pack(self, layouts: Sequence[Layout], length: int) -> dict[str, Tensor]:
        """Prompts as one right-padded batch: input_ids, mask, token_type [B S] and position_ids [B 3 S]."""
        batch = len(layouts)
        ids = torch.full((batch, length), self.tokenizer.pad_token_id)
        mask = torch.zeros((batch, length), dtype=torch.bool)
        token_type = torch.zeros((batch, length), dtype=torch.long)
        position_ids = torch.zeros((batch, 3, length), dtype=torch.long)
        for row, layout in enumerate(layouts):
            n = len(layout.ids)
            ids[row, :n], mask[row, :n], token_type[row, :n] = layout.ids, True, layout.image
            position_ids[row, :, :n] = layout.positions
        return {"input_ids": ids, "mask": mask, "token_type": token_type, "position_ids": position_ids}

    def context_length(self, instruction: str) -> int:
        """A multiple of PAD_TO where the policy's table of positions allows it, so that most instructions share a
        length.

        Raises:
            ValueError: a prompt longer than that table.
        """
        return self._padded(len(self.layout(self.prompt(instruction)).ids))

    def _padded(self, length: int) -> int:
        if self.context_limit and length > self.context_limit:
            raise ValueError(
                f"the prompt and images take {length} tokens; policy.expert.context_positions allows "
                f"{self.context_limit}. Shorten the instruction or train with a larger table."
            )
        padded = -(-length // PAD_TO) * PAD_TO
        return min(padded, self.context_limit) if self.context_limit else padded

    def image_inputs(self, vlm: Any, batch: TensorDict) -> dict[str, Tensor]:
        """Of all cameras [B views h w 3], as a Qwen model takes them: pixel_values and image_grid_thw; nothing where
        the batch is text."""
        if "images" not in batch:
            return {}
        images = batch["images"].flatten(0, 1)
        for side in self.image_sizes:
            images = resize(images, side)
        count, height, width = images.shape[:3]
        patch = self.config.vlm.patch_size
        grid = torch.tensor([[1, height // patch, width // patch]]).expand(count, -1)
        return {
            "pixel_values": patchify(images, patch, 2, 2).to(vlm.dtype),
            "image_grid_thw": grid.to(images.device),
        }

    @property
    def image_sizes(self) -> tuple[int, ...]:
        """Sides of the squares that images are resized to, one after the other; none where an architecture has no such
        option."""
        sizes: tuple[int, ...] = getattr(self.config, "image_sizes", ())
        return sizes

    def _patch_grid(self, camera: Camera) -> tuple[int, int]:
        """Rows and columns of patches that the backbone reads of a camera."""
        patch = self.config.vlm.patch_size
        if self.image_sizes:
            return (self.image_sizes[-1] // patch, self.image_sizes[-1] // patch)
        return camera.height // patch, camera.width // patch

    def layout(self, text: str) -> Layout:
        """Token ids, image marks and m-RoPE positions of one prompt; cached.

        transformers computes the positions in a Python loop over rows with host synchronisation. They depend on
        the prompt alone, so it does so once per prompt.
        """
        if text not in self._layouts:
            pieces = text.split(IMAGE)
            # All cameras have one size, so their order means nothing here.
            cameras = self.env_spec.cameras if len(pieces) > 1 else ()
            grids = [self._patch_grid(camera) for camera in cameras]
            filled = pieces[0]
            for (rows, columns), piece in zip(grids, pieces[1:], strict=True):
                filled += IMAGE * ((rows // 2) * (columns // 2)) + piece
            ids = torch.tensor([self.tokenizer(filled, add_special_tokens=False)["input_ids"]])
            image = (ids == self.vlm.config.image_token_id).long()
            grid = torch.tensor([[1, *grid] for grid in grids]) if grids else None
            positions, _ = self.vlm.get_rope_index(
                ids, mm_token_type_ids=image, image_grid_thw=grid, attention_mask=torch.ones_like(ids)
            )
            self._layouts[text] = Layout(ids[0], image[0], positions[:, 0])
        return self._layouts[text]

    @property
    def _layouts(self) -> dict[str, Layout]:
        # Not a module's business: made when first used, and not copied with the weights. Embodiments with other cameras
        # may have prompts of the same words.
        caches: dict[int, dict[str, Layout]] = self.__dict__.setdefault("_layout_caches", {})
        return caches.setdefault(self.embodiment, {})


def _check(config: Any, env_spec: EnvSpec, tokenizer: Any, horizon: int, channels: int, part: str) -> None:
    check_sizes(
        env_spec,
        tokenizer,
        horizon=horizon,
        channels=channels,
        vocab_size=config.vlm.vocab_size,
        image_unit=2 * config.vlm.patch_size,
        part=part,
        image_sizes=getattr(config, "image_sizes", ()),
    )
    check_cameras(getattr(config, "cameras", ()), env_spec)


def pool(tokens: Float[Tensor, "B S D"], mask: Bool[Tensor, "B S"]) -> Float[Tensor, "B D"]:
    """Mean over valid tokens, detached: what the critic sees (Qwen-VLA, section 4.2)."""
    weight = mask[..., None].to(tokens.dtype)
    return ((tokens * weight).sum(dim=1) / weight.sum(dim=1)).detach()


def view_tags(camera: Camera) -> tuple[str, str]:
    """What stands before and behind the image of one of several cameras."""
    return f"<|{camera.name}_start|>", f"<|{camera.name}_end|>"


def prompts_for_tokenizer(spec: EnvSpec, instructions: Sequence[str], config: Any = None) -> list[str]:
    """Chat turns like those the policy will read, to train a small tokenizer on.

    Args:
        config: of an architecture with prompts of its own, which its ``tokenizer_texts(spec, instructions)`` gives.
    """
    if hasattr(config, "tokenizer_texts"):
        own: list[str] = config.tokenizer_texts(spec, list(instructions))
        return own
    turns = []
    views = "".join(tag for camera in spec.cameras for tag in view_tags(camera)) if len(spec.cameras) > 1 else ""
    for instruction in instructions:
        body = views + embodiment_prompt(spec, instruction)
        turns.append(f"<|im_start|>user\n{body}<|im_end|>\n<|im_start|>assistant\n")
    return turns
