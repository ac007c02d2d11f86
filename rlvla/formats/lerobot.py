"""LeRobot's pi0, pi0.5 and SmolVLA: config.json, model.safetensors, and two processor pipelines with their statistics.

Conventions (LeRobot 0.4 to 0.6): flow time 1 is noise, velocity is noise - action; statistics and their use are in the
pipelines; images are resized without averaging. What a pipeline does that this reader does not know is refused.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlvla.config import ImportConfig
from rlvla.formats import pi_weights
from rlvla.formats.base import (
    Draft,
    affine,
    check_same,
    check_size,
    check_supported,
    integer,
    load_checkpoint_tokenizer,
    order_cameras,
    read_json,
    read_statistics,
    unclipped_stats,
)
from rlvla.formats.tensors import KeyMap, Weights, count_layers, read_weights, shape_of
from rlvla.policies.action_stats import ActionStats
from rlvla.policies.prefix import ExpertSizes
from rlvla.policies.smolvla import SmolVLAConfig, SmolVLMSizes
from rlvla_envs.base import EnvSpec

NOISE_AT = 1.0
SMOLVLA_VERSION = 1
"""Of SmolVLA's key map."""
TEXT_HEAD = 64
"""Size of an attention head of SmolLM2."""
VISION_DEPTH = {768: 12, 1152: 27}
"""Layers of SmolVLM2's vision towers, by width."""
VISION_HEADS = {1152: 16}
"""By width; SigLIP's others have heads of 64."""
IMAGES = "observation.images."
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"

KNOWN_STEPS = {
    "rename_observations_processor",
    "to_batch_processor",
    "device_processor",
    "tokenizer_processor",
    "normalizer_processor",
    "unnormalizer_processor",
    "pi0_new_line_processor",
    "smolvla_new_line_processor",
    "newline_task_processor",
    "pi05_prepare_state_tokenizer_processor_step",
}
"""Pipeline steps whose effect our own preprocessing has."""
IDLE_STEPS = {
    "relative_actions_processor",
    "absolute_actions_processor",
    "delta_actions_processor",
}
"""Known when they are switched off."""
MUST_BE = {
    "n_obs_steps": (1,),
    "adapt_to_pi_aloha": (False,),
    "use_delta_joint_actions_aloha": (False,),
    "use_relative_actions": (False,),
    "use_proprioceptive_memory": (False,),
    "add_image_special_tokens": (False,),
    "attention_mode": ("cross_attn",),
}
"""Options that change what a network is given, and the values that are supported; absent ones have them."""


