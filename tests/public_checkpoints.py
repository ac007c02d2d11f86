"""Checkpoints in the layouts that LeRobot and openpi publish, at tiny sizes, and what their networks compute.

Written from the public configurations and the published equations, without the importer: lists of keys and shapes, and
a network in plain matrix products that reads the checkpoint's own keys in one joint pass, without cache or modules.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

VOCABULARY = 300
HORIZON, CHANNELS, STATE = 10, 32, 32
ACTIONS, STATES = 2, 5
"""Of the toy suite."""
PATCH, SIDE = 8, 4
"""The vision tower reads images of 32 x 32 pixels in 4 x 4 patches."""
PALIGEMMA = "paligemma_with_expert.paligemma."
EXPERT = "paligemma_with_expert.gemma_expert."

Shapes = dict[str, tuple[int, ...]]


def vision_shapes(root: str, width: int, inner: int, layers: int) -> Shapes:
    shapes: Shapes = {
        f"{root}embeddings.patch_embedding.weight": (width, 3, PATCH, PATCH),
        f"{root}embeddings.patch_embedding.bias": (width,),
        f"{root}embeddings.position_embedding.weight": (SIDE * SIDE, width),
        f"{root}post_layernorm.weight": (width,),
        f"{root}post_layernorm.bias": (width,),
    }
    for i in range(layers):
        layer = f"{root}encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{layer}self_attn.{name}.weight": (width, width), f"{layer}self_attn.{name}.bias": (width,)}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}{name}.weight": (width,), f"{layer}{name}.bias": (width,)}
        shapes |= {f"{layer}mlp.fc1.weight": (inner, width), f"{layer}mlp.fc1.bias": (inner,)}
        shapes |= {f"{layer}mlp.fc2.weight": (width, inner), f"{layer}mlp.fc2.bias": (width,)}
    return shapes


def decoder_shapes(
    root: str,
    *,
    width: int,
    inner: int,
    layers: int,
    queries: int,
    keys: int,
    adaptive: bool = False,
    cross: Callable[[int], bool] = lambda i: False,
) -> Shapes:
    def norm(name: str) -> Shapes:
        if adaptive:
            return {f"{name}.dense.weight": (3 * width, width), f"{name}.dense.bias": (3 * width,)}
        return {f"{name}.weight": (width,)}

    shapes = norm(f"{root}norm")
    for i in range(layers):
        layer = f"{root}layers.{i}."
        read = keys if cross(i) else width
        shapes |= norm(f"{layer}input_layernorm") | norm(f"{layer}post_attention_layernorm")
        shapes |= {
            f"{layer}self_attn.q_proj.weight": (queries, width),
            f"{layer}self_attn.k_proj.weight": (keys, read),
            f"{layer}self_attn.v_proj.weight": (keys, read),
            f"{layer}self_attn.o_proj.weight": (width, queries),
            f"{layer}mlp.gate_proj.weight": (inner, width),
            f"{layer}mlp.up_proj.weight": (inner, width),
            f"{layer}mlp.down_proj.weight": (width, inner),
        }
    return shapes


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def pi_shapes(
    *, pi05: bool, root: str = "", tower: str = "vision_tower.vision_model.", embedding: str = "head"
) -> Shapes:
    """pi0 or pi0.5 with openpi's variant "dummy" for both parts, and a vision tower with one head of 72.

    Args:
        root: "model." where LeRobot saved it.
        tower: as transformers 4 or 5 names it.
        embedding: under which name the tied embedding is there: head, table or both.
    """
    text = dict(width=64, inner=128, layers=4, queries=8 * 16, keys=16)
    shapes: Shapes = {}
    if embedding in ("head", "both"):
        shapes[f"{PALIGEMMA}lm_head.weight"] = (VOCABULARY, 64)
    if embedding in ("table", "both"):
        shapes[f"{PALIGEMMA}model.language_model.embed_tokens.weight"] = (VOCABULARY, 64)
    shapes |= vision_shapes(f"{PALIGEMMA}model.{tower}", 72, 96, 2)
    shapes |= linear(f"{PALIGEMMA}model.multi_modal_projector.linear", 72, 64)
    shapes |= decoder_shapes(f"{PALIGEMMA}model.language_model.", **text)
    shapes |= decoder_shapes(f"{EXPERT}model.", **text, adaptive=pi05)
    shapes[f"{EXPERT}lm_head.weight"] = (VOCABULARY, 64)
    shapes |= linear("action_in_proj", CHANNELS, 64) | linear("action_out_proj", 64, CHANNELS)
    if pi05:
        shapes |= linear("time_mlp_in", 64, 64) | linear("time_mlp_out", 64, 64)
    else:
        shapes |= linear("state_proj", STATE, 64)
        shapes |= linear("action_time_mlp_in", 128, 64) | linear("action_time_mlp_out", 64, 64)
    return {root + key: shape for key, shape in shapes.items()}


def smolvla_shapes() -> Shapes:
    """SmolVLA with two heads of 64 in three layers, two patches by two to a token, and an expert 0.75 times as wide."""
    vlm, width = "model.vlm_with_expert.vlm.", 96
    shapes = vision_shapes(f"{vlm}model.vision_model.", 64, 96, 2)
    shapes[f"{vlm}model.connector.modality_projection.proj.weight"] = (128, 64 * 4)
    shapes[f"{vlm}model.text_model.embed_tokens.weight"] = (VOCABULARY, 128)
    shapes |= decoder_shapes(f"{vlm}model.text_model.", width=128, inner=160, layers=3, queries=128, keys=64)
    shapes[f"{vlm}lm_head.weight"] = (VOCABULARY, 128)
    shapes |= decoder_shapes(
        "model.vlm_with_expert.lm_expert.",
        width=width,
        inner=256,
        layers=3,
        queries=128,
        keys=64,
        cross=lambda i: i % 2 > 0,
    )
    shapes |= linear("model.state_proj", STATE, 128)
    shapes |= linear("model.action_in_proj", CHANNELS, width) | linear("model.action_out_proj", width, CHANNELS)
    shapes |= linear("model.action_time_mlp_in", 2 * width, width) | linear("model.action_time_mlp_out", width, width)
    return shapes


def draw(shapes: Shapes, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights of about unit gain."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in shapes.items():
        scale = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1
        offset = 1.0 if "norm" in key and key.endswith("weight") and "lm_expert" in key else 0.0
        tensors[key] = (offset + scale * torch.randn(shape, generator=generator)).to(dtype)
    return tensors


# --- the files beside the weights


def lerobot_config(kind: str, **changes: Any) -> dict[str, Any]:
    def feature(sort: str, *shape: int) -> dict[str, Any]:
        return {"type": sort, "shape": list(shape)}

    mode = "QUANTILES" if kind == "pi05" else "MEAN_STD"
    config: dict[str, Any] = {
        "type": kind,
        "n_obs_steps": 1,
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode},
        "input_features": {
            "observation.state": feature("STATE", STATES),
            "observation.images.top": feature("VISUAL", 3, 480, 640),
        },
        "output_features": {"action": feature("ACTION", ACTIONS)},
        "device": "cuda",
        "push_to_hub": True,
        "chunk_size": HORIZON,
        "n_action_steps": HORIZON,
        "max_state_dim": STATE,
        "max_action_dim": CHANNELS,
        "optimizer_lr": 2.5e-05,
    }
    if kind == "smolvla":
        config |= {
            "resize_imgs_with_padding": [32, 32],
            "adapt_to_pi_aloha": False,
            "tokenizer_max_length": 48,
            "num_steps": 10,
            "vlm_model_name": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
            "add_image_special_tokens": False,
            "attention_mode": "cross_attn",
            "prefix_length": -1,
            "num_expert_layers": -1,
            "num_vlm_layers": 3,
            "self_attn_every_n_layers": 2,
            "expert_width_multiplier": 0.75,
        }
    else:
        config |= {
            "paligemma_variant": "dummy",
            "action_expert_variant": "dummy",
            "dtype": "bfloat16",
            "num_inference_steps": 10,
            "image_resolution": [32, 32],
            "tokenizer_max_length": 200 if kind == "pi05" else 48,
        }
    return config | changes


def statistics(names: tuple[str, ...] = ("mean", "std", "q01", "q99")) -> dict[str, dict[str, list[float]]]:
    rng = np.random.default_rng(7)
    table = {}
    for key, size in (("observation.state", STATES), ("action", ACTIONS)):
        low = rng.normal(size=size)
        values = {"mean": low + 1, "std": 0.5 + rng.random(size), "q01": low, "q99": low + 2 + rng.random(size)}
        table[key] = {name: values[name].tolist() for name in names}
    return table


def write_pipelines(folder: Path, kind: str, stats: Mapping[str, Mapping[str, list[float]]]) -> None:
    flat = {f"{k}.{n}": torch.tensor(v, dtype=torch.float32) for k, entry in stats.items() for n, v in entry.items()}
    norm = {"eps": 1e-8, "features": {}, "norm_map": lerobot_config(kind)["normalization_mapping"]}
    text: dict[str, Any] = {"max_length": 48, "task_key": "task", "padding_side": "right", "padding": "max_length"}
    before: list[dict[str, Any]] = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
    ]
    normalizer = {"registry_name": "normalizer_processor", "config": norm}
    device = {"registry_name": "device_processor", "config": {"device": "cuda", "float_dtype": None}}
    tokenizer = {"registry_name": "tokenizer_processor", "config": text}
    if kind == "pi05":
        before += [
            normalizer,
            {"registry_name": "pi05_prepare_state_tokenizer_processor_step", "config": {}},
            tokenizer,
        ]
        before += [device]
    else:
        before += [{"registry_name": f"{kind}_new_line_processor", "config": {}}, tokenizer, device, normalizer]
    after: list[dict[str, Any]] = [
        {"registry_name": "unnormalizer_processor", "config": norm},
        {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}},
    ]
    for name, steps in (("policy_preprocessor", before), ("policy_postprocessor", after)):
        for i, step in enumerate(steps):
            if "normalizer" in step["registry_name"]:
                step = steps[i] = {**step, "state_file": f"{name}_step_{i}_{step['registry_name']}.safetensors"}
                save_file(flat, folder / step["state_file"])
        (folder / f"{name}.json").write_text(json.dumps({"name": name, "steps": steps}, indent=2))


def write_tokenizer(folder: Path, *, image: bool = True, bos: bool = True) -> None:
    """A small byte-level tokenizer with PaliGemma's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>", "<bos>"] + ["<image>"] * image
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["fly through the gap and reach the green goal\n", "Task: State: 0 128 255;\nAction: "], trainer
    )
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", special.index("<bos>"))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    fast.save_pretrained(folder)


