"""Tensors of pi0 and pi0.5 as openpi's PyTorch port names them. LeRobot uses the same names, some with "model." before.

Sizes of Gemma are those of a named variant, as in the originals; what no configuration says is read from the tensors.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from rlvla.formats.tensors import KeyMap, Weights
from rlvla.policies.pi import PaliGemmaSizes, Pi0Config, Pi05Config
from rlvla.policies.prefix import ExpertSizes

VERSION = 1
"""Of the rules below."""
TOKENIZER = "google/paligemma-3b-pt-224"
VISION_HEAD = 72
"""Size of an attention head of SigLIP So400m, which the shapes do not tell."""
VISION_WIDTH, VISION_LAYERS = 1152, 27
"""Of So400m, which every published checkpoint has."""


class Gemma(NamedTuple):
    """A variant's sizes, as openpi names them."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


VARIANTS = {
    "dummy": Gemma(64, 4, 128, 8, 1, 16),
    "gemma_300m": Gemma(1024, 18, 4096, 8, 1, 256),
    "gemma_2b": Gemma(2048, 18, 16_384, 8, 1, 256),
}

ROOT = "paligemma_with_expert."
EMBEDDING = "vlm.language_model.embed_tokens.weight"


def is_pi05(weights: Weights) -> bool:
    """Whether the tensors are pi0.5's.

    Raises:
        ValueError: they are neither pi0's nor pi0.5's.
    """
    names = {key.removeprefix("model.") for key in weights.tensors}
    if any(name.startswith(f"{ROOT}gemma_expert.") for name in names):
        if "time_mlp_in.weight" in names:
            return True
        if "action_time_mlp_in.weight" in names and "state_proj.weight" in names:
            return False
    raise ValueError(
        f"{weights.path} is no checkpoint of pi0 (with {ROOT}gemma_expert..., action_time_mlp_in.weight and "
        f"state_proj.weight) or pi0.5 (with time_mlp_in.weight instead): its {len(names)} tensors begin with "
        f"{', '.join(sorted(weights.tensors)[:3])}."
    )


def key_map(weights: Weights) -> KeyMap:
    """The rules for this file: with or without "model.", with the vision tower of old or new transformers."""
    root = "model." if any(key.startswith("model." + ROOT) for key in weights.tensors) else ""
    vlm = f"{root}{ROOT}paligemma.model."
    tower = f"{vlm}vision_tower."
    old = any(key.startswith(tower + "vision_model.") for key in weights.tensors)
    return KeyMap(
        version=VERSION,
        renames=(
            (tower + ("vision_model." if old else ""), "vlm.vision_tower."),
            (vlm, "vlm."),
            # Not their common prefix: the way back must tell layers from projections.
            (f"{root}{ROOT}gemma_expert.model.layers.", "expert.layers."),
            (f"{root}{ROOT}gemma_expert.model.norm.", "expert.norm."),
            (root, "expert."),
        ),
        kept=frozenset({f"{root}{ROOT}gemma_expert.lm_head.weight"}),
        # PaliGemma's head and embedding are one tensor; which of the names a file has depends on who saved it.
        tied={f"{root}{ROOT}paligemma.lm_head.weight": EMBEDDING},
        kept_like=_expert_head(weights, root),
    )


def _expert_head(weights: Weights, root: str) -> dict[str, tuple[int, ...]]:
    """The shape of the head that the expert's class has and nobody uses: vocabulary by the expert's width."""
    width = weights.tensors.get(f"{root}action_in_proj.weight")
    tied = (f"{root}{ROOT}paligemma.model.language_model.embed_tokens.weight", f"{root}{ROOT}paligemma.lm_head.weight")
    table = next((weights.tensors[key] for key in tied if key in weights.tensors), None)
    if width is None or table is None:
        return {}
    return {f"{root}{ROOT}gemma_expert.lm_head.weight": (table.shape[0], width.shape[0])}


