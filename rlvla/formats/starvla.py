"""starVLA's QwenGR00T, QwenOFT and QwenPI: config.yaml, dataset_statistics.json, and a weights file in checkpoints/.

Conventions (starVLA, checkpoints since 2025-10-20): flow time 0 is noise, velocity is action - noise; the VLM's tensors
are the checkpoint's, its sizes, tokenizer and image processor those of a published folder (`qwen_folder`); statistics
and their use are in `starvla_norm`. Heads have dropout in training, which acting has not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlvla.config import ImportConfig
from rlvla.formats.base import Draft, check_same, check_size, check_supported, integer, order_cameras, read_json
from rlvla.formats.qwen_folder import MERGED, QwenFolder, read_qwen_folder, resized_side
from rlvla.formats.starvla_norm import read_normalization
from rlvla.formats.tensors import KeyMap, Weights, count_layers, read_weights, shape_of
from rlvla.policies.brain import PromptConfig
from rlvla.policies.gr00t_head import Gr00tHeadConfig
from rlvla.policies.layerwise_head import LayerwiseHeadConfig
from rlvla.policies.qwen_gr00t import QwenGr00tConfig
from rlvla.policies.qwen_oft import QwenOftConfig
from rlvla.policies.qwen_pi import QwenPiConfig
from rlvla_envs.base import EnvSpec

NOISE_AT = 0.0
VERSION = 1
"""Of the key maps below."""
VLM, HEAD = "qwen_vl_interface.model.", "action_model."
TIED = {f"{VLM}lm_head.weight": "vlm.language_model.embed_tokens.weight"}
"""One tensor in the smaller models; in those where it is two, the head is kept aside."""
HEAD_DIM = {"DiT-B": 64, "DiT-L": 48}
"""By action_model_type: what the tensors' shapes do not tell."""
RESIDUAL_BLOCKS = 2
"""Of QwenOFT's head, whatever its configuration says."""
LAYERWISE_HEAD_DIM = 64
"""The same of QwenPI, where the configuration does not say."""
CLIENT_SIDE = 224
"""Pixels to which starVLA's evaluation clients resize before anything else."""
DIFFUSION_MUST_BE: dict[str, tuple[Any, ...]] = {
    "norm_type": ("ada_norm",),
    "positional_embeddings": (None,),
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_elementwise_affine": (False,),
}
ACTION_MUST_BE = {"add_pos_embed": (True,), "past_action_window_size": (0,)}
"""Options that change what a head computes, and the values that are supported."""


@dataclass(frozen=True)
class Run:
    """What every architecture is read from."""

    path: Path
    """Of the configuration."""
    framework: str
    action: Mapping[str, Any]
    diffusion: Mapping[str, Any]
    qwenvl: Mapping[str, Any]
    weights: Weights
    given: ImportConfig
    spec: EnvSpec
    uses_state: bool
    shared: Mapping[str, Any]
    """Options that all architectures have: vlm, prompt, image_sizes, cameras."""

    def shape(self, key: str, axes: int = 2) -> tuple[int, ...]:
        """Of a tensor of the head."""
        return shape_of(self.weights, HEAD + key, axes, self.framework)

    @property
    def horizon(self) -> int:
        if "action_horizon" in self.action:
            return integer(self.action, "action_horizon", None, self.path)
        return integer(self.action, "future_action_window_size", None, self.path) + 1


def root(checkpoint: Path) -> Path:
    """The run's folder, of itself or of a weights file in its checkpoints/."""
    return checkpoint.parent.parent if checkpoint.is_file() else checkpoint


