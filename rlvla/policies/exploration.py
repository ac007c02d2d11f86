"""What a policy may learn for exploring: a network for the noise of denoising steps, or a head for the initial noise.

It becomes a part of the policy when training begins, in a parameter group of its own ("noise"), and so goes wherever
the policy goes: into copies, ranks and checkpoints. In a policy folder it has a file of its own, because the
architecture does not know it.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlvla.config import AlgoConfig, ConfigError, SamplerKind
from rlvla.policies.base import ChunkPolicy, Context, FlowPolicy, has_distribution

GROUP = "noise"
"""Name of its parameter group."""
FILE = "exploration.safetensors"

Role = Literal["steps", "latent"]


@dataclass(frozen=True)
class Shape:
    """What decides the tensors of an `Explorer`, and what they mean."""

    role: Role
    """steps: deviations of denoising steps. latent: a Gaussian over the initial noise."""
    features: int
    num_steps: int
    horizon: int
    channels: int
    hidden_sizes: tuple[int, ...]
    min_std: float
    max_std: float


class Explorer(nn.Module):
    """Features of the context -> deviations within bounds, and with role "latent" means as well.

    It reads what the value head reads, detached, so that exploring better never moves the backbone. The last layer
    starts at zero: all deviations are then the geometric mean of their bounds, all means 0.
    """

    fp32_layers = ("layers",)

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        size = shape.features + (shape.num_steps if shape.role == "steps" else 0)
        entries = shape.horizon * shape.channels
        layers: list[nn.Module] = []
        for hidden in shape.hidden_sizes:
            layers += [nn.Linear(size, hidden), nn.SiLU()]
            size = hidden
        last = nn.Linear(size, entries if shape.role == "steps" else 2 * entries)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last)

    def step_std(self, features: Float[Tensor, "B V"], step: Int[Tensor, " B"]) -> Float[Tensor, "B H K"]:
        """Deviation of each entry at each row's denoising step."""
        which = nn.functional.one_hot(step, self.shape.num_steps)
        return self._log_std(self._run(torch.cat([features, which.to(features)], dim=1))).exp()

    def latent(self, features: Float[Tensor, "B V"]) -> tuple[Float[Tensor, "B H K"], Float[Tensor, "B H K"]]:
        """Mean and log-deviation of the initial noise."""
        mean, raw = self._run(features).chunk(2, dim=1)
        return mean, self._log_std(raw)

    def _run(self, features: Tensor) -> Tensor:
        # A deviation of 8 bits would be noise in every log-probability.
        with torch.autocast(features.device.type, enabled=False):
            made: Tensor = self.layers(features.to(next(self.layers.parameters()).dtype))
        return made.reshape(len(made), -1, self.shape.channels)

    def _log_std(self, raw: Tensor) -> Tensor:
        """Squashed into the bounds: a clamp would have no gradient outside, and a deviation that is stuck."""
        low, high = math.log(self.shape.min_std), math.log(self.shape.max_std)
        return 0.5 * (low + high) + 0.5 * (high - low) * torch.tanh(raw)


def drop_explorer(policy: ChunkPolicy) -> None:
    cast(Any, policy).explorer = None


def explorer_of(policy: ChunkPolicy, role: Role) -> Explorer:
    """The explorer of a policy.

    Raises:
        ValueError: it has none, or one of another role.
    """
    explorer = cast("Explorer | None", getattr(policy, "explorer", None))
    if explorer is None or explorer.shape.role != role:
        raise ValueError(
            f"this policy has no network for {'the noise of its steps' if role == 'steps' else 'its initial noise'}; "
            "prepare it with rlvla.policies.exploration.add_explorer."
        )
    return explorer


def has_latent(policy: ChunkPolicy) -> bool:
    """Whether a policy's initial noise comes from a head, in evaluations as well."""
    explorer = cast("Explorer | None", getattr(policy, "explorer", None))
    return explorer is not None and explorer.shape.role == "latent"


def read_features(policy: ChunkPolicy, context: Context) -> Float[Tensor, "B V"]:
    """What an explorer reads of a context."""
    return policy.value_features(context).detach()


def add_explorer(policy: ChunkPolicy, algo: AlgoConfig) -> None:
    """Give a policy what ``algo.sampler`` learns, or take away what an earlier run learned and this one does not use.

    An explorer that came with the policy's folder and is of the same shape is trained on. With ``kind=latent`` all
    other parameter groups become frozen.

    Raises:
        ConfigError: the policy's actions depend on a head that this run would leave out, or on one of another shape; or
            there is a head to learn and no flow to use it.
    """
    config = algo.sampler
    had = cast("Explorer | None", getattr(policy, "explorer", None))
    latent = config.kind is SamplerKind.latent
    if had is not None and had.shape.role == "latent" and not latent:
        raise ConfigError(
            f"algo.sampler.kind is {config.kind.value}; it must be latent: this policy's initial noise comes from a "
            "head that an earlier run learned, and it acts otherwise without. Or start from the policy before that run."
        )
    if not config.learns or has_distribution(policy):
        if had is not None:
            drop_explorer(policy)
        return
    low, high = config.std_range
    shape = Shape(
        role="latent" if latent else "steps",
        features=policy.value_size,
        num_steps=cast(FlowPolicy, policy).num_denoising_steps,
        horizon=policy.horizon,
        channels=policy.channels,
        hidden_sizes=config.hidden_sizes,
        min_std=low,
        max_std=high,
    )
    if had is not None and had.shape != shape and latent:
        raise ConfigError(
            f"algo.sampler describes the head {shape}; it must be the policy's own, {had.shape}. Set hidden_sizes, "
            "min_std and max_std as they were."
        )
    if had is None or had.shape != shape:
        device = next(cast(nn.Module, policy).parameters()).device
        # Its draws must not change those of the value head, which is drawn after it.
        with torch.random.fork_rng(devices=[]):
            policy.explorer = Explorer(shape).to(device)  # type: ignore[attr-defined]
    policy.explorer.eval()  # type: ignore[attr-defined]
    if latent:
        policy.frozen_groups = frozenset(policy.parameter_groups()) - {GROUP}


def take_explorer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the explorer's tensors from a policy's state and return them under their own names."""
    names = [name for name in state if name.startswith("explorer.")]
    return {name.removeprefix("explorer."): state.pop(name) for name in names}


def save_explorer(shape: Shape, tensors: dict[str, Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(kept, folder / FILE, metadata={"shape": json.dumps(vars(shape))})


def load_explorer(path: Path) -> Explorer:
    """Read what `save_explorer` wrote.

    Raises:
        ValueError: a damaged file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads(file.metadata()["shape"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        shape = Shape(**{**described, "hidden_sizes": tuple(described["hidden_sizes"])})
        explorer = Explorer(shape)
        explorer.load_state_dict(tensors)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {error}. Copy the file again, or train the policy again.") from error
    return explorer.eval()
