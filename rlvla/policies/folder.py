"""A policy on disk: config.yaml, model.safetensors, action_stats.json and tokenizer files; origin/ if it was imported.

A policy of several embodiments has those after the first in embodiments.json (`rlvla.policies.embodiments`).
Where adapters were trained the weights have them merged in, and peft's two files with the adapters alone are beside.
What a run learned for exploring (`rlvla.policies.exploration`) has a file of its own.

Weights are read from safetensors, never unpickled, and every tensor must find its place.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rlvla.policies.action_stats import ActionStats
from rlvla.policies.architectures import architecture
from rlvla.policies.embodiments import FILE as EMBODIMENTS
from rlvla.policies.embodiments import Embodiment, load_embodiments, names, save_embodiments, widened
from rlvla.policies.exploration import FILE as EXPLORATION
from rlvla.policies.exploration import load_explorer, save_explorer, take_explorer
from rlvla.policies.lora import WEIGHTS, adapted, merge, save_adapters, unmerge
from rlvla.policies.numerics import in_file_precision
from rlvla.policies.origin import FOLDER as ORIGIN
from rlvla.policies.origin import Origin
from rlvla.policies.policy import Policy
from rlvla.policies.processor import load_tokenizer
from rlvla_envs.base import EnvSpec

FILES = ("config.yaml", "model.safetensors", "action_stats.json", "tokenizer.json")


def save_policy(policy: Policy, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write a policy folder: all of it or nothing.

    Args:
        weights: to save instead of the policy's own, for example an average.

    Raises:
        RuntimeError: the disk is full or not writable. What was there before is untouched.
    """
    from omegaconf import OmegaConf
    from safetensors.torch import save_file

    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    shutil.rmtree(stage, ignore_errors=True)
    try:
        stage.mkdir()
        first = policy.embodiments[0]
        config: dict[str, Any] = {
            "policy": OmegaConf.to_container(OmegaConf.structured(policy.config), enum_to_str=True),
            "env_spec": first.env_spec.to_dict(),
        }
        if len(policy.embodiments) > 1:
            # For readers, and so that a copy without the file of the others is noticed.
            config["embodiments"] = names([e.env_spec for e in policy.embodiments])
        (stage / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
        state = in_file_precision(policy, policy.state_dict() if weights is None else weights)
        explorer, learned = getattr(policy, "explorer", None), take_explorer(state)
        if explorer is not None:
            save_explorer(explorer.shape, learned, stage)
        save_adapters(policy, state, stage)
        state = merge(policy, state)
        # Tied or sliced tensors share storage, which safetensors refuses; a policy has few enough to copy.
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in state.items()}, stage / "model.safetensors")
        first.stats.save(stage / "action_stats.json")
        save_embodiments(policy.embodiments, policy.state_width, stage)
        policy.tokenizer.save_pretrained(stage)
        if policy.origin is not None:
            policy.origin.save(stage / ORIGIN)
        replace_folder(stage, folder)
    except Exception as error:
        shutil.rmtree(stage, ignore_errors=True)
        # safetensors reports a full disk as its own exception with the system's words inside.
        if isinstance(error, OSError) or "os error" in str(error).lower():
            raise RuntimeError(
                f"cannot save the policy to {folder}: {error}. Free some space or choose another output=; "
                "nothing half-written was left."
            ) from error
        raise


