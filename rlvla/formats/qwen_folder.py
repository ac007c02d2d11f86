"""The folder of a published Qwen VLM, less its weights: config.json, tokenizer.json, preprocessor_config.json.

starVLA's checkpoints hold the VLM's tensors and only the name of this folder. It is read as data: no class of it is
looked up by name, no code of it runs.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rlvla.formats.base import check_supported, integer, load_checkpoint_tokenizer, read_json
from rlvla.policies.backbone import token_ids
from rlvla.policies.brain import BrainConfig, Family

IMAGE = "<|image_pad|>"
MERGED, TEMPORAL = 2, 2
"""Patches that become one token, by side; frames in a patch."""
TEXT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
LINEAR = ("linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads")
VISION = {
    "depth": "vision_depth",
    "hidden_size": "vision_hidden_size",
    "intermediate_size": "vision_intermediate_size",
    "num_heads": "vision_num_heads",
    "patch_size": "patch_size",
    "num_position_embeddings": "num_position_embeddings",
}
"""Theirs -> ours."""
TEXT_MUST_BE = {"rms_norm_eps": (1e-6,), "hidden_act": ("silu",), "attention_bias": (False,)}
VISION_MUST_BE = {
    "hidden_act": ("gelu_pytorch_tanh",),
    "spatial_merge_size": (MERGED,),
    "temporal_patch_size": (TEMPORAL,),
    "in_channels": (3,),
}
IMAGE_MUST_BE: dict[str, tuple[Any, ...]] = {
    "image_mean": ([0.5, 0.5, 0.5],),
    "image_std": ([0.5, 0.5, 0.5],),
    "merge_size": (MERGED,),
    "temporal_patch_size": (TEMPORAL,),
    "do_resize": (True,),
}


class QwenFolder(NamedTuple):
    """What a policy needs of it."""

    config: BrainConfig
    tokenizer: Any
    fewest_pixels: int
    most_pixels: int
    """Of an image, between which the processor resizes."""


def read_qwen_folder(run: Path, given: str | None, name: str) -> QwenFolder:
    """Read it where the user says, or beside the checkpoint.

    Args:
        run: the checkpoint's folder.
        name: of the base VLM in the checkpoint's configuration.

    Raises:
        ValueError: a file is missing or damaged, or it is another model's; the message says which and what is needed.
    """
    folder = Path(given) if given else run
    needed = f"Give tokenizer=FOLDER with config.json, preprocessor_config.json and the tokenizer files of {name}."
    tokenizer = load_checkpoint_tokenizer(folder, given, image_token=IMAGE, bos=False, whose=name)
    absent = [file for file in ("config.json", "preprocessor_config.json") if not (folder / file).is_file()]
    if absent:
        raise ValueError(f"{folder} has no {' and no '.join(absent)}. {needed}")
    said = read_json(folder / "config.json")
    families = {family.value: family for family in Family}
    if said.get("model_type") not in families:
        raise ValueError(
            f"{folder}/config.json says model_type = {said.get('model_type')!r}; supported are {', '.join(families)}. "
            f"{needed}"
        )
    config = _sizes(said, families[said["model_type"]], folder / "config.json")
    _check_tokenizer(tokenizer, folder, said, name)
    return QwenFolder(config, tokenizer, *_pixels(folder / "preprocessor_config.json", config.patch_size))


def resized_side(side: int, unit: int, fewest: int, most: int) -> int:
    """The side of a square image behind Qwen's processor: a multiple of ``unit``, with an area between two bounds.

    Examples:
        >>> resized_side(224, 32, 65536, 16777216)  # 50,176 pixels are too few for Qwen3-VL
        256
    """
    rounded = max(unit, round(side / unit) * unit)
    if rounded**2 > most:
        return max(unit, math.floor(side / math.sqrt(side**2 / most) / unit) * unit)
    if rounded**2 < fewest:
        return math.ceil(side * math.sqrt(fewest / side**2) / unit) * unit
    return rounded


def _sizes(said: Mapping[str, Any], family: Family, path: Path) -> BrainConfig:
    text, vision = said.get("text_config"), said.get("vision_config")
    if not isinstance(text, dict) or not isinstance(vision, dict):
        raise ValueError(f"{path} lacks text_config or vision_config; it must be the configuration of a Qwen VLM.")
    check_supported(text, TEXT_MUST_BE, path)
    check_supported(vision, VISION_MUST_BE, path)
    # transformers 4 has rope_theta beside rope_scaling, transformers 5 both in rope_parameters.
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    theta, section = rope.get("rope_theta", text.get("rope_theta")), rope.get("mrope_section")
    if not isinstance(theta, int | float) or not isinstance(section, list):
        raise ValueError(
            f"{path} has rope_theta = {theta!r} and mrope_section = {section!r} in text_config; both must be there."
        )
    check_supported(rope, {"rope_type": ("default",), "mrope_interleaved": (True,)}, path)
    sizes: dict[str, Any] = {name: integer(text, name, None, path) for name in TEXT}
    sizes |= {ours: integer(vision, theirs, None, path) for theirs, ours in VISION.items()}
    sizes |= {"rope_theta": float(theta), "mrope_section": tuple(section)}
    if family is Family.qwen3_5:
        sizes |= {name: integer(text, name, None, path) for name in LINEAR}
        sizes["full_attention_interval"] = _interval(text, path)
        sizes["partial_rotary_factor"] = float(rope.get("partial_rotary_factor", 0.25))
    else:
        sizes["deepstack_visual_indexes"] = tuple(vision.get("deepstack_visual_indexes", ()))
    try:
        return BrainConfig(family=family, **sizes)
    except ValueError as error:
        raise ValueError(f"{path} has sizes that do not fit each other: {error}") from error


def _interval(text: Mapping[str, Any], path: Path) -> int:
    interval = integer(text, "full_attention_interval", 4, path)
    layers = text.get("layer_types")
    if layers is not None:
        expected = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(len(layers))]
        if layers != expected:
            raise ValueError(
                f"{path}: layer_types is not full attention in every {interval}. layer, which alone is supported."
            )
    return interval


def _check_tokenizer(tokenizer: Any, folder: Path, said: Mapping[str, Any], name: str) -> None:
    """The ids that the VLM was trained with, and a chat template."""
    ids = token_ids(tokenizer)
    for ours, theirs in (("image", "image_token_id"), ("vision_start", "vision_start_token_id")):
        if theirs in said and said[theirs] != ids[ours]:
            raise ValueError(
                f"{folder}/config.json says {theirs} = {said[theirs]!r}, and tokenizer.json has {ids[ours]}: they are "
                f"not of one model. Give tokenizer=FOLDER with the files of {name}."
            )
    path = folder / "chat_template.json"
    if tokenizer.chat_template is None and path.is_file():
        tokenizer.chat_template = read_json(path).get("chat_template")
    if not isinstance(tokenizer.chat_template, str):
        raise ValueError(
            f"{folder} has no chat template (chat_template in tokenizer_config.json, chat_template.jinja or "
            f"chat_template.json), which prompts are written in. Give tokenizer=FOLDER with the files of {name}."
        )


def _pixels(path: Path, patch: int) -> tuple[int, int]:
    said = read_json(path)
    check_supported(said, {**IMAGE_MUST_BE, "patch_size": (patch,)}, path)
    size = said.get("size")
    if not isinstance(size, dict) or "shortest_edge" not in size:
        size = {"shortest_edge": said.get("min_pixels"), "longest_edge": said.get("max_pixels")}
    # By name an edge, in fact an area.
    return integer(size, "shortest_edge", None, path), integer(size, "longest_edge", None, path)
