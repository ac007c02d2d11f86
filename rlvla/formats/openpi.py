"""openpi's PyTorch checkpoints: model.safetensors, assets/<id>/norm_stats.json, config.json where its converter ran.

Conventions (openpi, models_pytorch): flow time 1 is noise, velocity is noise - action; pi0 standardises, pi0.5 maps
quantiles to [-1, 1], both with 1e-6 and without clipping; images are resized with averaging, black bars on both sides.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlvla.config import ImportConfig
from rlvla.formats import pi_weights
from rlvla.formats.base import (
    Draft,
    affine,
    integer,
    load_checkpoint_tokenizer,
    order_cameras,
    read_json,
    read_statistics,
    unclipped_stats,
)
from rlvla.formats.tensors import read_weights
from rlvla.policies.action_stats import ActionStats
from rlvla_envs.base import EnvSpec

NOISE_AT = 1.0
IMAGES = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
EPS = 1e-6
STATE_CHANNELS = 32
CONFIGURATION = {"action_dim", "action_horizon", "paligemma_variant", "action_expert_variant", "precision"}
"""Keys of the converter's config.json."""
PROMPT_TOKENS = {False: 48, True: 200}
"""For pi0 and pi0.5."""


def read(checkpoint: Path, config: ImportConfig, spec: EnvSpec) -> Draft:
    """Read pi0 or pi0.5.

    Raises:
        ValueError: what is missing, damaged or another architecture's.
    """
    if (checkpoint / "params").is_dir() and not (checkpoint / "model.safetensors").is_file():
        raise ValueError(
            f"{checkpoint} is a JAX checkpoint (params/). Convert it with openpi's "
            "examples/convert_jax_model_to_pytorch.py and import what that wrote."
        )
    path = checkpoint / "config.json"
    said = read_json(path) if path.is_file() else {}
    if "type" in said or (checkpoint / "policy_preprocessor.json").is_file():
        raise ValueError(
            f"{checkpoint} is a checkpoint of LeRobot ({path.name} says type {said.get('type')!r}), which prepares "
            "images and prompts in another way. Import it as that: rlvla import lerobot"
        )
    if said and not CONFIGURATION & set(said):
        raise ValueError(
            f"{path} is not what openpi's converter writes ({', '.join(sorted(CONFIGURATION))}); it has "
            f"{', '.join(sorted(said)[:6])}. Is it a checkpoint of openpi?"
        )
    weights = read_weights(checkpoint / "model.safetensors")
    pi05 = pi_weights.is_pi05(weights)
    if config.delta_actions:
        raise ValueError(
            "delta_actions is true: the policy's actions are differences to the state, which is to be added to them "
            "(openpi's AbsoluteActions). That is not supported."
        )
    state_in_prompt = _state_in_prompt(said, config, path, pi05)
    horizon = said.get("action_horizon", config.horizon)
    if config.horizon not in (None, horizon):
        raise ValueError(f"horizon is {config.horizon}, and {path} says action_horizon {horizon}. Leave horizon out.")
    if not isinstance(horizon, int) or horizon < 1:
        raise ValueError(
            f"{checkpoint} does not say how many actions a chunk has: no tensor depends on it, and config.json has no "
            "action_horizon. Give horizon=N, as in the openpi training configuration; 50 for the base models."
        )
    if not spec.state_size:
        raise ValueError(
            "pi0 and pi0.5 read the robot's state, and the suite has none. Choose one that has (suite=NAME)."
        )
    cameras, empty = order_cameras(IMAGES, spec, _first_image(config.cameras, spec))
    names = {key.removeprefix("model."): tensor for key, tensor in weights.tensors.items()}
    policy = pi_weights.policy_config(
        weights,
        variants=(said.get("paligemma_variant", "gemma_2b"), said.get("action_expert_variant", "gemma_300m")),
        channels=integer(said, "action_dim", names["action_in_proj.weight"].shape[-1], path),
        state_channels=STATE_CHANNELS if pi05 else names["state_proj.weight"].shape[-1],
        horizon=horizon,
        num_denoising_steps=config.num_denoising_steps or 10,
        antialias=True,
        cameras=cameras,
        clean_prompt=True,
        prompt_tokens=PROMPT_TOKENS[pi05],
        **({"pad_state_text": False, "state_in_prompt": state_in_prompt} if pi05 else {}),
    )
    tokenizer = load_checkpoint_tokenizer(
        checkpoint, config.tokenizer, image_token="<image>", bos=True, whose=pi_weights.TOKENIZER
    )
    notes = [f"Left out, as masked images are in openpi: {', '.join(empty)}."] if empty else []
    if config.delta_actions is None:
        notes.append(
            "No file of the checkpoint says whether its actions are differences to the state (DeltaActions, as "
            "extra_delta_transform=True of pi0_libero and use_delta_joint_actions of ALOHA); they were taken as they "
            "are. delta_actions=false says that you know."
        )
    if pi05 and config.discrete_state_input is None and "discrete_state_input" not in said:
        notes.append(
            "No file of the checkpoint says whether the state stands in the prompt; it was taken to, as by openpi's "
            "default. Give discrete_state_input=false for pi05_libero and others that were trained so."
        )
    stats = _stats(checkpoint, config, spec, pi05)
    return Draft(policy, stats, tokenizer, weights, pi_weights.key_map(weights), tuple(notes))


def _state_in_prompt(said: Mapping[str, Any], config: ImportConfig, path: Path, pi05: bool) -> bool:
    """openpi's Pi0Config.discrete_state_input."""
    found, given = said.get("discrete_state_input"), config.discrete_state_input
    if not pi05:
        if given is not None:
            raise ValueError("discrete_state_input is for pi0.5; pi0 reads the state as numbers. Leave it out.")
        return False
    if found is not None and given is not None and given != found:
        raise ValueError(f"discrete_state_input is {given}, and {path} says {found!r}. Leave discrete_state_input out.")
    chosen = found if found is not None else given
    if chosen not in (True, False, None):
        raise ValueError(f"{path} says discrete_state_input = {chosen!r}; it must be true or false.")
    return chosen is not False


def _first_image(given: dict[str, str], spec: EnvSpec) -> dict[str, str]:
    """One camera is the base camera, unless the user says otherwise."""
    if not given and len(spec.cameras) == 1:
        return {spec.cameras[0].name: IMAGES[0]}
    return given


def _stats(checkpoint: Path, config: ImportConfig, spec: EnvSpec, pi05: bool) -> ActionStats:
    found = sorted((checkpoint / "assets").rglob("norm_stats.json"))
    if config.statistics is not None:
        path = Path(config.statistics)
    elif len(found) == 1:
        path = found[0]
    else:
        seen = f"several: {', '.join(str(p) for p in found)}" if found else "none"
        raise ValueError(
            f"the checkpoint's statistics are needed, and under {checkpoint}/assets there is {seen}. Give "
            "statistics=FILE: its norm_stats.json."
        )
    stats = read_statistics(path)
    mode, eps = ("QUANTILES", 0.0) if pi05 else ("MEAN_STD", EPS)
    state = affine(mode, stats.get("state", {}), eps, f"{path} (state)")
    action = affine(mode, stats["action"], eps, f"{path} (actions)")
    if pi05:
        # openpi adds its constant to the range whatever that is.
        action = (action[0], action[1] + EPS)
        state = (state[0], state[1] + EPS)
    return unclipped_stats(action, state, spec, str(path))
