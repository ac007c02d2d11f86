"""`rlvla import FORMAT CHECKPOINT`: a checkpoint of another project becomes a policy folder."""

import json
from pathlib import Path
from typing import Any

import torch

from rlvla.config import ImportConfig
from rlvla.formats.base import companion_files, find_format
from rlvla.formats.tensors import place
from rlvla.policies.architectures import architecture
from rlvla.policies.folder import save_policy
from rlvla.policies.origin import Origin
from rlvla.seeding import seed_torch


def run(config: ImportConfig) -> dict[str, Any]:
    """Import ``config.checkpoint`` and write the policy folder ``config.output``.

    Raises:
        ValueError: a checkpoint that is missing, damaged, incomplete or of another architecture, or a suite whose
            conventions are not its own. Nothing is written then.
    """
    from rlvla_envs.suites import make_env

    found = find_format(config.format)
    if config.noise_at is not None and config.noise_at != found.noise_at:
        raise ValueError(
            f"noise_at is {config.noise_at:g}, but in the format {found.name!r} a sample is noise at flow time "
            f"{found.noise_at:g}. A checkpoint of another convention was not made by {found.name}: choose its own "
            "format, or leave noise_at out."
        )
    named, output = Path(config.checkpoint), Path(config.output)
    checkpoint = found.root(named)
    if not checkpoint.is_dir():
        raise ValueError(f"there is no checkpoint folder at {checkpoint}.")
    if output.exists():
        raise ValueError(f"{output} exists already. Choose another output=, or remove it.")
    env = make_env(config.suite, 1)
    spec = env.spec
    env.close()
    try:
        draft = found.read(named, config, spec)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        # The files are somebody else's: what is nested in them may have any form.
        raise ValueError(
            f"a configuration file in {checkpoint} has an unknown form ({type(error).__name__}: {error}). Is the "
            f"checkpoint one of {found.name}, and complete?"
        ) from error
    seed_torch(0)
    policy = architecture(draft.config.name).policy(draft.config, spec, draft.stats, draft.tokenizer)
    with torch.no_grad():
        places, kept = place(draft.weights, policy, draft.key_map)
    notes = [*draft.notes, *(f"{name} names code of its own (auto_map); none was run." for name in code_of(checkpoint))]
    files, left_out = companion_files(checkpoint, draft.weights.path)
    policy.origin = Origin(
        found.name,
        draft.key_map.version,
        str(draft.weights.path.relative_to(checkpoint)),
        places,
        draft.weights.metadata,
        files,
        kept,
    )
    save_policy(policy, output)
    return {
        "policy": str(output),
        "format": found.name,
        "architecture": draft.config.name,
        "parameters": sum(parameter.numel() for parameter in policy.parameters()),
        "tensors": len(places),
        "kept_aside": sorted(kept),
        "left_out": left_out,
        "notes": notes,
    }


def code_of(checkpoint: Path) -> list[str]:
    """Configuration files that name Python code, as for transformers' trust_remote_code, which nothing here has."""
    found = []
    for path in sorted(checkpoint.glob("*.json")):
        try:
            said = json.loads(path.read_text())
        except ValueError:
            continue
        if isinstance(said, dict) and "auto_map" in said:
            found.append(path.name)
    return found