def read(checkpoint: Path, config: ImportConfig, spec: EnvSpec) -> Draft:
    """Read QwenGR00T, QwenOFT or QwenPI.

    Raises:
        ValueError: what is missing, damaged, unsupported or another architecture's.
    """
    run = root(checkpoint)
    if config.horizon is not None:
        raise ValueError("horizon is for openpi's checkpoints; starVLA's config.yaml has action_horizon. Leave it out.")
    said, path = _configuration(run)
    framework, data = _section(said, path, "framework"), _section(said, path, "datasets", "vla_data")
    name = framework.get("name")
    if name not in READERS:
        raise ValueError(f"{path} says framework.name = {name!r}; supported are {', '.join(READERS)}.")
    action = _section(said, path, "framework", "action_model")
    diffusion = action.get("diffusion_model_cfg") or {}
    check_supported(action, ACTION_MUST_BE, path)
    uses_state = data.get("include_state") not in (None, False, "False")
    qwenvl = framework.get("qwenvl") or {}
    base_vlm = qwenvl.get("base_vlm", "the base VLM")
    folder = read_qwen_folder(run, config.tokenizer, str(base_vlm))
    norm = read_normalization(run, config, spec, data.get("data_mix"), uses_state=uses_state)
    names = norm.images or tuple(camera.name for camera in spec.cameras)
    cameras, empty = order_cameras(names, spec, config.cameras)
    weights = read_weights(_weights_file(checkpoint))
    shared = {
        "vlm": folder.config,
        "prompt": _prompt(data, path),
        "image_sizes": _image_sizes(framework, data, folder, path),
        "cameras": cameras,
    }
    policy, keys = READERS[name](
        Run(path, str(name), action, diffusion, qwenvl, weights, config, spec, uses_state, shared)
    )
    notes = [f"Left out, which the checkpoint was trained with: {', '.join(empty)}."] if empty else []
    if not norm.images and len(spec.cameras) > 1:
        notes.append(f"The images' order is the suite's, as none is known for this robot: {', '.join(cameras)}.")
    if keys.own:
        notes.append(f"Not in the checkpoint, and not exported: {', '.join(sorted(keys.own))}.")
    return Draft(policy, norm.stats, folder.tokenizer, weights, keys, tuple(notes))


def _gr00t(run: Run) -> tuple[QwenGr00tConfig, KeyMap]:
    check_supported(run.diffusion, DIFFUSION_MUST_BE, run.path)
    width = run.shape("action_encoder.layer3.weight")[0]
    channels = run.shape("action_encoder.layer1.weight")[1]
    check_size("the action", channels, run.spec.action_size, run.weights.path)
    blocks = count_layers(run.weights, f"{HEAD}model.transformer_blocks.")
    check_same(run.diffusion, "num_layers", run.path, blocks, "blocks of the DiT", run.weights.path)
    _check_said(run, channels)
    expert = Gr00tHeadConfig(
        num_blocks=blocks,
        num_heads=_heads(run, width),
        head_dim=width // _heads(run, width),
        hidden_size=run.shape("action_decoder.layer1.weight")[0],
        output_size=run.shape("model.proj_out_2.weight")[0],
        num_future_tokens=run.shape("future_tokens.weight")[0],
        interleave_self_attention=bool(run.diffusion.get("interleave_self_attention", True)),
        max_positions=run.shape("position_embedding.weight")[0],
        num_time_buckets=integer(run.action, "num_timestep_buckets", 1000, run.path),
        channels=channels,
        horizon=run.horizon,
    )
    policy = QwenGr00tConfig(
        expert=expert,
        num_denoising_steps=_steps(run),
        use_state=run.uses_state,
        value_uses_state=run.uses_state,
        denoise_padding=True,
        **run.shared,
    )
    return policy, _keys(kept=_state_keys(run))


def _oft(run: Run) -> tuple[QwenOftConfig, KeyMap]:
    if run.uses_state:
        raise ValueError(
            f"{run.path} says datasets.vla_data.include_state = true, with which QwenOFT writes the state into the "
            "prompt; only QwenOFT without a state is supported."
        )
    channels, width = run.shape("model.fc2.weight")
    hidden = run.shape("model.fc1.weight")[1]
    check_size("the action", channels, run.spec.action_size, run.weights.path)
    check_same(run.action, "action_dim", run.path, channels, "channels of the action", run.weights.path)
    blocks = count_layers(run.weights, f"{HEAD}model.mlp_resnet_blocks.")
    if blocks != RESIDUAL_BLOCKS:
        raise ValueError(
            f"{run.weights.path} has {blocks} residual blocks of the head; QwenOFT's has {RESIDUAL_BLOCKS}. Weights "
            "are missing: copy the checkpoint again."
        )
    if width != 2 * hidden:
        raise ValueError(f"{run.weights.path}: {HEAD}model is {width} wide; it must be twice the VLM's {hidden}.")
    policy = QwenOftConfig(
        horizon=run.horizon,
        channels=channels,
        num_blocks=blocks,
        value_uses_state=False,
        **run.shared,
    )
    return policy, _keys(own=frozenset({"log_std"}))


