"""Asymmetric mixture of transformers (TwinBrainVLA, section 4.1): one VLM reads another's keys and values.

The left brain reads its own prompt, as if it were alone. In each layer the right brain's queries attend to
[sg(K_L); K_R] and [sg(V_L); V_R]: to all valid tokens of the left, and causally to its own. transformers concatenates
keys and values by itself when a model is given a cache of earlier tokens, so the left's cache is handed to the right,
and no layer is written anew.

Two traps. The usual cache keeps what it is given, so that a second pass, or a checkpointed layer that is run again in
the backward pass, would read the right's own keys twice: `LeftMemory` keeps nothing. And transformers' own gradient
checkpointing takes the cache away, which would silently drop the left brain; wrap whole layers instead.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Reading(NamedTuple):
    """What one brain reads: a batch of prompts with their images."""

    ids: Int[Tensor, "B S"]
    mask: Bool[Tensor, "B S"]
    """False on padding, which may be on either side."""
    position_ids: Int[Tensor, "B 3 S"]
    images: dict[str, Tensor]
    """pixel_values and image_grid_thw."""


class LeftMemory:
    """Keys and values of the left brain, as a cache that the right brain reads and cannot change.

    Layers l with l % (interval + 1) == 0 read them; the others attend to the right's own tokens only.
    """

    def __init__(self, cache: Any, mask: Bool[Tensor, "B L"], interval: int) -> None:
        self.mask, self.interval = mask, interval
        self._layers: list[tuple[Tensor, Tensor]] = [(c.keys.detach(), c.values.detach()) for c in cache.layers]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values that a layer attends to: [B heads L+S size], or its own."""
        if not is_joint(layer, self.interval):
            return keys, values
        left_keys, left_values = self._layers[layer]
        return torch.cat([left_keys.to(keys.dtype), keys], dim=2), torch.cat([left_values.to(values.dtype), values], 2)

    def get_seq_length(self, layer: int = 0) -> int:
        """L, whatever has been read since."""
        return int(self.mask.shape[1])


def is_joint(layer: int, interval: int) -> bool:
    """Whether a layer of the right brain attends to the left: all for interval 0, every second for 1."""
    return layer % (interval + 1) == 0


@torch.no_grad()
def read_left(brain: Any, reading: Reading, interval: int) -> LeftMemory:
    """Run the left brain, without gradients."""
    cache = brain(
        input_ids=reading.ids,
        attention_mask=reading.mask.long(),
        position_ids=reading.position_ids.transpose(0, 1),
        use_cache=True,
        **reading.images,
    ).past_key_values
    return LeftMemory(cache, reading.mask, interval)


def read_right(
    brain: Any, reading: Reading, left: LeftMemory, extra: Float[Tensor, "B E D"] | None = None
) -> Float[Tensor, "B S D"]:
    """Last hidden states of the right brain, the left's memory before its eyes.

    Args:
        reading: mask and positions cover ``extra`` too.
        extra: embeddings behind those of the prompt, such as a state's.
    """
    mask = joint_mask(left.mask, reading.mask)
    inputs = {"input_ids": reading.ids}
    if extra is not None:
        embedded = brain.get_input_embeddings()(reading.ids)
        # With embeddings alone the model finds its images by the embedding of the image token.
        inputs = {"inputs_embeds": torch.cat([embedded, extra.to(embedded.dtype)], dim=1)}
    tokens: Tensor = brain(
        **inputs,
        attention_mask=mask,
        position_ids=reading.position_ids.transpose(0, 1),
        past_key_values=left,
        use_cache=False,
        **reading.images,
    ).last_hidden_state
    return tokens


def joint_mask(left: Bool[Tensor, "B L"], right: Bool[Tensor, "B S"]) -> Bool[Tensor, "B 1 S L+S"]:
    """Who of [left; right] each token of the right attends to.

    It is always handed over in full: without one, SDPA's own causal mask would be aligned at the first key, which is
    the left's. A padded token sees itself, or softmax would have nothing to choose from.
    """
    length = right.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=right.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=right.device)
    own = (causal & right[:, None]) | itself
    return torch.cat([left[:, None].expand(-1, length, -1), own], dim=2)[:, None]


def hide_left_from_skipped_layers(brain: Any, interval: int) -> None:
    """Cut the left's columns off the mask in the layers that do not read the left.

    transformers makes one mask for all layers of a kind; the cut is a hook of the attention module, so it stays when
    layers are wrapped for sharding or copied.
    """
    for layer, block in enumerate(brain.language_model.layers):
        if not is_joint(layer, interval):
            block.self_attn.register_forward_pre_hook(_own_columns, with_kwargs=True)


def _own_columns(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    del module
    mask = kwargs["attention_mask"]
    if mask is not None:
        kwargs = {**kwargs, "attention_mask": mask[..., -kwargs["hidden_states"].shape[1] :]}
    return args, kwargs
