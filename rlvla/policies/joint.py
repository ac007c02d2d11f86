"""A mixture of transformers with one attention: experts of their own width, with heads of one shape (UAM, section 3).

Every token belongs to one expert, which has projections, feed-forward and norms of its own; queries of one meet keys
and values of others. Nobody attends to an expert that comes after it, so the experts can run one after another, each
with the keys and values of those before: the numbers are those of one pass over all tokens, and what does not depend on
the action's flow time is computed once (docs/adr/0023).

Layers are those of transformers' Qwen3-VL, in its key layout, with a forward of ours that returns keys and values. A
cache object would take them out of a layer sideways, where FSDP does not see that somebody will ask for gradients of
them: the last layer of an expert has no other reader.

Axes: B rows, S tokens of the prompt, L queries, M keys in all, n heads of keys and values, e entries of a head, D
hidden.
"""

from collections.abc import Iterable
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3VLConfig, Qwen3VLModel
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextDecoderLayer, apply_rotary_pos_emb


class Route(IntEnum):
    """Which block a token is in. A block sees those of smaller number and itself."""

    semantic = 0
    """Prompt and image tokens: causal, as the VLM was trained."""
    seen = 1
    """Latents of the images that were observed."""
    foreseen = 2
    """Latents of the next images, noised."""
    action = 3
    """State and noisy actions."""


def joint_mask(route: Int[Tensor, " M"], valid: Bool[Tensor, "B M"]) -> Bool[Tensor, "B 1 M M"]:
    """True where a query (row) may attend to a key (column).

    Args:
        route: block of each token; those of one block in their order.
        valid: False on padding, which nobody attends to.
    """
    place = torch.arange(len(route), device=route.device)
    earlier = route[None, :] < route[:, None]
    same = route[None, :] == route[:, None]
    causal = (route[:, None] != Route.semantic) | (place[None, :] <= place[:, None])
    return (earlier | (same & causal)) & valid[:, None, None, :]


class KeysValues(NamedTuple):
    """Of one layer, rotated, as queries of any expert read them."""

    keys: Float[Tensor, "B M n e"]
    values: Float[Tensor, "B M n e"]


Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, [B L e] each."""


class JointLayer(Qwen3VLTextDecoderLayer):
    """A decoder layer of Qwen3-VL whose queries can also read keys and values of other experts."""

    def forward(
        self,
        hidden_states: Float[Tensor, "B L D"],
        position_embeddings: Rotary,
        attention_mask: Bool[Tensor, "B 1 L M"] | None = None,
        *arguments: Any,
        joint: bool = False,
        past_keys: Float[Tensor, "B P n e"] | None = None,
        past_values: Float[Tensor, "B P n e"] | None = None,
        **others: Any,
    ) -> Any:
        """With ``joint`` the tokens [B L D] and their own keys and values [B L n e]; without, what transformers' layer
        does, so that the semantic expert still answers questions.

        Args:
            attention_mask: over the keys of others, which come first, and one's own; None lets every query see every
                key.
        """
        if not joint:
            return super().forward(hidden_states, position_embeddings, attention_mask, *arguments, **others)
        attention, h = self.self_attn, self.input_layernorm(hidden_states)
        shape = (*h.shape[:2], -1, attention.head_dim)
        query = attention.q_norm(attention.q_proj(h).view(shape))
        key = attention.k_norm(attention.k_proj(h).view(shape))
        value = attention.v_proj(h).view(shape)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings, unsqueeze_dim=2)
        keys, values = key, value
        if past_keys is not None and past_values is not None:
            keys = torch.cat([past_keys.to(key.dtype), key], dim=1)
            values = torch.cat([past_values.to(value.dtype), value], dim=1)
        groups = query.shape[2] // keys.shape[2]
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            keys.repeat_interleave(groups, dim=2).transpose(1, 2),
            values.repeat_interleave(groups, dim=2).transpose(1, 2),
            attn_mask=attention_mask,
        )
        x = hidden_states + attention.o_proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x)), key, value


def semantic_expert(config: Qwen3VLConfig) -> Any:
    """transformers' Qwen3-VL without its language head, with layers that hand over keys and values."""
    vlm: Any = Qwen3VLModel(config)
    for layer in vlm.language_model.layers:
        # A second way through it and nothing else; building them again would cost what a 7 B model costs.
        layer.__class__ = JointLayer
    return vlm