def read(checkpoint: Path, config: ImportConfig, spec: EnvSpec) -> Draft:
    """Read pi0, pi0.5 or SmolVLA.

    Raises:
        ValueError: what is missing, damaged, unsupported or another architecture's.
    """
    path = checkpoint / "config.json"
    said = read_json(path)
    kind = said.get("type")
    if kind not in ("pi0", "pi05", "smolvla"):
        raise ValueError(f"{path} says type {kind!r}; supported are pi0, pi05 and smolvla.")
    check_supported(said, MUST_BE, path)
    if config.horizon is not None:
        raise ValueError("horizon is for openpi's checkpoints; LeRobot's config.json has chunk_size. Leave it out.")
    features = _features(said, path)
    check_size("action", features["action"], spec.action_size, path)
    check_size("observation.state", features.get("observation.state", 0), spec.state_size, path)
    images = [name for name in features if name.startswith("observation.image") and "empty_camera" not in name]
    cameras, empty = order_cameras(images, spec, config.cameras, IMAGES)
    stored = integer(said, "num_inference_steps" if "num_inference_steps" in said else "num_steps", 10, path)
    steps = config.num_denoising_steps or stored
    weights = read_weights(checkpoint / "model.safetensors")
    pipelines = {name: _pipeline(checkpoint / name) for name in (PREPROCESSOR, POSTPROCESSOR)}
    options = {
        "num_denoising_steps": steps,
        "cameras": cameras,
        "clean_prompt": kind == "pi05",
        "prompt_tokens": integer(said, "tokenizer_max_length", 200 if kind == "pi05" else 48, path),
    }
    if kind == "smolvla":
        policy: Any = _smolvla(said, weights, path, options)
        rules, whose, bos = _smolvla_keys(weights), str(said.get("vlm_model_name", "SmolVLM2")), False
    else:
        if pi_weights.is_pi05(weights) != (kind == "pi05"):
            raise ValueError(f"{path} says type {kind!r}, and {weights.path.name} holds the other of pi0 and pi05.")
        resolution = said.get("image_resolution", said.get("resize_imgs_with_padding", [224, 224]))
        policy = pi_weights.policy_config(
            weights,
            variants=(said.get("paligemma_variant", "gemma_2b"), said.get("action_expert_variant", "gemma_300m")),
            channels=integer(said, "max_action_dim", 32, path),
            state_channels=integer(said, "max_state_dim", 32, path),
            horizon=integer(said, "chunk_size", 50, path),
            pad_state_text=True,
            **options,
        )
        _check_resolution(resolution, policy.vlm.image_size, path)
        rules, whose, bos = pi_weights.key_map(weights), pi_weights.TOKENIZER, True
    tokenizer = load_checkpoint_tokenizer(checkpoint, config.tokenizer, image_token="<image>", bos=bos, whose=whose)
    stats = _stats(checkpoint, config, spec, said, pipelines)
    notes = [f"Left out, as missing images are in LeRobot: {', '.join(empty)}."] if empty else []
    executed = said.get("n_action_steps", said.get("chunk_size"))
    if executed != spec.chunk_size:
        notes.append(
            f"The checkpoint was run with {executed} actions a decision (n_action_steps), the suite with "
            f"{spec.chunk_size}."
        )
    return Draft(policy, stats, tokenizer, weights, rules, tuple(notes))


