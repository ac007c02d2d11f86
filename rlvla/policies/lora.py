"""Low-rank adapters (LoRA, arXiv:2106.09685): W x becomes W x + (alpha / rank) B A x, and A and B alone are trained.

A linear layer that gets an adapter stays the module it was, under the name it had; only its class changes, and two
parameters come to it. So parameter groups, sharding units, copies and optimizers need not know. There is no dropout: a
ratio before the first step must be 1.

On disk the adapters are peft's two files, and the weights beside them are merged (`rlvla.policies.folder`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from rlvla.config import LoraConfig
from rlvla.policies.base import ChunkPolicy
from rlvla.policies.groups import check_groups

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
"""What peft puts before the name of a module."""
NEVER = {"in_proj_a", "in_proj_b", "conv1d"}
"""Decay, gate and convolution of a gated delta net: a handful of rows that scale a whole recurrence."""
PASSED_OVER = ("visual", "vision", "norm", "modulation")
"""Parts of names that the default choice passes over: the vision tower, and what normalises."""


@dataclass(frozen=True)
class Adapter:
    """What all adapters of a policy have in common."""

    rank: int
    alpha: float
    base: str
    """Where the weights beneath them came from; for whoever reads the adapter alone."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class LoraLinear(nn.Linear):
    """A linear layer with an adapter beside its weight."""

    adapter: Adapter
    lora_A: nn.Parameter  # noqa: N815 - as peft calls it
    lora_B: nn.Parameter  # noqa: N815

    def forward(self, x: Float[Tensor, "*B i"]) -> Float[Tensor, "*B o"]:
        base = F.linear(x, self.weight, self.bias)
        low = F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        return base + (self.adapter.scale * low).to(base.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.adapter.rank}"


def add_lora(policy: ChunkPolicy, config: LoraConfig, trained: Sequence[str], base: str = "") -> list[str]:
    """Give a policy the adapters of ``config``; its outputs stay the same to the bit, since B starts at 0.

    Args:
        trained: by `rlvla.policies.base.trained_groups`; adapters go to ``config.groups`` among them, or else to all
            that have layers for it. The others are trained whole.
        base: see `Adapter`.

    Returns:
        Names of the layers that got one; none where ``config.rank`` is 0.

    Raises:
        ValueError: a group that is not there or not trained, or a target that no layer has.
    """
    if config.rank == 0:
        return []
    check_groups(policy, config.groups, "lora.groups")
    idle = [name for name in config.groups if name not in trained]
    if idle:
        raise ValueError(
            f"lora.groups names {', '.join(idle)}, which is not trained; trained: {', '.join(trained)}. Take it "
            "out, or train it: train_vlm and freeze decide."
        )
    adapter = Adapter(config.rank, config.alpha, base)
    chosen = _choose(policy, config.groups or trained, config.targets, named=bool(config.groups))
    for layer in chosen.values():
        _adapt(layer, adapter)
    return list(chosen)


def describe_lora(layers: Mapping[str, LoraLinear]) -> str:
    """What `adapted` found, for a person."""
    kinds = sorted({_last(name) for name in layers})
    size = sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in layers.values())
    return f"LoRA: {len(layers)} adapters, {size / 1e6:.2f} M parameters, on {', '.join(kinds)}"


def adapted(policy: nn.Module) -> dict[str, LoraLinear]:
    """The layers with adapters, by every name they have."""
    modules = policy.named_modules(remove_duplicate=False)
    return {name: module for name, module in modules if isinstance(module, LoraLinear)}


