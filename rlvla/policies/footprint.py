"""What a Qwen-VLA takes, worked out on torch's meta device: shapes without memory.

Activations are not guessed: one layer of each kind runs on meta tensors, and autograd says what it keeps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlvla.config import ComputeConfig, ConfigError, Precision
from rlvla.policies.action_stats import ActionStats
from rlvla.policies.embodiments import Embodiment, load_embodiments
from rlvla.policies.folder import build, check_folder, read_config
from rlvla.policies.lora import adapted
from rlvla.policies.numerics import MATRICES, narrow_frozen
from rlvla.policies.processor import load_tokenizer, train_tokenizer
from rlvla.policies.prompt import embodiment_prompt
from rlvla.policies.prompted import PAD_TO, prompts_for_tokenizer
from rlvla.policies.qwen_vla import QwenVLA, QwenVLAConfig
from rlvla_envs.base import EnvSpec

ROWS = 2
"""Rows that a layer runs on here. What it keeps is proportional to them."""
CHARACTERS_PER_TOKEN = 4.0
"""English in a large tokenizer. For a policy that has no tokenizer yet; more tokens than there will be."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of a policy's parts, and of what it makes of one row."""

    vlm_parameters: int
    expert_parameters: int
    vlm_bytes: int
    expert_bytes: int
    value_size: int
    """V: features of the critic."""
    tokens: int
    """S: tokens of a context, padding included."""
    stored_context: int
    """Of one stored decision whose context is kept."""
    stored_inputs: int
    """Of one stored decision whose inputs are kept, images among them."""
    expert_activations: int
    """Kept for the backward pass, a row."""
    vlm_activations: int
    expert_layer: int
    """Of one block alone: about what a pass without gradients holds at once, a row."""
    vlm_layer: int
    vlm_adapters: int = 0
    """Bytes of its LoRA, which are in ``vlm_bytes`` as well."""
    expert_adapters: int = 0
    stored_beside: int = 0
    """Of one stored decision, beside its context or inputs; in both of the above as well."""
    picture: int = 0
    """Of all images of one decision; in ``stored_inputs`` as well."""
    rounded_weights: int = 0
    """Of the copies in bfloat16 of what is trained in fp32, while a pass runs."""

    @property
    def policy_bytes(self) -> int:
        return self.vlm_bytes + self.expert_bytes


def load_unallocated(folder: Path) -> QwenVLA:
    """The policy of a folder on the meta device. Its weights are not read.

    Raises:
        ValueError: not a policy folder, or a damaged one.
    """
    check_folder(folder)
    config, spec = read_config(folder / "config.yaml")
    check_known(config)
    embodiments, state_width = load_embodiments(Embodiment(spec, _no_stats(spec)), folder)
    with torch.device("meta"):
        policy = build(config, embodiments, load_tokenizer(folder), state_width)
    assert isinstance(policy, QwenVLA)
    return policy


def check_known(config: Any) -> None:
    """Raise ConfigError for an architecture whose memory is not worked out here."""
    if not isinstance(config, QwenVLAConfig):
        raise ConfigError(
            f"policy.name is {config.name!r}; rlvla doctor plans the memory of qwen_vla alone. Run it without policy= "
            "to check the machine."
        )


def build_unallocated(config: QwenVLAConfig, spec: EnvSpec, tokenizer: Any = None) -> QwenVLA:
    """A policy of the right shapes on the meta device. Milliseconds and a few MB for any size.

    Raises:
        ValueError: the policy does not fit the suite, or its memory cannot be planned.
    """
    check_known(config)
    if tokenizer is None:
        tokenizer = train_tokenizer(prompts_for_tokenizer(spec, [""]), config.vlm.vocab_size)
    with torch.device("meta"):
        return QwenVLA(config, spec, _no_stats(spec), tokenizer)


def _no_stats(spec: EnvSpec) -> ActionStats:
    state = np.zeros((2, spec.state_size), np.float32) if spec.state_size else None
    return ActionStats.of(np.zeros((2, spec.action_size), np.float32), state)


