"""Where an imported policy came from, kept in its folder so that export can write it back exactly.

Everything is held in memory once the folder is read: a run of days must not end with an origin that was tidied away.
Tensors are mapped from the file, so those that nobody reads take no memory.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

FOLDER = "origin"
"""Inside a policy folder."""


@dataclass(frozen=True)
class Place:
    """Where one tensor of the original checkpoint went."""

    name: str | None
    """Of a tensor of the policy; None for one that acting does not use, which is kept as it was."""
    dtype: str
    """In the original, for example "bfloat16"."""


@dataclass(frozen=True)
class Origin:
    """An imported checkpoint, less the tensors that live on in the policy."""

    format: str
    key_map: int
    """Version of the rules that placed its tensors."""
    weights: str
    """Name of the weights file in the checkpoint."""
    places: Mapping[str, Place]
    """By key of the original."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Of the weights file's header."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Its other files, by relative path: configuration, statistics, tokenizer."""
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that acting does not use, such as language-model heads."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Origin":
        # Constant, and large: a second copy of the policy shares it.
        return self

    def save(self, folder: Path) -> None:
        """Write it to a folder that does not exist yet."""
        from safetensors.torch import save_file

        folder.mkdir()
        content = {
            "format": self.format,
            "key_map": self.key_map,
            "weights": self.weights,
            "metadata": dict(self.metadata),
            # A table that somebody has shortened would export a checkpoint with holes.
            "num_tensors": len(self.places),
            "tensors": {key: [place.name, place.dtype] for key, place in self.places.items()},
        }
        (folder / "origin.json").write_text(json.dumps(content, indent=1) + "\n")
        for name, data in self.files.items():
            path = folder / "files" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        if self.kept:
            save_file({key: tensor.contiguous() for key, tensor in self.kept.items()}, folder / "kept.safetensors")

    @staticmethod
    def load(folder: Path) -> "Origin":
        """Read it again.

        Raises:
            ValueError: damaged; the message names the folder.
        """
        from safetensors.torch import load_file

        try:
            content = json.loads((folder / "origin.json").read_text())
            places = {key: Place(*entry) for key, entry in content["tensors"].items()}
            root = folder / "files"
            files = {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
            kept = load_file(folder / "kept.safetensors") if (folder / "kept.safetensors").is_file() else {}
            _check(content, places)
            unkept = [key for key, place in places.items() if place.name is None and key not in kept]
            if unkept:
                raise KeyError(f"kept.safetensors lacks {', '.join(unkept[:3])}")
            origin = Origin(
                content["format"],
                int(content["key_map"]),
                content["weights"],
                places,
                content["metadata"],
                files,
                kept,
            )
        except Exception as error:
            raise ValueError(
                f"{folder} is damaged: {type(error).__name__}: {error}. Copy the policy folder again, or import the "
                "checkpoint again."
            ) from error
        return origin


def _check(content: Mapping[str, Any], places: Mapping[str, Place]) -> None:
    """What export relies on: a policy folder may be somebody else's.

    Raises:
        ValueError: the weights file would lie outside the exported folder, or the table of tensors is none.
    """
    weights = PurePosixPath(content["weights"])
    if weights.is_absolute() or ".." in weights.parts or not weights.name:
        raise ValueError(f"origin.json names the weights file {content['weights']!r}, which is not inside a checkpoint")
    if content.get("num_tensors", len(places)) != len(places):
        raise ValueError(f"origin.json has {len(places)} tensors; it was written with {content['num_tensors']}")
    for key, place in places.items():
        if not isinstance(getattr(torch, str(place.dtype), None), torch.dtype):
            raise ValueError(f"origin.json says that {key} has the precision {place.dtype!r}, which does not exist")
        if not isinstance(place.name, str | None):
            raise ValueError(f"origin.json says that {key} is {place.name!r}, which is no name")