def expert_layers(semantic: Qwen3VLTextConfig, hidden_size: int, intermediate_size: int) -> nn.ModuleList:
    """As many layers as the semantic expert has, with heads of the same shape and a width of their own."""
    sizes = {**semantic.to_dict(), "hidden_size": hidden_size, "intermediate_size": intermediate_size}
    config = Qwen3VLTextConfig.from_dict(sizes)
    return nn.ModuleList(JointLayer(config, i) for i in range(semantic.num_hidden_layers))


def read_prompt(vlm: Any, batch: TensorDict, images: dict[str, Tensor]) -> tuple[Tensor, list[KeysValues]]:
    """The semantic expert's pass: hidden states [B S D] after the last norm, and keys and values of each layer.

    Args:
        batch: input_ids, token_type, position_ids, mask of right-padded prompts.
        images: pixel_values and image_grid_thw.
    """
    text = vlm.language_model
    x = text.embed_tokens(batch["input_ids"])
    features = vlm.get_image_features(**images, return_dict=True)
    is_image = batch["token_type"].bool()[..., None]
    x = x.masked_scatter(is_image, torch.cat(list(features.pooler_output)).to(x.dtype))
    rotary = text.rotary_emb(x, batch["position_ids"].transpose(0, 1))
    mask = batch["mask"]
    attend = joint_mask(torch.zeros(mask.shape[1], dtype=torch.long, device=mask.device), mask)
    found = []
    deepstack = [torch.cat(list(of_layer)) for of_layer in features.deepstack_features]
    for index, layer in enumerate(text.layers):
        x, keys, values = layer(x, rotary, attend, joint=True)
        found.append(KeysValues(keys, values))
        if index < len(deepstack):
            x = x + torch.zeros_like(x).masked_scatter(is_image, deepstack[index].to(x.dtype))
    return text.norm(x), found


def run_layers(
    layers: Iterable[nn.Module], x: Tensor, rotary: Rotary, mask: Tensor | None, past: list[KeysValues]
) -> tuple[Tensor, list[KeysValues]]:
    """One expert's pass after those whose keys and values are in ``past``, which has an entry a layer."""
    found = []
    for layer, before in zip(layers, past, strict=True):
        x, keys, values = layer(x, rotary, mask, joint=True, past_keys=before.keys, past_values=before.values)
        found.append(KeysValues(keys, values))
    return x, found


def join(*parts: list[KeysValues]) -> list[KeysValues]:
    """Keys and values of several experts side by side, layer by layer."""
    return [
        KeysValues(torch.cat([p.keys for p in layer], dim=1), torch.cat([p.values for p in layer], dim=1))
        for layer in zip(*parts, strict=True)
    ]


def stack(found: list[KeysValues], name: str) -> dict[str, Tensor]:
    """Of all layers as two tensors [B M layers n e], as a context stores them; `unstack` takes them apart."""
    return {
        f"{name}_keys": torch.stack([layer.keys for layer in found], dim=2),
        f"{name}_values": torch.stack([layer.values for layer in found], dim=2),
    }


def unstack(keys: Tensor, values: Tensor) -> list[KeysValues]:
    return [KeysValues(*layer) for layer in zip(keys.unbind(2), values.unbind(2), strict=True)]


def grid_positions(rows: int, columns: int, size: int) -> Float[Tensor, "N size"]:
    """Sines and cosines of a grid's rows and columns, row by row: a fixed table to add to latents of width ``size``."""
    quarter = size // 4
    frequency = 1e4 ** (-torch.arange(quarter) / quarter)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [place.flatten()[:, None] * frequency for place in (row, column)]
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=-1)
    return F.pad(table, (0, size - 4 * quarter))