def guess_tokens(policy: QwenVLA, instruction: str) -> int:
    """S for a policy whose tokenizer is still to be trained: the images' tokens are exact, the text's an estimate."""
    spec, limit = policy.env_spec, policy.config.expert.context_positions
    unit = 2 * policy.config.vlm.patch_size
    images = sum((camera.height // unit) * (camera.width // unit) for camera in spec.cameras)
    text = -(-len(embodiment_prompt(spec, instruction)) // CHARACTERS_PER_TOKEN)
    padded = -(-int(images + text) // PAD_TO) * PAD_TO
    return min(padded, limit) if limit else padded


def footprint(policy: QwenVLA, tokens: int, compute: ComputeConfig | None = None, *, narrow: bool = True) -> Footprint:
    """Measure an unallocated policy for contexts of ``tokens`` tokens.

    Args:
        compute: how it will be run. With bfloat16 what is not trained is narrowed, as if its weights were such that
            bfloat16 holds them, and activations are still those of fp32: a bound.
        narrow: as `numerics.set_up` has it.
    """
    compute = compute or ComputeConfig()
    groups = policy.parameter_groups()
    block, vlm_layers = _expert_block(policy, tokens), _vlm_layers(policy, tokens)
    blocks = policy.config.expert.num_blocks
    last = _expert_block(policy, tokens, wanted=policy.config.expert.horizon)
    expert_kept, vlm_kept = (blocks - 1) * block + last, sum(count * layer for count, layer in vlm_layers)
    if compute.recompute:
        width, length = policy.config.expert.hidden_size, tokens + 1 + policy.horizon
        expert_kept = blocks * 4 * length * width + block
        last = block
        # A layer's input is what it adds to, as wide as the tokens; of vision layers, fewer numbers than that.
        vlm_kept = sum(count for count, _ in vlm_layers) * 4 * tokens * policy.config.vlm.hidden_size
        vlm_kept += max(layer for _, layer in vlm_layers)
    rounded = 0
    if compute.precision is Precision.bf16:
        if narrow:
            narrow_frozen(policy)
        policy.precision = compute.precision
        layers = [layer for layer in policy.modules() if isinstance(layer, MATRICES)]
        rounded = sum(2 * p.numel() for layer in layers for p in layer.parameters() if p.dtype is torch.float32)
    stored_context, stored_inputs, stored_beside = _stored(policy, tokens)
    return Footprint(
        vlm_parameters=sum(p.numel() for p in groups["vlm"]),
        expert_parameters=sum(p.numel() for p in groups["expert"]),
        vlm_bytes=sum(p.nbytes for p in groups["vlm"]),
        expert_bytes=sum(p.nbytes for p in groups["expert"]),
        vlm_adapters=_adapters(policy.vlm),
        expert_adapters=_adapters(policy.expert),
        value_size=policy.value_size,
        tokens=tokens,
        stored_context=stored_context,
        stored_inputs=stored_inputs,
        stored_beside=stored_beside,
        picture=_picture(policy.env_spec),
        # Half the last block more for what is before and behind the blocks, and for gradients on their way back: they
        # are in that block when most is held.
        expert_activations=expert_kept + last // 2,
        vlm_activations=vlm_kept,
        expert_layer=block,
        vlm_layer=max(layer for _, layer in vlm_layers),
        rounded_weights=rounded,
    )


def _adapters(part: nn.Module) -> int:
    return sum(layer.lora_A.nbytes + layer.lora_B.nbytes for layer in adapted(part).values())


def _stored(policy: QwenVLA, tokens: int) -> tuple[int, int, int]:
    """One decision of the rollout that the learner gets (`rlvla.rollout.collect`): with its context, with its inputs,
    without either."""
    spec, entries = policy.env_spec, policy.horizon * policy.channels
    width, state = policy.config.vlm.hidden_size, 4 * spec.state_size
    pooled = policy.expert.context_in.weight.element_size()
    element = 2 if policy.precision is Precision.bf16 else pooled
    mask, index = tokens, 8 * tokens
    context = width * (element * tokens + pooled) + mask + 3 * index + state
    inputs = 2 * index + mask + 3 * index + _picture(spec) + state
    # before, after, mean, log_prob and the mask; step, executed_steps, initial_state, version, row; valid and four
    # outcomes; reward, two values, advantage and value_target.
    beside = (4 * 4 + 1) * entries + 5 * 8 + 5 + 5 * 4
    return context + beside, inputs + beside, beside


def _picture(spec: EnvSpec) -> int:
    return sum(3 * camera.height * camera.width for camera in spec.cameras)


def _expert_block(policy: QwenVLA, tokens: int, wanted: int | None = None) -> int:
    config = policy.config.expert
    length = tokens + (policy.expert.state_in is not None) + config.horizon
    with torch.device("meta"):
        x = torch.empty(ROWS, length, config.hidden_size, requires_grad=True)
        time = torch.empty(ROWS, config.hidden_size, requires_grad=True)
        angle = torch.empty(ROWS, 1, length, config.hidden_size // config.num_heads)
        mask = torch.empty(ROWS, 1, 1, length, dtype=torch.bool)
    block = policy.expert.blocks[0]
    return _kept(block, lambda: block(x, time, (angle, angle), mask, wanted=wanted))


def _vlm_layers(policy: QwenVLA, tokens: int) -> list[tuple[int, int]]:
    """(how many there are, what one keeps of a row) for each kind of layer: linear and full attention, vision."""
    config = policy.config.vlm
    spec, text, vision = policy.env_spec, policy.vlm.language_model, policy.vlm.visual
    patches = sum((c.height // config.patch_size) * (c.width // config.patch_size) for c in spec.cameras)
    with torch.device("meta"):
        x = torch.empty(ROWS, tokens, config.hidden_size, requires_grad=True)
        rotary = torch.empty(ROWS, tokens, int(config.head_dim * config.partial_rotary_factor))
        image = torch.empty(ROWS * patches, config.vision_hidden_size, requires_grad=True)
        image_rotary = torch.empty(ROWS * patches, config.vision_hidden_size // config.vision_num_heads)
        masks = {
            True: torch.empty(ROWS, tokens, dtype=torch.bool),
            False: torch.empty(ROWS, 1, tokens, tokens, dtype=torch.bool),
        }
    # The one input that is read and not computed with: where each image begins.
    starts = torch.arange(0, ROWS * patches + 1, patches // len(spec.cameras), dtype=torch.int32)
    found = []
    for linear in (True, False):
        kind = [layer for layer in text.layers if hasattr(layer, "linear_attn") == linear]
        if kind:
            run = kind[0]
            kept = _kept(run, lambda: run(x, position_embeddings=(rotary, rotary), attention_mask=masks[linear]))  # noqa: B023
            found.append((len(kind), kept))
    block = vision.blocks[0]
    kept = _kept(block, lambda: block(image, cu_seqlens=starts, position_embeddings=(image_rotary, image_rotary)))
    return [*found, (len(vision.blocks), kept)]


def _kept(layer: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that autograd keeps of one row for the backward pass of ``run``, the layer's own weights left out."""
    weights = {p.untyped_storage()._cdata for p in layer.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # an address that was freed may come again

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(size for address, size in kept.items() if address not in weights) // ROWS
