"""Checkpoints in the layout that starVLA writes, at tiny sizes, and what their heads compute.

Written from starVLA's public configurations and its heads' equations, without the importer: lists of keys and shapes,
and heads in plain matrix products, one row at a time, that read the checkpoint's own keys.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INNER = 64, 3, 2, 1, 32, 96
VISION, DEPTH, PATCH, POSITIONS = 32, 2, 8, 16
DEEP = (0,)
"""Of the VLM; DEEP are the vision layers that feed text layers too."""
WIDTH, BLOCKS, DIT_HEADS, DECODER, OUTPUT, FUTURE, LENGTH = 32, 4, 2, 24, 20, 3, 12
"""Of QwenGR00T's head."""
HORIZON, ACTIONS, STATES, STEPS = 8, 2, 5, 4
"""HORIZON is longer than the suite's chunk of 6. ACTIONS and STATES are the toy suite's."""
COT = "Your task is {instruction}. Locate their bounding boxes in [x1,y1,x2,y2] format."
QUERY = "\N{LEFT-POINTING MAGNIFYING GLASS}"
WHERE = "checkpoints/steps_50000_pytorch_model.pt"
MODEL = "qwen_vl_interface.model."

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def vlm_shapes(vocabulary: int) -> Shapes:
    """Qwen3VLForConditionalGeneration under the names of transformers 4.57 and 5."""
    text, eye = f"{MODEL}model.language_model.", f"{MODEL}model.visual."
    shapes: Shapes = {f"{text}embed_tokens.weight": (vocabulary, HIDDEN), f"{text}norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        layer = f"{text}layers.{i}."
        shapes |= {
            f"{layer}self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"{layer}self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{layer}self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{layer}self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"{layer}self_attn.q_norm.weight": (HEAD_DIM,),
            f"{layer}self_attn.k_norm.weight": (HEAD_DIM,),
            f"{layer}mlp.gate_proj.weight": (INNER, HIDDEN),
            f"{layer}mlp.up_proj.weight": (INNER, HIDDEN),
            f"{layer}mlp.down_proj.weight": (HIDDEN, INNER),
            f"{layer}input_layernorm.weight": (HIDDEN,),
            f"{layer}post_attention_layernorm.weight": (HIDDEN,),
        }
    shapes |= {f"{eye}patch_embed.proj.weight": (VISION, 3, 2, PATCH, PATCH), f"{eye}patch_embed.proj.bias": (VISION,)}
    shapes[f"{eye}pos_embed.weight"] = (POSITIONS, VISION)
    for i in range(DEPTH):
        block = f"{eye}blocks.{i}."
        shapes |= norm(f"{block}norm1", VISION) | norm(f"{block}norm2", VISION)
        shapes |= linear(f"{block}attn.qkv", VISION, 3 * VISION) | linear(f"{block}attn.proj", VISION, VISION)
        shapes |= linear(f"{block}mlp.linear_fc1", VISION, 48) | linear(f"{block}mlp.linear_fc2", 48, VISION)
    mergers = {f"{eye}merger.": VISION} | {f"{eye}deepstack_merger_list.{i}.": 4 * VISION for i in range(len(DEEP))}
    for merger, size in mergers.items():
        shapes |= norm(f"{merger}norm", size)
        shapes |= linear(f"{merger}linear_fc1", 4 * VISION, 4 * VISION)
        shapes |= linear(f"{merger}linear_fc2", 4 * VISION, HIDDEN)
    shapes[f"{MODEL}lm_head.weight"] = (vocabulary, HIDDEN)
    return shapes


def flow_head_shapes(*, width: int, context: Sequence[int], output: int, decoder_in: int, state: int | None) -> Shapes:
    """FlowmatchingActionHead and LayerwiseFlowmatchingActionHead.

    Args:
        context: of each block, the size of what its keys are read from.
        output: of the DiT's last layer.
        state: channels; None has no state encoder.
    """
    head = "action_model."
    shapes = linear(f"{head}action_encoder.layer1", ACTIONS, width)
    shapes |= linear(f"{head}action_encoder.layer2", 2 * width, width)
    shapes |= linear(f"{head}action_encoder.layer3", width, width)
    shapes |= linear(f"{head}action_decoder.layer1", decoder_in, DECODER)
    shapes |= linear(f"{head}action_decoder.layer2", DECODER, ACTIONS)
    if state is not None:
        shapes |= linear(f"{head}state_encoder.layer1", state, DECODER)
        shapes |= linear(f"{head}state_encoder.layer2", DECODER, width)
    shapes |= {f"{head}future_tokens.weight": (FUTURE, width), f"{head}position_embedding.weight": (LENGTH, width)}
    embedder = f"{head}model.timestep_encoder.timestep_embedder."
    shapes |= linear(f"{embedder}linear_1", 256, width) | linear(f"{embedder}linear_2", width, width)
    for i, source in enumerate(context):
        block = f"{head}model.transformer_blocks.{i}."
        shapes |= linear(f"{block}norm1.linear", width, 2 * width)
        shapes |= linear(f"{block}attn1.to_q", width, width) | linear(f"{block}attn1.to_out.0", width, width)
        shapes |= linear(f"{block}attn1.to_k", source, width) | linear(f"{block}attn1.to_v", source, width)
        shapes |= linear(f"{block}ff.net.0.proj", width, 4 * width) | linear(f"{block}ff.net.2", 4 * width, width)
    shapes |= linear(f"{head}model.proj_out_1", width, 2 * width)
    return shapes | linear(f"{head}model.proj_out_2", width, output)


def regression_head_shapes(size: int = HIDDEN) -> Shapes:
    """L1RegressionActionHead: an MLPResNet of two blocks, twice as wide as the VLM."""
    net, width = "action_model.model.", 2 * size
    shapes = norm(f"{net}layer_norm1", size) | linear(f"{net}fc1", size, width)
    for i in range(2):
        block = f"{net}mlp_resnet_blocks.{i}.ffn."
        shapes |= norm(f"{block}0", width) | linear(f"{block}1", width, width)
    return shapes | norm(f"{net}layer_norm2", width) | linear(f"{net}fc2", width, ACTIONS)


def head_shapes(kind: str, *, state: int | None = STATES) -> Shapes:
    if kind == "QwenOFT":
        return regression_head_shapes()
    if kind == "QwenPI":
        return flow_head_shapes(width=HIDDEN, context=[HIDDEN] * LAYERS, output=OUTPUT, decoder_in=HIDDEN, state=state)
    context = [HIDDEN if i % 2 == 0 else WIDTH for i in range(BLOCKS)]
    return flow_head_shapes(width=WIDTH, context=context, output=OUTPUT, decoder_in=OUTPUT, state=state)


def draw(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Weights that neither vanish nor blow up; the VLM's in bfloat16, as starVLA loads it, the head's in single."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in shapes.items():
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
        value = torch.randn(shape, generator=generator) * (fan_in**-0.5 if len(shape) > 1 else 0.2)
        if key.endswith(("norm.weight", "norm1.weight", "norm2.weight", "layernorm.weight")):
            value = 1 + value
        tensors[key] = value.to(torch.bfloat16) if key.startswith(MODEL) else value
    tensors[f"{MODEL}lm_head.weight"] = tensors[f"{MODEL}model.language_model.embed_tokens.weight"]
    return tensors


def configuration(kind: str, **changes: Any) -> dict[str, Any]:
    """config.yaml: the public one for SimplerEnv and LIBERO, with tiny sizes.

    Args:
        changes: by dotted path.
    """
    config: dict[str, Any] = {
        "run_id": "tiny",
        "framework": {
            "name": kind,
            "qwenvl": {"base_vlm": "./playground/Pretrained_models/Qwen3-VL-4B-Instruct", "vl_hidden_dim": HIDDEN},
            "action_model": {
                "action_model_type": "DiT-B",
                "hidden_size": DECODER,
                "add_pos_embed": True,
                "max_seq_len": LENGTH,
                "action_dim": ACTIONS,
                "state_dim": STATES,
                "future_action_window_size": HORIZON - 1,
                "action_horizon": HORIZON,
                "past_action_window_size": 0,
                "num_timestep_buckets": 1000,
                "num_inference_timesteps": STEPS,
                "num_target_vision_tokens": FUTURE,
                "diffusion_model_cfg": {
                    "attention_head_dim": WIDTH // DIT_HEADS,
                    "cross_attention_dim": HIDDEN,
                    "dropout": 0.2,
                    "final_dropout": True,
                    "interleave_self_attention": True,
                    "norm_type": "ada_norm",
                    "num_layers": BLOCKS,
                    "output_dim": OUTPUT,
                    "positional_embeddings": None,
                    "use_canonical_forward": True,
                },
            },
        },
        "datasets": {"vla_data": {"data_mix": "toy_mix", "CoT_prompt": COT, "image_size": [32, 32]}},
        "trainer": {"max_train_steps": 100000},
    }
    for path, value in changes.items():
        *above, last = path.split(".")
        place = config
        for key in above:
            place = place[key]
        if value is ...:
            place.pop(last, None)
        else:
            place[last] = value
    return config


def statistics(robot: str = "toy_robot") -> dict[str, Any]:
    """dataset_statistics.json."""
    action = {
        "mean": [0.1, -0.2],
        "std": [0.4, 0.6],
        "min": [-0.9, -0.8],
        "max": [0.7, 1.0],
        "q01": [-0.6, -0.5],
        "q99": [0.4, 0.9],
        "mask": [True, True],
    }
    state = {
        "mean": [0.0] * STATES,
        "std": [1.0] * STATES,
        "min": [-2.0, -1.5, -1.0, -2.5, -3.0],
        "max": [2.0, 1.0, 3.0, 2.5, 1.0],
        "q01": [-1.0] * STATES,
        "q99": [1.5] * STATES,
    }
    return {robot: {"action": action, "state": state, "num_transitions": 100, "num_trajectories": 5}}


def write_vlm(folder: Path, *, image: bool = True, fewest: int = 32 * 32, **changes: Any) -> int:
    """The base VLM's folder without weights, as its publisher fills it. Returns the size of its vocabulary.

    Args:
        image: False leaves the image token out of the tokenizer.
        fewest: pixels below which the processor enlarges an image.
        changes: of config.json.
    """
    from rlvla.policies.processor import train_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(["Your task is reach the green goal. Please predict the next robot actions: "], 300)
    # One token in Qwen's vocabulary.
    tokenizer.add_tokens([QUERY])
    tokenizer.save_pretrained(folder)
    if not image:
        path = folder / "tokenizer.json"
        path.write_text(path.read_text().replace("<|image_pad|>", "<|other|>"))
        path = folder / "tokenizer_config.json"
        path.write_text(path.read_text().replace("<|image_pad|>", "<|other|>"))
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "vision_start", "vision_end")}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-06,
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_theta": 5000000,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"},
    }
    vision = {
        "depth": DEPTH,
        "hidden_size": VISION,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": PATCH,
        "num_position_embeddings": POSITIONS,
        "deepstack_visual_indexes": list(DEEP),
        "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3,
        "out_hidden_size": HIDDEN,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": ids["image_pad"],
        "vision_start_token_id": ids["vision_start"],
        "vision_end_token_id": ids["vision_end"],
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    processor = {
        "size": {"longest_edge": 16777216, "shortest_edge": fewest},
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return len(tokenizer)


def write_run(
    folder: Path,
    kind: str,
    vocabulary: int,
    *,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    stats: Mapping[str, Any] | None = None,
    where: str = WHERE,
) -> dict[str, Tensor]:
    """A run's folder; returns its tensors."""
    written = dict(draw(vlm_shapes(vocabulary) | head_shapes(kind)) if tensors is None else tensors)
    path = folder / where
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt":
        torch.save(written, path)
    else:
        save_file({key: tensor.clone() for key, tensor in written.items()}, path, metadata={"format": "pt"})
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(configuration(kind) if config is None else config)))
    table = statistics() if stats is None else stats
    if table:
        (folder / "dataset_statistics.json").write_text(json.dumps(table, indent=2))
    return written


