"""`rlvla export POLICY`: an imported policy goes back into the format it came from."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from rlvla.config import ExportConfig
from rlvla.formats.base import FORMATS
from rlvla.formats.tensors import gather
from rlvla.policies.exploration import has_latent
from rlvla.policies.folder import load_policy


def run(config: ExportConfig) -> dict[str, Any]:
    """Write ``config.policy`` to ``config.output`` with its original keys, precisions and files.

    Raises:
        ValueError: not a policy folder, one that was not imported, or an output that exists.
        RuntimeError: the disk is full or not writable; nothing half-written is left.
    """
    from safetensors.torch import save_file

    folder, output = Path(config.policy), Path(config.output)
    if output.exists():
        raise ValueError(f"{output} exists already. Choose another output=, or remove it.")
    policy = load_policy(folder)
    if has_latent(policy):
        raise ValueError(
            f"{folder} draws its initial noise from a head that `rlvla train` learned (algo.sampler.kind=latent), and "
            "no other format has such a head. Export a policy that was trained with another sampler."
        )
    origin = policy.origin
    if origin is None:
        raise ValueError(
            f"{folder} was not imported, so there is no format to write it back to. `rlvla import` makes policies that "
            f"can be exported, and keeps them so through `rlvla train`. Formats: {', '.join(FORMATS)}."
        )
    if len(policy.embodiments) > 1:
        raise ValueError(
            f"{folder} has {len(policy.embodiments)} embodiments, each with statistics of its own, for which the "
            f"format {origin.format} has no place. Export a policy of one robot."
        )
    tensors = gather(policy, origin.places, origin.kept)
    output.parent.mkdir(parents=True, exist_ok=True)
    stage = output.parent / f".{output.name}.partial-{os.getpid()}"
    shutil.rmtree(stage, ignore_errors=True)
    try:
        for name, data in origin.files.items():
            path = stage / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        weights = stage / origin.weights
        weights.parent.mkdir(parents=True, exist_ok=True)
        if weights.suffix == ".safetensors":
            save_file(tensors, weights, metadata=dict(origin.metadata) or None)
        else:
            # A PyTorch file of tensors alone, as `read_weights` takes it.
            torch.save(tensors, weights)
        os.replace(stage, output)
    except Exception as error:
        shutil.rmtree(stage, ignore_errors=True)
        if isinstance(error, OSError) or "os error" in str(error).lower():
            raise RuntimeError(
                f"cannot write {output}: {error}. Free some space or choose another output=; nothing half-written was "
                "left."
            ) from error
        raise
    return {"checkpoint": str(output), "format": origin.format, "tensors": len(tensors), "files": sorted(origin.files)}