def merge(policy: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the policy, or an average of several, as that of one without adapters: W + (alpha / rank) B A."""
    merged = dict(state)
    for name, layer in adapted(policy).items():
        low, high = merged.pop(f"{name}.lora_A"), merged.pop(f"{name}.lora_B")
        weight = merged[f"{name}.weight"]
        merged[f"{name}.weight"] = (weight + layer.adapter.scale * (high @ low)).to(weight.dtype)
    return merged


def unmerge(policy: nn.Module, merged: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Weights that `merge` made, as a state dict of the policy with adapters, to the bit.

    Subtracting B A again would not give the same bits, so the weights beneath the adapters are those that the policy
    has: it must have been loaded from where the adapters were first put on.

    Args:
        path: the adapters' file, beside the merged weights'.

    Raises:
        ValueError: no such file, a damaged one, or adapters on other layers.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read: {error}. This run trains adapters (lora.rank) and goes on from theirs; with other "
            "lora options choose another output=."
        ) from error
    own = policy.state_dict()
    weights = dict(merged)
    for name in adapted(policy):
        weights[f"{name}.weight"] = own[f"{name}.weight"]
        for part in ("lora_A", "lora_B"):
            key = f"{PREFIX}{name}.{part}.weight"
            if key in stored:
                weights[f"{name}.{part}"] = stored.pop(key)
    if stored:
        raise ValueError(
            f"{path} has adapters on {len(stored) // 2 or 1} layers that have none here, such as {min(stored)}. Give "
            "the lora options that it was made with."
        )
    return weights


def save_adapters(policy: nn.Module, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write peft's two files; nothing for a policy without adapters."""
    from safetensors.torch import save_file

    # By their own name only: what is shared would be written twice.
    layers = {name: m for name, m in policy.named_modules() if isinstance(m, LoraLinear)}
    if not layers:
        return
    tensors = {
        f"{PREFIX}{name}.{part}.weight": state[f"{name}.{part}"].detach().cpu().contiguous().clone()
        for name in layers
        for part in ("lora_A", "lora_B")
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    adapter = next(iter(layers.values())).adapter
    (folder / CONFIG).write_text(json.dumps(peft_config(adapter, list(layers)), indent=1) + "\n")


def peft_config(adapter: Adapter, layers: Sequence[str]) -> dict[str, Any]:
    """What peft's LoraConfig reads; its other fields have the defaults that we mean."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.base or None,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }


def _adapt(layer: nn.Linear, adapter: Adapter) -> None:
    """Turn a linear layer into a `LoraLinear`; its identity, its place and its hooks stay."""
    weight = layer.weight
    # An adapter in bfloat16 would lose most of its small steps to rounding.
    dtype = torch.promote_types(weight.dtype, torch.float32)
    # Drawn on the CPU: the same on every device.
    device = weight.device if weight.is_meta else torch.device("cpu")
    low = torch.empty(adapter.rank, layer.in_features, dtype=dtype, device=device)
    nn.init.kaiming_uniform_(low, a=5**0.5)
    made = cast(LoraLinear, layer)
    made.__class__ = LoraLinear
    made.adapter = adapter
    made.lora_A = nn.Parameter(low.to(weight.device))
    made.lora_B = nn.Parameter(torch.zeros(layer.out_features, adapter.rank, dtype=dtype, device=weight.device))


def _choose(policy: ChunkPolicy, groups: Sequence[str], targets: Sequence[str], *, named: bool) -> dict[str, nn.Linear]:
    """The layers of ``groups`` that get adapters, by name.

    Args:
        named: the user named the groups, so each of them must get some.

    Raises:
        ValueError: a target that no layer has or none may have, a named group without any, or none at all.
    """
    module = cast(nn.Module, policy)
    members = {id(p): group for group, parameters in policy.parameter_groups().items() for p in parameters}
    linear = {
        name: (layer, members[id(layer.weight)])
        for name, layer in module.named_modules()
        # A subclass may compute something else with its weight.
        if type(layer) is nn.Linear and members[id(layer.weight)] in groups
    }
    if targets:
        forbidden = [target for target in targets if target.rsplit(".", 1)[-1] in NEVER]
        ends = tuple(f".{target}" for target in targets)
        found = {name: pair for name, pair in linear.items() if f".{name}".endswith(ends) and _last(name) not in NEVER}
        absent = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in linear)]
        if forbidden or absent:
            raise ValueError(
                f"lora.targets names {', '.join(forbidden or absent)}, "
                f"{'which must not be adapted' if forbidden else 'which no linear layer is called'}; the layers of "
                f"{', '.join(groups)} are called {', '.join(sorted({_last(name) for name in linear} - NEVER))}."
            )
    else:
        inside = {id(part) for unit in policy.sharding_units() for part in unit.modules()}
        found = {
            name: (layer, group)
            for name, (layer, group) in linear.items()
            if id(layer) in inside and _last(name) not in NEVER and not any(part in name for part in PASSED_OVER)
        }
    bare = [group for group in groups if group not in {group for _, group in found.values()}]
    if bare and (named or not found):
        raise ValueError(
            f"no layer of {', '.join(bare)} would get an adapter, so nothing in it would be trained. Name layers in "
            f"lora.targets, or leave {', '.join(bare)} out of lora.groups, and it is trained whole."
        )
    return {name: layer for name, (layer, _) in found.items()}


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]