# --- the heads


class Head:
    """The parts of both flow heads, for one row, from the checkpoint's keys."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = {key.removeprefix("action_model."): t.float() for key, t in tensors.items()}

    def linear(self, name: str, y: Tensor) -> Tensor:
        return y @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]

    def two_layers(self, name: str, y: Tensor) -> Tensor:
        return self.linear(f"{name}.layer2", self.linear(f"{name}.layer1", y).clamp(min=0))

    def time(self, bucket: float) -> Tensor:
        angles = torch.tensor([bucket * 10000 ** (-i / 127) for i in range(128)])
        embedder = "model.timestep_encoder.timestep_embedder."
        first = self.linear(f"{embedder}linear_1", torch.cat([angles.cos(), angles.sin()]))
        return self.linear(f"{embedder}linear_2", silu(first))

    def sequence(self, sample: Tensor, bucket: float, state: Tensor | None) -> Tensor:
        half = self.tensors["action_encoder.layer3.bias"].numel() // 2
        angles = torch.tensor([bucket * 10000 ** (-i / half) for i in range(half)])
        time = torch.cat([angles.sin(), angles.cos()])
        action = self.linear("action_encoder.layer1", sample)
        both = torch.cat([action, time.expand(len(action), -1)], dim=-1)
        action = self.linear("action_encoder.layer3", silu(self.linear("action_encoder.layer2", both)))
        action = action + self.tensors["position_embedding.weight"][: len(action)]
        first = [] if state is None else [self.two_layers("state_encoder", state)[None]]
        return torch.cat([*first, self.tensors["future_tokens.weight"], action])

    def block(self, i: int, x: Tensor, source: Tensor | None, time: Tensor, num_heads: int) -> Tensor:
        """``source`` is what keys and values are read from; None is the sequence itself."""
        name = f"model.transformer_blocks.{i}"
        scale, shift = self.linear(f"{name}.norm1.linear", silu(time)).chunk(2)
        h = unit(x, 1e-5) * (1 + scale) + shift
        source = h if source is None else source
        q, k, v = (self.linear(f"{name}.attn1.to_{n}", y) for n, y in (("q", h), ("k", source), ("v", source)))
        size = x.shape[-1] // num_heads
        parts = [slice(j * size, (j + 1) * size) for j in range(num_heads)]
        heads = [(q[:, p] @ k[:, p].T / math.sqrt(size)).softmax(-1) @ v[:, p] for p in parts]
        x = x + self.linear(f"{name}.attn1.to_out.0", torch.cat(heads, dim=-1))
        inner = gelu(self.linear(f"{name}.ff.net.0.proj", unit(x, 1e-5)))
        return x + self.linear(f"{name}.ff.net.2", inner)


def gr00t_velocity(
    tensors: Mapping[str, Tensor], hidden: Tensor, sample: Tensor, bucket: float, state: Tensor | None
) -> Tensor:
    """action - noise of one row [H K], of QwenGR00T: ``hidden`` [S D] are the VLM's last states."""
    head = Head(tensors)
    time, x = head.time(bucket), head.sequence(sample, bucket, state)
    for i in range(BLOCKS):
        x = head.block(i, x, hidden if i % 2 == 0 else None, time, DIT_HEADS)
    shift, scale = head.linear("model.proj_out_1", silu(time)).chunk(2)
    out = head.linear("model.proj_out_2", unit(x, 1e-6) * (1 + scale) + shift)
    return head.two_layers("action_decoder", out)[-len(sample) :]


