"""What pi0, pi0.5 and SmolVLA share: a prefix read once by a VLM, and a suffix denoised beside it.

The prefix is one block of tokens for each camera, then the prompt. No image token stands in the prompt: the images'
features come before it. Cameras that a checkpoint knows and the suite has not are left out, which is what their masks
do in the original: nothing reads them, and positions count valid tokens only.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn import functional as F

from rlvla.policies.action_stats import ActionStats
from rlvla.policies.base import Context
from rlvla.policies.policy import PolicyWithFlow, camera_views, check_cameras, check_sizes
from rlvla.policies.prompted import PAD_TO, pool
from rlvla.policies.suffix_expert import Norm, SuffixExpert, SuffixLayout, flow_time_sines, suffix_mask
from rlvla_envs.base import EnvSpec, Observation


class Fit(Enum):
    """Where an image that is not square stands on the VLM's square canvas."""

    center = "center"
    bottom_right = "bottom_right"


@dataclass(kw_only=True)
class PrefixSizes:
    """What PaliGemma and SmolVLM2 have in common: a decoder and a SigLIP tower, in the names of their own
    configurations."""

    vocab_size: int = 512
    hidden_size: int = 64
    intermediate_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    num_key_value_heads: int = 1
    head_dim: int = 32
    vision_hidden_size: int = 32
    vision_intermediate_size: int = 64
    vision_num_hidden_layers: int = 1
    vision_num_attention_heads: int = 2
    patch_size: int = 8
    image_size: int = 32
    """Side of the square that images are resized to."""
    vision_position_std: float = 0.02
    """Standard deviation of the vision tower's position table at initialisation, from-scratch models only. At 0.02 it
    drowns under the patches and the policy stays blind (docs/adr/0004)."""
    vision_patch_std: float = 0.02
    """The same for the patch embedding."""

    @property
    def image_tokens(self) -> int:
        """Of one camera."""
        return (self.image_size // self.patch_size) ** 2

    def text(self) -> dict[str, Any]:
        """Of the decoder, as its transformers configuration takes them."""
        names = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        )
        return {name: getattr(self, name) for name in names}

    def vision(self) -> dict[str, Any]:
        """Of the vision tower, likewise."""
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        own = {name: getattr(self, f"vision_{name}") for name in names}
        return own | {"patch_size": self.patch_size, "image_size": self.image_size}


@dataclass(kw_only=True)
class ExpertSizes:
    """Sizes of the action expert. Layers, heads and their size are the VLM's: layer reads layer."""

    hidden_size: int = 64
    intermediate_size: int = 128
    channels: int = 8
    """K: action channels after zero-padding. 32 in published checkpoints."""
    horizon: int = 8
    """H: longest chunk; a suite's may be shorter. 50 in published checkpoints."""
    state_channels: int = 32
    """State channels after zero-padding."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "channels", "horizon", "state_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"policy.expert.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.hidden_size % 2:
            raise ValueError(f"policy.expert.hidden_size is {self.hidden_size}; it must be even: sines and cosines.")


@dataclass(kw_only=True)
class PrefixOptions:
    """Options of pi0, pi0.5 and SmolVLA alike."""

    num_denoising_steps: int = 10
    """N: Euler steps from noise to action, in SFT evaluation, rollouts and the learner alike. 10 in the originals."""
    denoise_padding: bool = False
    """Denoise all H x K entries, steps and channels past the suite's included, as the originals' samplers do: an
    imported checkpoint expects noise there. false hides them, as other policies do; right for a policy trained here."""
    image_fit: Fit = Fit.center
    """Black bars on both sides (openpi, pi0 in LeRobot) or left and above (SmolVLA)."""
    antialias: bool = False
    """Average pixels when an image is made smaller, as openpi does; LeRobot does not. Without effect on images of the
    VLM's own size."""
    cameras: tuple[str, ...] = ()
    """Order of the suite's cameras in the prefix; empty is the suite's own."""
    clean_prompt: bool = True
    """Strip the instruction and write spaces for its underscores and newlines, as openpi does."""
    prompt_tokens: int = 0
    """Longest prompt, in tokens; 0 has no limit. The originals cut longer ones off, here they are an error."""
    store_prefix: bool = True
    """Keep the VLM's keys and values of each decision while the VLM is frozen, and never run it twice. false keeps the
    images instead and runs it in every minibatch: the published pi0 takes 25 MB a decision, two images 0.3 MB."""
    value_uses_state: bool = True
    """Append the normalised state to the critic's features."""

    def __post_init__(self) -> None:
        self.cameras = tuple(self.cameras)
        if self.num_denoising_steps < 1:
            raise ValueError(
                f"policy.num_denoising_steps is {self.num_denoising_steps}; it must be at least 1, and 2 for PPO."
            )
        if self.prompt_tokens < 0:
            raise ValueError(f"policy.prompt_tokens is {self.prompt_tokens}; it must be 0 (no limit) or more.")