def replace_folder(stage: Path, folder: Path) -> None:
    """Put a finished folder in the place of an old one; the old one survives until the new one stands."""
    old = folder.parent / f".{folder.name}.old-{os.getpid()}"
    if folder.exists():
        os.replace(folder, old)
    os.replace(stage, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_policy(folder: Path, device: str = "cpu") -> Policy:
    """Read a policy folder. A policy of several embodiments is in its first one (`Policy.embody_in`).

    Raises:
        ValueError: not a policy folder, a damaged file, or weights that do not fit; the message names it.
    """
    check_folder(folder)
    config, spec = read_config(folder / "config.yaml")
    try:
        stats = ActionStats.load(folder / "action_stats.json")
        tokenizer = load_tokenizer(folder)
    except Exception as error:
        raise ValueError(f"{folder} is damaged: {type(error).__name__}: {error}. Copy or write it again.") from error
    _check_stats(stats, spec, folder / "action_stats.json")
    embodiments, state_width = load_embodiments(Embodiment(spec, stats), folder)
    for other in embodiments[1:]:
        _check_stats(other.stats, other.env_spec, folder / EMBODIMENTS)
    policy = build(config, embodiments, tokenizer, state_width)
    load_weights(policy, folder / "model.safetensors")
    if (folder / ORIGIN).is_dir():
        policy.origin = Origin.load(folder / ORIGIN)
    if (folder / EXPLORATION).is_file():
        policy.explorer = load_explorer(folder / EXPLORATION)
    return policy.to(device)


def build(config: Any, embodiments: Sequence[Embodiment], tokenizer: Any, state_width: int = 0) -> Policy:
    """A policy of these embodiments with fresh weights, in the first of them.

    Args:
        state_width: channels to pad states to, where it is more than the widest embodiment has.

    Raises:
        ValueError: an embodiment that does not fit the configuration.
    """
    first = embodiments[0]
    width = max(state_width, *(e.env_spec.state_size for e in embodiments))
    spec = widened(first.env_spec, width)
    policy = architecture(config.name).policy(config, spec, first.stats, tokenizer)
    if len(embodiments) > 1 or spec != first.env_spec:
        policy.hold(embodiments)
    return policy


def read_specs(folder: Path) -> list[EnvSpec]:
    """The conventions of all embodiments of a policy folder. Weights are not read.

    Raises:
        ValueError: not a policy folder, or a damaged file.
    """
    check_folder(folder)
    spec = read_config(folder / "config.yaml")[1]
    none = np.zeros(0, np.float32)
    embodiments, _ = load_embodiments(Embodiment(spec, ActionStats(none, none, none, none)), folder)
    return [e.env_spec for e in embodiments]


def check_folder(folder: Path) -> None:
    """Raise ValueError where a policy folder or one of its files is not there."""
    if not folder.is_dir():
        raise ValueError(f"there is no policy folder at {folder}. `rlvla sft` writes one to OUTPUT/policy.")
    missing = [name for name in FILES if not (folder / name).is_file()]
    if (
        not missing
        and not (folder / EMBODIMENTS).is_file()
        and "\nembodiments:" in (folder / FILES[0]).read_text(errors="replace")
    ):
        missing = [EMBODIMENTS]
    if missing:
        raise ValueError(
            f"{folder} is not a complete policy folder: {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing. "
            "Copy the whole folder, or write it again with `rlvla sft`."
        )


def _check_stats(stats: ActionStats, spec: EnvSpec, path: Path) -> None:
    """Statistics of another length would broadcast, and NaN would switch channels off, both silently."""
    for name, values, sizes in (
        ("action q01", stats.q01, {spec.action_size}),
        ("action q99", stats.q99, {spec.action_size}),
        ("action binary", stats.is_binary, {spec.action_size}),
        ("state mean", stats.state_mean, {spec.state_size}),
        ("state std", stats.state_std, {spec.state_size}),
    ):
        if values.ndim != 1 or len(values) not in sizes or not np.isfinite(values).all():
            raise ValueError(
                f"{path} does not fit config.yaml: {name} has shape {values.shape} and must be "
                f"{min(sizes)} finite numbers. Copy the folder again, or train the policy again."
            )


def read_config(path: Path) -> tuple[Any, EnvSpec]:
    from omegaconf import OmegaConf

    from rlvla.compose import policy_config_from_dict

    try:
        data: Any = OmegaConf.to_container(OmegaConf.load(path))
        spec = EnvSpec.from_dict(data["env_spec"])
        policy = data["policy"]
    except Exception as error:
        raise ValueError(
            f"{path} is damaged: {type(error).__name__}: {error}. Copy or write the folder again."
        ) from error
    try:
        return policy_config_from_dict(policy), spec
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_weights(policy: nn.Module, path: Path) -> None:
    """Load a safetensors file into a policy: every tensor finds its place.

    A policy with adapters must be the one that they were put on; they come from the file beside.

    Raises:
        ValueError: a damaged file, or tensors that are missing, left over or of another shape.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}. Copy the file again, or train the policy again.") from error
    if adapted(policy):
        weights = unmerge(policy, weights, path.with_name(WEIGHTS))
    expected = dict(policy.state_dict())
    if take_explorer(expected):
        explorer = load_explorer(path.with_name(EXPLORATION)).state_dict()
        weights |= {f"explorer.{name}": tensor for name, tensor in explorer.items()}
        expected = policy.state_dict()
    homeless = sorted(set(weights) - set(expected))
    absent = sorted(set(expected) - set(weights))
    wrong = sorted(
        f"{name} {tuple(weights[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in set(weights) & set(expected)
        if weights[name].shape != expected[name].shape
    )
    if homeless or absent or wrong:
        problems = [
            f"{label}: {', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"
            for label, names in (
                ("without a home", homeless),
                ("missing", absent),
                ("of another shape", wrong),
            )
            if names
        ]
        raise ValueError(
            f"{path} does not fit its config.yaml; tensors {'; '.join(problems)}. "
            "The weights and the configuration come from different policies."
        )
    policy.load_state_dict(weights)