def pi_velocity(
    tensors: Mapping[str, Tensor],
    layers: Sequence[Tensor],
    sample: Tensor,
    bucket: float,
    state: Tensor | None,
    *,
    interleaved: bool = True,
) -> Tensor:
    """action - noise of one row [H K], of QwenPI: ``layers`` are the VLM's states [S D] from the embeddings on."""
    head = Head(tensors)
    time, x = head.time(bucket), head.sequence(sample, bucket, state)
    for i, states in enumerate(layers[-LAYERS:]):
        x = head.block(i, x, None if interleaved and i % 2 else states, time, HIDDEN // (WIDTH // DIT_HEADS))
    return head.two_layers("action_decoder", x)[-len(sample) :]


def oft_actions(tensors: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """The chunk [H K] of QwenOFT: ``hidden`` [H D] are the queries' last states."""
    w = {key.removeprefix("action_model.model."): t.float() for key, t in tensors.items()}

    def affine(name: str, y: Tensor) -> Tensor:
        return y @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def scaled(name: str, y: Tensor) -> Tensor:
        return unit(y, 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = affine("fc1", scaled("layer_norm1", hidden)).clamp(min=0)
    for i in range(2):
        block = f"mlp_resnet_blocks.{i}.ffn"
        x = x + affine(f"{block}.1", scaled(f"{block}.0", x)).clamp(min=0)
    return affine("fc2", scaled("layer_norm2", x))


def unit(y: Tensor, eps: float) -> Tensor:
    centred = y - y.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()


def gelu(y: Tensor) -> Tensor:
    return 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))


def silu(y: Tensor) -> Tensor:
    return y / (1 + (-y).exp())


KINDS = ("QwenGR00T", "QwenOFT", "QwenPI")
VELOCITY = {
    "QwenGR00T": lambda tensors, layers, *rest: gr00t_velocity(tensors, layers[-1], *rest),
    "QwenPI": pi_velocity,
}
"""action - noise of one row: of the tensors, the VLM's hidden states from the embeddings on, sample, bucket, state."""