class PrefixPolicy(PolicyWithFlow):
    """See `rlvla.policies.base.FlowPolicy` for what each method promises.

    The last VLM layer's output, past its keys and values, reaches nothing but the critic, whose features are detached.
    Its weights are the group "top", which is never trained.
    """

    context_groups = frozenset({"vlm", "top"})
    frozen_groups = frozenset({"top"})
    vlm: Any
    expert: SuffixExpert
    causal: bool
    """Whether an action token reads earlier ones only."""

    def __init__(self, config: Any, env_spec: EnvSpec, stats: ActionStats, tokenizer: Any, *, state_limit: int) -> None:
        sizes = config.expert
        _check(config, env_spec, tokenizer, state_limit)
        super().__init__(
            config,
            env_spec,
            stats,
            tokenizer,
            horizon=sizes.horizon,
            channels=sizes.channels,
        )
        if not config.store_prefix:
            # A context that would depend on what is always trained is not kept.
            self.context_groups = self.context_groups | {"expert"}
        self._state_limit = state_limit
        self.value_size = config.vlm.hidden_size + (env_spec.state_size if config.value_uses_state else 0)

    def check_embodiment(self, env_spec: EnvSpec) -> None:
        _check(self.config, env_spec, self.tokenizer, self._state_limit)

    @abstractmethod
    def embed_images(self, pixels: Float[Tensor, "N 3 size size"]) -> Float[Tensor, "N tokens D"]:
        """Image tokens as the language model takes them, of pixels in [-1, 1]."""

    @abstractmethod
    def embed_text(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]: ...

    def embed_state(self, state: Float[Tensor, "B P"]) -> Float[Tensor, "B 1 D"] | None:
        """A prefix token of the state, which images and prompt do not read; None has none."""
        return None

    @abstractmethod
    def embed_suffix(
        self, sample: Float[Tensor, "B H K"], state: Float[Tensor, "B P"], time: Float[Tensor, "B d"]
    ) -> tuple[list[Float[Tensor, "B L d"]], Float[Tensor, "B d"] | None]:
        """Blocks of suffix tokens, the actions last, and the condition of adaptive norms."""

    @property
    @abstractmethod
    def language(self) -> Any:
        """The VLM's decoder: transformers' base model with ``layers`` and ``norm``."""

    @property
    @abstractmethod
    def vision(self) -> Any:
        """The VLM's SigLIP tower: transformers' base model with ``embeddings`` and ``encoder``."""

    def make_expert(
        self,
        norm: Norm,
        projections: dict[str, tuple[int, int]],
        *,
        norm_eps: float,
        activation: str,
        cross: Sequence[bool] = (),
    ) -> SuffixExpert:
        """An expert whose layers read those of the VLM.

        Args:
            cross: of each layer, whether it attends to the prefix alone; none does where it is empty.
        """
        sizes, own = self.config.vlm, self.config.expert
        layout = SuffixLayout(
            hidden_size=own.hidden_size,
            intermediate_size=own.intermediate_size,
            num_heads=sizes.num_attention_heads,
            num_kv_heads=sizes.num_key_value_heads,
            head_size=sizes.head_dim,
            cross=tuple(cross) or (False,) * sizes.num_hidden_layers,
            norm=norm,
            norm_eps=norm_eps,
            activation=activation,
        )
        return SuffixExpert(layout, own.channels, projections)

    def initialize(self) -> None:
        embeddings = self.vision.embeddings
        nn.init.normal_(embeddings.position_embedding.weight, std=self.config.vlm.vision_position_std)
        nn.init.normal_(embeddings.patch_embedding.weight, std=self.config.vlm.vision_patch_std)

    def fuse_time(self, sample: Float[Tensor, "B H K"], time: Float[Tensor, "B d"]) -> Float[Tensor, "B H d"]:
        """Action tokens that know the flow time, by the projections ``action_time_mlp_in`` and ``_out``."""
        expert: Any = self.expert
        action = expert.action_in_proj(sample)
        fused = torch.cat([action, time[:, None].expand_as(action)], dim=-1)
        tokens: Tensor = expert.action_time_mlp_out(F.silu(expert.action_time_mlp_in(fused)))
        return tokens

    def prompt(self, instruction: str, state: Float[np.ndarray, " P"]) -> str:
        """The text of one observation: instruction and newline."""
        text = self.clean(instruction)
        return text if text.endswith("\n") else f"{text}\n"

    def clean(self, instruction: str) -> str:
        if not self.config.clean_prompt:
            return instruction
        return instruction.strip().replace("_", " ").replace("\n", " ")

    def longest_prompt(self, instruction: str) -> str:
        """The prompt that `context_length` counts: `prompt` where the state is not part of it."""
        return self.prompt(instruction, np.zeros(self.env_spec.state_size, np.float32))

    def collate(self, observation: Observation) -> TensorDict:
        """Right-padded prompts and images; raises as `context_length` does."""
        batch = len(observation)
        state = observation.state if observation.state is not None else np.zeros((batch, 0), np.float32)
        state = self.stats.normalize_state(state)
        texts = [self._tokens(self.prompt(text, row)) for text, row in zip(observation.instruction, state, strict=True)]
        length = max(
            *(self._text_length(self.longest_prompt(text)) for text in set(observation.instruction)),
            *(_round_up(len(ids)) for ids in texts),
        )
        ids = torch.full((batch, length), self.tokenizer.pad_token_id or 0)
        mask = torch.zeros((batch, length), dtype=torch.bool)
        for row, tokens in enumerate(texts):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = True
        return TensorDict(
            {
                "input_ids": ids,
                "mask": mask,
                "images": camera_views(observation, self.camera_order()),
                "state": torch.from_numpy(self.pad_state(state)),
            },
            batch_size=[batch],
        )

    def encoded_tokens(self, data: TensorDict) -> int:
        text = super().encoded_tokens(data)
        if "context" in data:
            return text
        # Images are in no prompt, and one more is the state's.
        views: int = data["batch", "images"].shape[-4]
        images: int = views * self.config.vlm.image_tokens
        return text + images + 1

    def context_length(self, instruction: str) -> int:
        """A multiple of PAD_TO text tokens, so that most instructions share a length, and a fixed number of others.

        Raises:
            ValueError: a prompt longer than the checkpoint's.
        """
        return self._text_length(self.longest_prompt(instruction))

    def _text_length(self, text: str) -> int:
        count, limit = len(self._tokens(text)), self.config.prompt_tokens
        if limit and count > limit:
            raise ValueError(
                f"the prompt {text[:60]!r} takes {count} tokens; policy.prompt_tokens allows {limit}, which is what "
                "the checkpoint was trained with. Shorten the instruction."
            )
        return _round_up(count)

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def encode(self, batch: TensorDict) -> Context:
        from transformers import DynamicCache

        rows, views = batch["images"].shape[:2]
        size = self.config.vlm.image_size
        pixels = fit_images(batch["images"].flatten(0, 1), size, self.config.image_fit, self.config.antialias)
        images = self.embed_images(pixels.to(self.vlm.dtype))
        images = images.reshape(rows, views * images.shape[1], -1)
        parts = [images, self.embed_text(batch["input_ids"])]
        masks = [batch["mask"].new_ones(rows, images.shape[1]), batch["mask"]]
        state = self.embed_state(batch["state"])
        if state is not None:
            parts.append(state)
            masks.append(batch["mask"].new_ones(rows, 1))
        x, mask = torch.cat([part.to(images.dtype) for part in parts], dim=1), torch.cat(masks, dim=1)
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        # Everything reads every valid token, but what comes before the state does not read it.
        allowed = mask[:, None].repeat(1, mask.shape[1], 1)
        if state is not None:
            allowed[:, :-1, -1] = False
        cache: Any = DynamicCache()
        tokens = self.language(
            inputs_embeds=x,
            attention_mask=allowed[:, None],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        # [B n S e] a layer -> [B S layers n e]: indexed by token, as everything a context keeps of each.
        keys = torch.stack([layer.keys for layer in cache.layers], dim=1).permute(0, 3, 1, 2, 4)
        values = torch.stack([layer.values for layer in cache.layers], dim=1).permute(0, 3, 1, 2, 4)
        return Context(
            tokens,
            mask,
            positions[:, None].repeat(1, 3, 1),
            pool(tokens, mask),
            batch["state"],
            per_token={"keys": keys, "values": values},
        )

    def velocity(
        self,
        context: Context,
        sample: Float[Tensor, "B H K"],
        tau: Float[Tensor, " B"],
        step: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B H K"]:
        del step  # Time is continuous here.
        shown = self.noise_mask()
        dtype = self.expert.action_in_proj.weight.dtype
        time = flow_time_sines(tau, self.expert.layout.hidden_size).to(dtype)
        state = F.pad(context.state, (0, self.config.expert.state_channels - context.state.shape[1]))
        blocks, condition = self.embed_suffix((sample * shown).to(dtype), state.to(dtype), time)
        readable = [block.new_ones(block.shape[:2], dtype=torch.bool) for block in blocks[:-1]]
        readable.append(shown.any(dim=-1).expand(len(sample), -1))
        y = self.expert(
            torch.cat(blocks, dim=1),
            context.per_token["keys"],
            context.per_token["values"],
            context.mask,
            suffix_mask(readable, causal=self.causal),
            condition,
        )
        velocity: Tensor = self.expert.action_out_proj(y[:, -self.horizon :]).float() * shown
        return velocity

    def noise_mask(self) -> Bool[Tensor, "H K"]:
        return torch.ones_like(self._action_mask) if self.config.denoise_padding else self._action_mask

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        last = self.language.layers[-1]
        top = [
            *last.self_attn.q_proj.parameters(),
            *last.self_attn.o_proj.parameters(),
            *last.post_attention_layernorm.parameters(),
            *last.mlp.parameters(),
            *self.language.norm.parameters(),
        ]
        expert = list(self.expert.parameters())
        noise = self.exploration_group()
        others = {id(p) for p in (*top, *expert, *(p for group in noise.values() for p in group))}
        rest = [p for p in self.parameters() if id(p) not in others]
        return {"vlm": rest, "expert": expert, "top": top, **noise}

    def sharding_units(self) -> list[nn.Module]:
        return [*self.vision.encoder.layers, *self.language.layers, *self.expert.layers]


class _Vocabulary:
    """How many tokens a prompt can hold: an image token past the embedding, as PaliGemma's, is never looked up."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        size = len(tokenizer)
        image = tokenizer.convert_tokens_to_ids("<image>")
        self.size = size - int(size == vocab_size + 1 and image == vocab_size)

    def __len__(self) -> int:
        return self.size


def _check(config: Any, env_spec: EnvSpec, tokenizer: Any, state_limit: int) -> None:
    check_sizes(
        env_spec,
        _Vocabulary(tokenizer, config.vlm.vocab_size),
        horizon=config.expert.horizon,
        channels=config.expert.channels,
        vocab_size=config.vlm.vocab_size,
        image_unit=1,  # images are resized
        part="policy.expert",
    )
    if env_spec.state_size > state_limit:
        raise ValueError(
            f"the suite's state has {env_spec.state_size} channels, policy.expert.state_channels pads to "
            f"{state_limit}; raise it."
        )
    check_cameras(config.cameras, env_spec)


def _round_up(count: int) -> int:
    return -(-count // PAD_TO) * PAD_TO


def fit_images(
    images: UInt8[Tensor, "N h w 3"], size: int, fit: Fit, antialias: bool
) -> Float[Tensor, "N 3 size size"]:
    """Images on a square black canvas, sides in proportion, in [-1, 1].

    Bilinear as in openpi and LeRobot: the longer side becomes ``size``, the other is rounded down.
    """
    pixels = images.permute(0, 3, 1, 2).float() / 255
    height, width = pixels.shape[2:]
    if (height, width) != (size, size):
        ratio = max(height, width) / size
        rows, columns = int(height / ratio), int(width / ratio)
        pixels = F.interpolate(
            pixels, size=(rows, columns), mode="bilinear", align_corners=False, antialias=antialias
        ).clamp(0, 1)
        above, left = size - rows, size - columns
        if fit is Fit.center:
            above, left = above // 2, left // 2
        pixels = F.pad(pixels, (left, size - columns - left, above, size - rows - above))
    return 2 * pixels - 1
