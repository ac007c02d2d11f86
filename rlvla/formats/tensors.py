"""Weights of a foreign checkpoint: read without running anything, and every tensor put in its place.

safetensors, or a PyTorch file of plain tensors read with ``weights_only=True``. A pickle that runs code is refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlvla.policies.origin import Place

SHOWN = 5
"""Names in an error; the others are counted."""


class Weights(NamedTuple):
    """What a weights file holds."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read_weights(path: Path) -> Weights:
    """Read a safetensors file, or a PyTorch file that is a mapping of names to tensors.

    Raises:
        ValueError: not there, damaged, or a pickle with more than tensors in it.
    """
    index = path.with_name(f"{path.name}.index.json")
    if not path.is_file() and index.is_file():
        raise ValueError(
            f"{path.parent} has its weights in several files ({index.name}); a single {path.name} is needed, as the "
            "format's own tools write it. Load the checkpoint there and save it unsharded (max_shard_size)."
        )
    if not path.is_file():
        raise ValueError(f"there is no weights file at {path}.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _read_torch(path)


def _read_safetensors(path: Path) -> Weights:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
        return Weights(path, load_file(path), metadata)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is no safetensors file, or a damaged one: {error}. Copy it again. A pickle under that name is not "
            "read: it could run code."
        ) from error


def _read_torch(path: Path) -> Weights:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for one fact
        raise ValueError(
            f"{path} holds more than tensors, or is damaged ({type(error).__name__}). It is read with "
            "weights_only=True: other pickles can run code. Save its state dict as safetensors where it was made."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        kind = type(content).__name__
        raise ValueError(
            f"{path} is a {kind} that is not only names and tensors. Save its state dict alone, as safetensors."
        )
    return Weights(path, content, {})


@dataclass(frozen=True)
class KeyMap:
    """How a checkpoint's keys become ours: prefixes in order, the first that fits."""

    version: int
    renames: tuple[tuple[str, str], ...]
    """(theirs, ours)."""
    kept: frozenset[str] = frozenset()
    """Keys of theirs that acting does not use. They are kept aside for export."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Keys of theirs that may be a second name of a tensor of ours, or another of the same shape."""
    kept_like: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of kept keys, where they are known."""
    own: frozenset[str] = frozenset()
    """Tensors of ours that no checkpoint has. They keep their initial values and are not exported."""

    def ours(self, key: str) -> str | None:
        for theirs, ours in self.renames:
            if key.startswith(theirs):
                return ours + key[len(theirs) :]
        return None

    def theirs(self, name: str) -> str:
        """The key that an importable checkpoint would have."""
        for theirs, ours in self.renames:
            if name.startswith(ours):
                return theirs + name[len(ours) :]
        return name


def shape_of(weights: Weights, key: str, axes: int, what: str) -> tuple[int, ...]:
    """The shape of a tensor that sizes are read from.

    Args:
        what: whose checkpoint it should be.

    Raises:
        ValueError: it is not there, or has another number of axes.
    """
    if key not in weights.tensors or weights.tensors[key].ndim != axes:
        raise ValueError(
            f"{weights.path} lacks the tensor {key} of {axes} axes, which the sizes are read from. Is it a checkpoint "
            f"of {what}?"
        )
    return tuple(weights.tensors[key].shape)


def count_layers(weights: Weights, prefix: str) -> int:
    """How many numbers follow a prefix such as "model.layers.". That none is missing at the end, only a configuration
    can tell."""
    return len({key[len(prefix) :].split(".")[0] for key in weights.tensors if key.startswith(prefix)})


def place(weights: Weights, policy: nn.Module, key_map: KeyMap) -> tuple[dict[str, Place], dict[str, Tensor]]:
    """Load every tensor into a policy.

    Returns:
        Where each went, and those that are kept aside.

    Raises:
        ValueError: a tensor without a home, a parameter without a tensor, or another shape; the message has the lists.
    """
    expected = policy.state_dict()
    found: dict[str, str] = {}
    places: dict[str, Place] = {}
    kept: dict[str, Tensor] = {}
    homeless: list[str] = []
    misshapen: list[str] = []
    for key in sorted(weights.tensors, key=lambda key: key in key_map.tied):
        tensor = weights.tensors[key]
        name: str | None = key_map.ours(key)
        if key in key_map.tied:
            first = found.get(key_map.tied[key])
            tie = first is None or torch.equal(weights.tensors[first], tensor)
            name = key_map.tied[key] if tie else None
        elif key in key_map.kept:
            name = None
        elif name not in expected:
            homeless.append(f"{key} {tuple(tensor.shape)}")
            continue
        if name is None:
            shape = key_map.kept_like.get(key)
            if key in key_map.tied and key_map.tied[key] in expected:
                shape = tuple(expected[key_map.tied[key]].shape)
            if shape is not None and tuple(tensor.shape) != shape:
                misshapen.append(f"{key} {tuple(tensor.shape)} instead of {shape}")
            kept[key] = tensor
        else:
            found.setdefault(name, key)
        places[key] = Place(name, str(tensor.dtype).removeprefix("torch."))
    absent = [
        f"{key_map.theirs(n)} {tuple(expected[n].shape)}" for n in sorted(set(expected) - set(found) - key_map.own)
    ]
    wrong = misshapen + [
        f"{key} {tuple(weights.tensors[key].shape)} instead of {tuple(expected[name].shape)}"
        for name, key in sorted(found.items())
        if weights.tensors[key].shape != expected[name].shape
    ]
    whole = [f"{key} {tensor.dtype}" for key, tensor in weights.tensors.items() if not tensor.is_floating_point()]
    problems = [
        f"{label}: {_few(names)}"
        for label, names in (
            ("without a home", homeless),
            ("missing", absent),
            ("of another shape", wrong),
            ("of whole numbers", whole),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"{weights.path} does not fit the architecture that its configuration names; tensors {'; '.join(problems)}."
            " Nothing was written. Is it a checkpoint of another architecture, version or size?"
        )
    for name, key in found.items():
        tensor = weights.tensors[key]
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{weights.path}: {key} has values that are not finite. Copy the checkpoint again.")
        expected[name].copy_(tensor)
    return places, kept


def gather(policy: nn.Module, places: Mapping[str, Place], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `place`: the original's keys and precisions, with the policy's weights as they are now.

    Raises:
        ValueError: a place that the policy has not.
        RuntimeError: a weight that the original's precision cannot hold.
    """
    state = policy.state_dict()
    unknown = sorted({place.name for place in places.values() if place.name is not None} - set(state))
    if unknown:
        raise ValueError(
            f"the policy's origin.json names tensors that the policy lacks: {_few(unknown)}. It is damaged, or of "
            "another policy: import the checkpoint again."
        )
    tensors: dict[str, Tensor] = {}
    for key, target in places.items():
        if target.name is None:
            tensors[key] = kept[key]
            continue
        # A copy each: safetensors refuses two names of one storage.
        tensor = state[target.name].detach().cpu().to(getattr(torch, target.dtype), copy=True).contiguous()
        if not torch.isfinite(tensor).all():
            raise RuntimeError(
                f"{target.name} has values that {target.dtype}, the checkpoint's precision of {key}, cannot hold. "
                "Has the policy diverged?"
            )
        tensors[key] = tensor
    return tensors


def _few(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