def policy_config(
    weights: Weights, *, variants: tuple[str, str], channels: int, state_channels: int, horizon: int, **options: Any
) -> Pi0Config | Pi05Config:
    """The architecture's configuration.

    Args:
        variants: of PaliGemma's language model and of the expert.

    Raises:
        ValueError: an unknown variant, or a file without a tensor that sizes are read from.
    """
    for variant in variants:
        if variant not in VARIANTS:
            raise ValueError(f"{weights.path.parent}: variant {variant!r} is none of {', '.join(VARIANTS)}.")
    text, expert = (VARIANTS[variant] for variant in variants)
    if (text.depth, text.num_heads, text.num_kv_heads, text.head_dim) != (
        expert.depth,
        expert.num_heads,
        expert.num_kv_heads,
        expert.head_dim,
    ):
        raise ValueError(f"{weights.path.parent}: variants {variants[0]} and {variants[1]} do not share their heads.")
    vision = _vision(weights)
    vlm = {
        "vocab_size": vision.pop("vocab_size"),
        "hidden_size": text.width,
        "intermediate_size": text.mlp_dim,
        "num_hidden_layers": text.depth,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        **vision,
    }
    sizes = ExpertSizes(
        hidden_size=expert.width,
        intermediate_size=expert.mlp_dim,
        channels=channels,
        horizon=horizon,
        state_channels=state_channels,
    )
    made = PaliGemmaSizes(**vlm)
    options |= {"denoise_padding": True, "store_prefix": False}
    if is_pi05(weights):
        return Pi05Config(vlm=made, expert=sizes, **options)
    options.pop("pad_state_text", None)
    return Pi0Config(vlm=made, expert=sizes, **options)


def _vision(weights: Weights) -> dict[str, int]:
    """Sizes of the vision tower and of the vocabulary, from the tensors' shapes."""
    named = {_short(key): tensor for key, tensor in weights.tensors.items()}
    patch = _shape(named, "vision_tower.embeddings.patch_embedding.weight", 4, weights)
    positions = _shape(named, "vision_tower.embeddings.position_embedding.weight", 2, weights)
    inner = _shape(named, "vision_tower.encoder.layers.0.mlp.fc1.weight", 2, weights)
    table = "language_model.embed_tokens.weight"
    vocabulary = _shape(named, table if table in named else "lm_head.weight", 2, weights)
    layers = {key.split(".")[3] for key in named if key.startswith("vision_tower.encoder.layers.")}
    if patch[0] % VISION_HEAD:
        raise ValueError(
            f"{weights.path}: the vision tower is {patch[0]} wide, which heads of {VISION_HEAD} do not divide; "
            "PaliGemma's is SigLIP So400m, 1152 wide."
        )
    if patch[0] == VISION_WIDTH and len(layers) != VISION_LAYERS:
        raise ValueError(
            f"{weights.path} has {len(layers)} layers of the vision tower; SigLIP So400m, {VISION_WIDTH} wide, has "
            f"{VISION_LAYERS}. Weights are missing: copy the checkpoint again."
        )
    return {
        "vocab_size": vocabulary[0],
        "vision_hidden_size": patch[0],
        "vision_intermediate_size": inner[0],
        "vision_num_hidden_layers": len(layers),
        "vision_num_attention_heads": patch[0] // VISION_HEAD,
        "patch_size": patch[2],
        "image_size": patch[2] * math.isqrt(positions[0]),
    }


def _short(key: str) -> str:
    key = key.removeprefix("model.").removeprefix(f"{ROOT}paligemma.").removeprefix("model.")
    return key.replace("vision_tower.vision_model.", "vision_tower.")


def _shape(named: Mapping[str, Tensor], key: str, axes: int, weights: Weights) -> tuple[int, ...]:
    if key not in named or named[key].ndim != axes:
        raise ValueError(
            f"{weights.path} lacks a tensor {ROOT}paligemma...{key} of {axes} axes, which the sizes are read from. Is "
            "it a checkpoint of pi0 or pi0.5 in PyTorch?"
        )
    return tuple(named[key].shape)