def _pi(run: Run) -> tuple[QwenPiConfig, KeyMap]:
    check_supported(run.diffusion, DIFFUSION_MUST_BE, run.path)
    channels = run.shape("action_encoder.layer1.weight")[1]
    check_size("the action", channels, run.spec.action_size, run.weights.path)
    vlm = run.shared["vlm"]
    blocks = count_layers(run.weights, f"{HEAD}model.transformer_blocks.")
    # starVLA overwrites diffusion_model_cfg.num_layers, which therefore says nothing.
    layers = integer(run.qwenvl, "num_vl_layers", vlm.num_hidden_layers, run.path)
    if blocks != layers:
        raise ValueError(
            f"{run.weights.path} has {blocks} blocks of the DiT; QwenPI has one for each of {layers} layers of the VLM "
            f"({run.path}, framework.qwenvl.num_vl_layers, or else the VLM's config.json). Weights are missing, or it "
            "was another VLM. Is it a checkpoint of QwenPI?"
        )
    _check_said(run, channels)
    expert = LayerwiseHeadConfig(
        num_blocks=blocks,
        head_dim=integer(run.diffusion, "attention_head_dim", LAYERWISE_HEAD_DIM, run.path),
        hidden_size=run.shape("action_decoder.layer1.weight")[0],
        num_future_tokens=run.shape("future_tokens.weight")[0],
        interleave_self_attention=_self_attention(run),
        max_positions=run.shape("position_embedding.weight")[0],
        num_time_buckets=integer(run.action, "num_timestep_buckets", 1000, run.path),
        channels=channels,
        horizon=run.horizon,
    )
    width = run.shape("action_decoder.layer1.weight")[1]
    if width != vlm.hidden_size:
        raise ValueError(
            f"{run.weights.path}: {HEAD}action_decoder reads {width} channels, and the VLM of its folder is "
            f"{vlm.hidden_size} wide; in QwenPI they are the same. Is it a checkpoint of QwenPI? Was it this VLM?"
        )
    policy = QwenPiConfig(
        expert=expert,
        num_denoising_steps=_steps(run),
        use_state=run.uses_state,
        value_uses_state=run.uses_state,
        denoise_padding=True,
        **run.shared,
    )
    # The DiT is built with a last projection, and QwenPI's forward pass goes round it.
    unused = frozenset(key for key in run.weights.tensors if key.startswith(f"{HEAD}model.proj_out_"))
    return policy, _keys(kept=_state_keys(run) | unused)


def _check_said(run: Run, channels: int) -> None:
    """Sizes of a flow head that both the configuration and the tensors have."""
    check_same(run.action, "action_dim", run.path, channels, "channels of the action", run.weights.path)
    future = run.shape("future_tokens.weight")[0]
    check_same(run.action, "num_target_vision_tokens", run.path, future, "future tokens", run.weights.path)


def _self_attention(run: Run) -> bool:
    """Whether odd blocks attend to the sequence itself. The shapes do not tell, and code of two periods differs."""
    interleaved = run.diffusion.get("interleave_self_attention", False)
    canonical = run.diffusion.get("use_canonical_forward", run.given.self_attention)
    if interleaved and canonical is None:
        raise ValueError(
            f"{run.path} says interleave_self_attention = true and has no use_canonical_forward: before starVLA had "
            "that, QwenPI attended to the VLM in all blocks in spite of it. Give self_attention=false for a checkpoint "
            "trained then (the published ones for LIBERO), true for one trained since."
        )
    return bool(interleaved and canonical)


def _keys(kept: frozenset[str] = frozenset(), own: frozenset[str] = frozenset()) -> KeyMap:
    renames = ((f"{VLM}model.", "vlm."), (HEAD, "expert."))
    return KeyMap(VERSION, renames, kept=kept, tied=TIED, own=own)