def _features(said: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Channels of each input and of the action, in the order of the file."""
    try:
        inputs, outputs = said["input_features"], said["output_features"]
        return {name: int(feature["shape"][0]) for name, feature in {**inputs, "action": outputs["action"]}.items()}
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(
            f"{path} does not describe its inputs and action ({type(error).__name__}: {error}); it must have "
            "input_features and output_features.action with their shapes."
        ) from error


def _pipeline(path: Path) -> list[dict[str, Any]]:
    """The steps of a processor pipeline; none where the file is missing."""
    if not path.is_file():
        return []
    steps = read_json(path).get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ValueError(f"{path} has no list of steps. Copy the checkpoint again.")
    for step in steps:
        name = step.get("registry_name", step.get("class"))
        idle = name in IDLE_STEPS and step.get("config", {}).get("enabled") is False
        if name not in KNOWN_STEPS and not idle:
            raise ValueError(
                f"{path} has a step {name!r}, which changes what the network reads or writes and is not supported. "
                "Known steps: " + ", ".join(sorted(KNOWN_STEPS)) + "."
            )
    return steps


def _stats(
    checkpoint: Path,
    config: ImportConfig,
    spec: EnvSpec,
    said: Mapping[str, Any],
    pipelines: Mapping[str, list[dict[str, Any]]],
) -> ActionStats:
    """The maps of the two pipelines, or of the file that the user gives in their place."""
    modes = dict(said.get("normalization_mapping", {}))
    eps, tables = {}, {}
    for kind, file, name in (
        ("state", PREPROCESSOR, "normalizer_processor"),
        ("action", POSTPROCESSOR, "unnormalizer_processor"),
    ):
        step = next((s for s in pipelines[file] if s.get("registry_name") == name), {})
        inner = step.get("config", {})
        # What the pipeline says holds: a fine-tuning may have left the policy's own configuration behind.
        modes |= {key: mode for key, mode in inner.get("norm_map", {}).items() if key == kind.upper()}
        eps[kind] = inner.get("eps", 1e-8)
        tables[kind] = _table(checkpoint, step.get("state_file"))
    if modes.get("VISUAL", "IDENTITY") != "IDENTITY":
        raise ValueError(f"{checkpoint}: images are normalised by {modes['VISUAL']!r}; only IDENTITY is supported.")
    names = {"state": "observation.state", "action": "action"}
    own = {kind: _entry(table, names[kind]) for kind, table in tables.items()}
    where = {
        "state": f"{checkpoint / PREPROCESSOR} (observation.state)",
        "action": f"{checkpoint / POSTPROCESSOR} (action)",
    }
    if config.statistics is not None:
        if own["action"]:
            raise ValueError(f"{checkpoint} has statistics of its own. Leave statistics={config.statistics} out.")
        own |= read_statistics(Path(config.statistics))
        where = dict.fromkeys(where, str(config.statistics))
    elif not own["action"]:
        raise ValueError(
            f"{checkpoint} has no statistics for the key 'action' ({POSTPROCESSOR} and the state file of its "
            f"unnormalizer_processor hold {_listed(tables['action'])}). Give statistics=FILE: the meta/stats.json of "
            "the dataset it was trained on."
        )
    maps = {}
    for kind in ("state", "action"):
        size = spec.state_size if kind == "state" else spec.action_size
        if kind == "state" and not size:
            maps[kind] = (np.zeros(0), np.zeros(0))
            continue
        if kind.upper() not in modes:
            raise ValueError(
                f"{checkpoint} does not say how {names[kind]} is normalised: config.json has no "
                f"normalization_mapping.{kind.upper()}, and neither {PREPROCESSOR} nor {POSTPROCESSOR} a norm_map with "
                "it. Copy it from the training run; IDENTITY is none."
            )
        mode = str(modes[kind.upper()])
        if mode == "IDENTITY":
            maps[kind] = (-np.ones(size), np.ones(size))
        else:
            # Actions are only ever mapped back, which LeRobot does without its constant.
            scale = 0.0 if (kind, mode) == ("action", "MEAN_STD") else eps[kind]
            maps[kind] = affine(mode, own.get(kind, {}), scale, where[kind])
    return unclipped_stats(maps["action"], maps["state"], spec, where["action"])


def _table(checkpoint: Path, file: str | None) -> dict[str, np.ndarray]:
    if file is None:
        return {}
    path = (checkpoint / file).resolve()
    if not path.is_relative_to(checkpoint.resolve()):
        raise ValueError(f"{checkpoint}: the state file {file} lies outside the checkpoint.")
    return {key: tensor.double().numpy() for key, tensor in read_weights(path).tensors.items()}


def _entry(table: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in table.items() if key.startswith(prefix)}


def _listed(table: Mapping[str, Any]) -> str:
    return ", ".join(sorted(table)[:6]) or "nothing"


def _check_resolution(given: Any, size: int, path: Path) -> None:
    if given is None or list(given) != [size, size]:
        raise ValueError(
            f"{path} resizes images to {given}; the vision tower's position table is for {size} x {size} pixels. Only "
            "that is supported."
        )


def _smolvla_keys(weights: Weights) -> KeyMap:
    # A model saved while compiled has one more module in its names.
    root = "model._orig_mod." if any(key.startswith("model._orig_mod.") for key in weights.tensors) else "model."
    return KeyMap(
        version=SMOLVLA_VERSION,
        renames=(
            (f"{root}vlm_with_expert.vlm.model.", "vlm."),
            # Not their common prefix: the way back must tell layers from projections.
            (f"{root}vlm_with_expert.lm_expert.layers.", "expert.layers."),
            (f"{root}vlm_with_expert.lm_expert.norm.", "expert.norm."),
            (f"{root}state_proj.", "state_proj."),
            (root, "expert."),
        ),
        # SmolVLM2's head is its own; it has the shape of the embedding.
        kept=frozenset({f"{root}vlm_with_expert.vlm.lm_head.weight"}),
        kept_like=_like_embedding(weights, f"{root}vlm_with_expert.vlm."),
    )


def _like_embedding(weights: Weights, vlm: str) -> dict[str, tuple[int, ...]]:
    table = weights.tensors.get(f"{vlm}model.text_model.embed_tokens.weight")
    return {} if table is None else {f"{vlm}lm_head.weight": tuple(table.shape)}


def _smolvla(said: Mapping[str, Any], weights: Weights, path: Path, options: dict[str, Any]) -> SmolVLAConfig:
    """Sizes from the tensors: the VLM's own configuration is not part of a checkpoint."""
    keys = _smolvla_keys(weights)

    def shape(name: str, axes: int) -> tuple[int, ...]:
        return shape_of(weights, keys.theirs(name), axes, "SmolVLA")

    def layers(prefix: str) -> int:
        return count_layers(weights, keys.theirs(prefix))

    vocabulary, hidden = shape("vlm.text_model.embed_tokens.weight", 2)
    patch = shape("vlm.vision_model.embeddings.patch_embedding.weight", 4)
    side = math.isqrt(shape("vlm.vision_model.embeddings.position_embedding.weight", 2)[0])
    merged = shape("vlm.connector.modality_projection.proj.weight", 2)[1]
    first = "vlm.text_model.layers.0."
    depth = layers("vlm.text_model.layers.")
    sizes = SmolVLMSizes(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=shape(f"{first}mlp.gate_proj.weight", 2)[0],
        num_hidden_layers=depth,
        num_attention_heads=shape(f"{first}self_attn.q_proj.weight", 2)[0] // TEXT_HEAD,
        num_key_value_heads=shape(f"{first}self_attn.k_proj.weight", 2)[0] // TEXT_HEAD,
        head_dim=TEXT_HEAD,
        vision_hidden_size=patch[0],
        vision_intermediate_size=shape("vlm.vision_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        vision_num_hidden_layers=layers("vlm.vision_model.encoder.layers."),
        vision_num_attention_heads=VISION_HEADS.get(patch[0], max(1, patch[0] // 64)),
        patch_size=patch[2],
        image_size=patch[2] * side,
        scale_factor=math.isqrt(merged // patch[0]),
    )
    _check_resolution(said.get("resize_imgs_with_padding", [512, 512]), sizes.image_size, path)
    if said.get("num_vlm_layers") not in (None, 0, -1):
        check_same(said, "num_vlm_layers", path, depth, "layers of the language model", weights.path)
    deepest = VISION_DEPTH.get(patch[0], sizes.vision_num_hidden_layers)
    if sizes.vision_num_hidden_layers != deepest:
        raise ValueError(
            f"{weights.path} has {sizes.vision_num_hidden_layers} layers of the vision tower; SmolVLM2's, which is "
            f"{patch[0]} wide, has {deepest}. Weights are missing: copy the checkpoint again."
        )
    factor = said.get("expert_width_multiplier", 0.75)
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor <= 4:
        raise ValueError(f"{path} says expert_width_multiplier = {factor!r}; it must be a number above 0.")
    if said.get("num_expert_layers", -1) not in (-1, 0, depth):
        raise ValueError(
            f"{path} says num_expert_layers = {said['num_expert_layers']}; only as many as the VLM's {depth} are "
            "supported."
        )
    return SmolVLAConfig(
        vlm=sizes,
        expert=ExpertSizes(
            hidden_size=int(hidden * factor),
            intermediate_size=shape("expert.layers.0.mlp.gate_proj.weight", 2)[0],
            channels=integer(said, "max_action_dim", 32, path),
            horizon=integer(said, "chunk_size", 50, path),
            state_channels=integer(said, "max_state_dim", 32, path),
        ),
        self_attention_every=max(0, integer(said, "self_attn_every_n_layers", 2, path)),
        denoise_padding=True,
        store_prefix=False,
        **options,
    )