def write_lerobot(
    folder: Path,
    kind: str,
    *,
    tensors: dict[str, Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    stats: Mapping[str, Mapping[str, list[float]]] | None = None,
) -> dict[str, Tensor]:
    """A LeRobot checkpoint folder; returns its tensors."""
    folder.mkdir(parents=True)
    if tensors is None:
        shapes = (
            smolvla_shapes() if kind == "smolvla" else pi_shapes(pi05=kind == "pi05", root="model.", embedding="both")
        )
        tensors = draw(shapes)
        head = f"model.{PALIGEMMA}lm_head.weight"
        if head in tensors:
            # PaliGemma's are one tensor.
            tensors[head] = tensors[f"model.{PALIGEMMA}model.language_model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config if config is not None else lerobot_config(kind), indent=4))
    write_pipelines(folder, kind, statistics() if stats is None else stats)
    write_tokenizer(folder, bos=kind != "smolvla")
    (folder / "README.md").write_text("---\nlibrary_name: lerobot\n---\n")
    return tensors


def write_openpi(
    folder: Path,
    *,
    pi05: bool,
    tensors: dict[str, Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    stats: bool = True,
) -> dict[str, Tensor]:
    """An openpi PyTorch checkpoint folder, in bfloat16 with norms in single precision; returns its tensors."""
    folder.mkdir(parents=True)
    if tensors is None:
        tensors = draw(pi_shapes(pi05=pi05))
        tensors = {key: t if "norm" in key else t.to(torch.bfloat16) for key, t in tensors.items()}
    table = f"{PALIGEMMA}model.language_model.embed_tokens.weight"
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", table: f"{PALIGEMMA}lm_head.weight"})
    if config is None:
        config = {
            "action_dim": CHANNELS,
            "action_horizon": HORIZON,
            "paligemma_variant": "dummy",
            "action_expert_variant": "dummy",
            "precision": "bfloat16",
        }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if stats:
        table_of = statistics()
        # openpi's statistics may cover more channels than the robot has.
        named = {"state": table_of["observation.state"], "actions": table_of["action"]}
        padded = {kind: {name: [*values, 0.0, 0.0] for name, values in e.items()} for kind, e in named.items()}
        path = folder / "assets/toy/norm_stats.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"norm_stats": padded}, indent=2))
    write_tokenizer(folder)
    return tensors


# --- what the networks compute


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Channel i of a head turns against channel i + half, by position / 10000^(2i / size): complex numbers."""
    half = x.shape[-1] // 2
    frequency = 1e4 ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), positions.double()[:, :, None, None] * frequency)
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * turn
    return torch.cat([turned.real, turned.imag], dim=-1).float()


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Softmax attention of [B L n e] heads; query heads share key heads in groups. ``allowed`` is [B L keys]."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("blne,bsne->bnls", q, k) / math.sqrt(q.shape[-1])
    weight = scores.masked_fill(~allowed[:, None], -torch.inf).softmax(dim=-1)
    return torch.einsum("bnls,bsne->blne", weight, v).flatten(2)


def see(w: Callable[[str], Tensor], root: str, pixels: Tensor, heads: int, eps: float = 1e-6) -> Tensor:
    """A SigLIP tower: patches, positions, pre-norm blocks, one norm."""

    def affine(x: Tensor, name: str) -> Tensor:
        return x @ w(f"{name}.weight").T + w(f"{name}.bias")

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w(f"{name}.weight"), w(f"{name}.bias"), eps)

    patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)
    x = patches @ w(f"{root}embeddings.patch_embedding.weight").flatten(1).T
    x = x + w(f"{root}embeddings.patch_embedding.bias") + w(f"{root}embeddings.position_embedding.weight")
    everything = torch.ones(len(x), x.shape[1], x.shape[1], dtype=torch.bool)
    for i in range(2):
        layer = f"{root}encoder.layers.{i}."
        h = norm(x, f"{layer}layer_norm1")
        q, k, v = (affine(h, f"{layer}self_attn.{n}_proj").unflatten(-1, (heads, -1)) for n in "qkv")
        x = x + affine(attend(q, k, v, everything), f"{layer}self_attn.out_proj")
        h = affine(norm(x, f"{layer}layer_norm2"), f"{layer}mlp.fc1")
        x = x + affine(F.gelu(h, approximate="tanh"), f"{layer}mlp.fc2")
    return norm(x, f"{root}post_layernorm")


def time_features(tau: Tensor, size: int) -> Tensor:
    period = np.geomspace(4e-3, 4.0, size // 2)
    angle = torch.from_numpy(2 * np.pi * tau.numpy().astype(np.float64)[:, None] / period)
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def unit(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()


def blocks_allowed(valid: Tensor, block: Tensor) -> Tensor:
    """[B L L]: a token reads valid tokens of its own block and of earlier ones."""
    return (block[None, :] <= block[:, None])[None] & valid[:, None]


def pi_velocity(
    tensors: Mapping[str, Tensor],
    pixels: Tensor,
    ids: Tensor,
    text_valid: Tensor,
    state: Tensor | None,
    sample: Tensor,
    tau: Tensor,
) -> Tensor:
    """pi0, or pi0.5 where ``state`` is None; pixels [B V 3 32 32] in [-1, 1]."""
    named = {key.removeprefix("model.paligemma").removeprefix("model."): t.float() for key, t in tensors.items()}
    named = {("paligemma" + k if k.startswith("_with") else k): t for k, t in named.items()}
    w = {key.replace("vision_tower.vision_model.", "vision_tower."): t for key, t in named.items()}.__getitem__
    rows = len(pixels)

    def affine(x: Tensor, name: str) -> Tensor:
        return x @ w(f"{name}.weight").T + w(f"{name}.bias")

    seen = see(w, f"{PALIGEMMA}model.vision_tower.", pixels.flatten(0, 1), heads=1)
    seen = affine(seen, f"{PALIGEMMA}model.multi_modal_projector.linear").reshape(rows, -1, 64)
    text = w(f"{PALIGEMMA}lm_head.weight")[ids] * 8.0  # sqrt(64)
    prefix = torch.cat([seen, text], dim=1)
    time = time_features(tau, 64)
    action = affine(sample, "action_in_proj")
    condition = None
    if state is None:
        condition = F.silu(affine(F.silu(affine(time, "time_mlp_in")), "time_mlp_out"))
        suffix, suffix_block = action, torch.ones(HORIZON)
    else:
        fused = torch.cat([action, time[:, None].expand(-1, HORIZON, -1)], dim=-1)
        action = affine(F.silu(affine(fused, "action_time_mlp_in")), "action_time_mlp_out")
        padded = F.pad(state, (0, STATE - state.shape[1]))
        suffix = torch.cat([affine(padded, "state_proj")[:, None], action], dim=1)
        suffix_block = torch.cat([torch.ones(1), torch.full((HORIZON,), 2.0)])
    valid = torch.cat([torch.ones(seen.shape[:2], dtype=torch.bool), text_valid], dim=1)
    valid = torch.cat([valid, torch.ones(suffix.shape[:2], dtype=torch.bool)], dim=1)
    allowed = blocks_allowed(valid, torch.cat([torch.zeros(prefix.shape[1]), suffix_block]))
    positions = valid.cumsum(dim=1) - 1
    x = [prefix, suffix]
    roots = (f"{PALIGEMMA}model.language_model.", f"{EXPERT}model.")

    def norm(h: Tensor, name: str, adaptive: bool) -> tuple[Tensor, Tensor | float]:
        if not adaptive:
            return unit(h, 1e-6) * (1 + w(f"{name}.weight")), 1.0
        assert condition is not None
        scale, shift, gate = affine(condition, f"{name}.dense")[:, None].split(64, dim=-1)
        return unit(h, 1e-6) * (1 + scale) + shift, gate

    for i in range(4):
        layers = [f"{root}layers.{i}." for root in roots]
        adapt = (False, condition is not None)
        normed = [norm(h, f"{n}input_layernorm", a) for h, n, a in zip(x, layers, adapt, strict=True)]
        q, k, v = (
            torch.cat(
                [(h @ w(f"{n}self_attn.{p}_proj.weight").T) for (h, _), n in zip(normed, layers, strict=True)], dim=1
            ).unflatten(-1, (-1, 16))
            for p in "qkv"
        )
        mixed = attend(rotate(q, positions), rotate(k, positions), v, allowed).split([h.shape[1] for h in x], dim=1)
        for part, (name, adaptive) in enumerate(zip(layers, adapt, strict=True)):
            h = x[part] + (mixed[part] @ w(f"{name}self_attn.o_proj.weight").T) * normed[part][1]
            y, gate = norm(h, f"{name}post_attention_layernorm", adaptive)
            y = F.gelu(y @ w(f"{name}mlp.gate_proj.weight").T, approximate="tanh") * (
                y @ w(f"{name}mlp.up_proj.weight").T
            )
            x[part] = h + (y @ w(f"{name}mlp.down_proj.weight").T) * gate
    out, _ = norm(x[1], f"{EXPERT}model.norm", condition is not None)
    return affine(out[:, -HORIZON:], "action_out_proj")


def smolvla_velocity(
    tensors: Mapping[str, Tensor],
    pixels: Tensor,
    ids: Tensor,
    text_valid: Tensor,
    state: Tensor,
    sample: Tensor,
    tau: Tensor,
) -> Tensor:
    """SmolVLA; pixels [B V 3 32 32] in [-1, 1]."""
    w = {key.removeprefix("model."): t.float() for key, t in tensors.items()}.__getitem__
    rows = len(pixels)
    vlm, expert = "vlm_with_expert.vlm.model.", "vlm_with_expert.lm_expert."

    def affine(x: Tensor, name: str) -> Tensor:
        return x @ w(f"{name}.weight").T + w(f"{name}.bias")

    def project(x: Tensor, name: str) -> Tensor:
        return (x @ w(f"{name}.weight").T).unflatten(-1, (-1, 64))

    seen = see(w, f"{vlm}vision_model.", pixels.flatten(0, 1), heads=1).unflatten(1, (SIDE, SIDE))
    # Two by two patches to a token: rows of patches first, columns inside.
    merged = torch.cat([seen[:, y::2, x::2] for y in (0, 1) for x in (0, 1)], dim=-1).flatten(1, 2)
    merged = merged @ w(f"{vlm}connector.modality_projection.proj.weight").T
    seen = merged.reshape(rows, -1, 128) * math.sqrt(128)
    text = w(f"{vlm}text_model.embed_tokens.weight")[ids] * math.sqrt(128)
    token = affine(F.pad(state, (0, STATE - state.shape[1])), "state_proj")[:, None]
    prefix = torch.cat([seen, text, token], dim=1)
    action = affine(sample, "action_in_proj")
    fused = torch.cat([action, time_features(tau, 96)[:, None].expand(-1, HORIZON, -1)], dim=-1)
    suffix = affine(F.silu(affine(fused, "action_time_mlp_in")), "action_time_mlp_out")
    yes = torch.ones(rows, 1, dtype=torch.bool)
    before = torch.cat([yes.expand(-1, seen.shape[1]), text_valid, yes], dim=1)
    valid = torch.cat([before, yes.expand(-1, HORIZON)], dim=1)
    block = torch.cat([torch.zeros(prefix.shape[1] - 1), torch.arange(1.0, HORIZON + 2)])
    allowed, positions, split = blocks_allowed(valid, block), valid.cumsum(dim=1) - 1, prefix.shape[1]
    own = torch.arange(HORIZON).expand(rows, -1)
    x = [prefix, suffix]
    for i in range(3):
        layers = [f"{vlm}text_model.layers.{i}.", f"{expert}layers.{i}."]
        h = [unit(y, 1e-5) * w(f"{n}input_layernorm.weight") for y, n in zip(x, layers, strict=True)]
        q, k, v = (project(h[0], f"{layers[0]}self_attn.{p}_proj") for p in "qkv")
        k = rotate(k, positions[:, :split])
        first = attend(rotate(q, positions[:, :split]), k, v, allowed[:, :split, :split])
        q2 = project(h[1], f"{layers[1]}self_attn.q_proj")
        if i % 2:
            k2 = project(k.flatten(2), f"{layers[1]}self_attn.k_proj")
            v2 = project(v.flatten(2), f"{layers[1]}self_attn.v_proj")
            second = attend(rotate(q2, own), k2, v2, allowed[:, split:, :split])
        else:
            k2 = rotate(project(h[1], f"{layers[1]}self_attn.k_proj"), positions[:, split:])
            v2 = project(h[1], f"{layers[1]}self_attn.v_proj")
            both = torch.cat([k, k2], dim=1), torch.cat([v, v2], dim=1)
            second = attend(rotate(q2, positions[:, split:]), *both, allowed[:, split:])
        for part, (name, mixed) in enumerate(zip(layers, (first, second), strict=True)):
            y = x[part] + mixed @ w(f"{name}self_attn.o_proj.weight").T
            z = unit(y, 1e-5) * w(f"{name}post_attention_layernorm.weight")
            z = F.silu(z @ w(f"{name}mlp.gate_proj.weight").T) * (z @ w(f"{name}mlp.up_proj.weight").T)
            x[part] = y + z @ w(f"{name}mlp.down_proj.weight").T
    return affine(unit(x[1], 1e-5) * w(f"{expert}norm.weight"), "action_out_proj")