def _state_keys(run: Run) -> frozenset[str]:
    """Tensors of the state encoder, where it is there and not used: starVLA makes one whenever state_dim is set, and
    calls it where the dataset gives a state."""
    if run.uses_state:
        size = run.shape("state_encoder.layer1.weight")[1]
        check_size("the state", size, run.spec.state_size, run.weights.path)
        return frozenset()
    return frozenset(key for key in run.weights.tensors if key.startswith(f"{HEAD}state_encoder."))


def _heads(run: Run, width: int) -> int:
    kind = run.action.get("action_model_type")
    head_dim = integer(run.diffusion, "attention_head_dim", HEAD_DIM.get(str(kind)), run.path)
    if head_dim < 1 or width % head_dim:
        raise ValueError(
            f"{run.path} says attention_head_dim {head_dim} (action_model_type {kind!r}), which does not divide the "
            f"width of {run.weights.path}, {width}. Is it the configuration of another checkpoint?"
        )
    return width // head_dim


def _steps(run: Run) -> int:
    return run.given.num_denoising_steps or integer(run.action, "num_inference_timesteps", 4, run.path)


READERS: dict[str, Callable[[Run], tuple[Any, KeyMap]]] = {
    "QwenGR00T": _gr00t,
    "QwenOFT": _oft,
    "QwenPI": _pi,
    "QwenFM": _pi,
}
"""By framework.name."""


def _configuration(run: Path) -> tuple[dict[str, Any], Path]:
    """config.yaml, or the config.json of older runs."""
    path = run / "config.yaml"
    if not path.is_file():
        if not (run / "config.json").is_file():
            raise ValueError(
                f"{run} has neither config.yaml nor config.json. It must be the folder of a starVLA run, with "
                "checkpoints/ and dataset_statistics.json, or a weights file in its checkpoints/."
            )
        path = run / "config.json"
        return read_json(path), path
    from omegaconf import OmegaConf

    try:
        # Not resolved: an interpolation could read the user's environment.
        said: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # yaml and OmegaConf have a dozen kinds
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}. Copy the checkpoint again.") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path} holds a {type(said).__name__}; it must hold sections such as framework and datasets.")
    return said, path


def _section(said: Mapping[str, Any], path: Path, *keys: str) -> Mapping[str, Any]:
    found: Any = said
    for i, key in enumerate(keys):
        found = found.get(key) if isinstance(found, dict) else None
        if not isinstance(found, dict):
            raise ValueError(
                f"{path} has no section {'.'.join(keys[: i + 1])}; it must be the config.yaml of a starVLA run."
            )
    section: Mapping[str, Any] = found
    return section


def _weights_file(checkpoint: Path) -> Path:
    if checkpoint.is_file():
        return checkpoint
    folder = checkpoint / "checkpoints"
    found = sorted(p for p in folder.glob("*") if p.suffix in (".pt", ".safetensors")) if folder.is_dir() else []
    if len(found) != 1:
        seen = f"several: {', '.join(p.name for p in found)}" if found else "none"
        raise ValueError(
            f"{folder} must have one weights file (steps_N_pytorch_model.pt or steps_N_model.safetensors), and has "
            f"{seen}. Give the file in place of the folder: rlvla import starvla {folder}/FILE"
        )
    return found[0]


def _prompt(data: Mapping[str, Any], path: Path) -> PromptConfig:
    """The user's turn; starVLA's chat has no other."""
    text = data.get("CoT_prompt", "{instruction}")
    try:
        return PromptConfig(user=str(text))
    except ValueError as error:
        raise ValueError(f"{path}, datasets.vla_data.CoT_prompt: {error}") from error


def _image_sizes(
    framework: Mapping[str, Any], data: Mapping[str, Any], folder: QwenFolder, path: Path
) -> tuple[int, ...]:
    """The square that starVLA resizes to, and the one that Qwen's processor makes of it."""
    given = framework.get("obs_image_size") or data.get("obs_image_size") or data.get("image_size")
    sides = given or [CLIENT_SIDE, CLIENT_SIDE]
    if not isinstance(sides, list) or len(sides) != 2 or sides[0] != sides[1] or not isinstance(sides[0], int):
        raise ValueError(f"{path} says image_size {sides!r}; only squares such as [224, 224] are supported.")
    side: int = sides[0]
    last = resized_side(side, folder.config.patch_size * MERGED, folder.fewest_pixels, folder.most_pixels)
    return (side,) if side == last else (side, last)
