"""Which parameters of a policy are trained, and at which rate. A part is named by its parameter group."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, cast

from torch import nn

from rlvla.policies.base import ChunkPolicy


class Grouped(Protocol):
    """A policy, or whatever holds its parameters while they are trained."""

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]: ...


def check_groups(policy: ChunkPolicy, names: Iterable[str], key: str) -> None:
    """Raise ValueError where a name is not one of the policy's parameter groups.

    Args:
        key: of the configuration, for the message.
    """
    groups = policy.parameter_groups()
    unknown = [name for name in names if name not in groups]
    if unknown:
        raise ValueError(
            f"{key} names {', '.join(unknown)}; the parameter groups of this policy are {', '.join(sorted(groups))}."
        )


def group_rates(
    policy: ChunkPolicy,
    trained: Sequence[str],
    given: Mapping[str, float],
    default: float,
    *,
    vlm: float | None = None,
    key: str,
) -> dict[str, float]:
    """The learning rate of each trained group.

    Args:
        trained: by `rlvla.policies.base.trained_groups`.
        given: rates by name.
        default: of a group that is not given.
        vlm: the same of the backbone, where it is another.
        key: of the configuration, for messages.

    Raises:
        ValueError: a rate for a group that is not there or not trained, or nothing is trained.
    """
    check_groups(policy, given, key)
    if not trained:
        raise ValueError(
            f"every parameter group is frozen ({', '.join(sorted(policy.parameter_groups()))}), so there is nothing to "
            "train. Take one out of freeze, or set train_vlm=true."
        )
    idle = [name for name in given if name not in trained]
    if idle:
        raise ValueError(
            f"{key} has a rate for {', '.join(idle)}, which is not trained; trained: {', '.join(trained)}. Take it "
            "out, or train it: freeze and train_vlm decide."
        )
    rates = {name: vlm if name == "vlm" and vlm is not None else default for name in trained}
    return rates | dict(given)


def require_gradients(policy: ChunkPolicy, trained: Sequence[str]) -> None:
    """Let those parameters ask for gradients that are trained, and no others: of a group with adapters, these alone."""
    layers = [module for module in cast(nn.Module, policy).modules() if hasattr(module, "lora_A")]
    adapters = {id(p) for layer in layers for p in (layer.lora_A, layer.lora_B)}
    for name, parameters in policy.parameter_groups().items():
        has_adapters = any(id(p) in adapters for p in parameters)
        for parameter in parameters:
            parameter.requires_grad_(name in trained and (id(parameter) in adapters or not has_adapters))


def trained_parameters(holder: Grouped, trained: Sequence[str]) -> dict[str, list[nn.Parameter]]:
    """What an optimizer gets, by group, after `require_gradients`."""
    groups = holder.parameter_groups()
    return {name: [p for p in groups[name] if p.requires_grad] for name in trained}
