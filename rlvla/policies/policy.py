"""What every policy class shares: conventions, statistics, the mask of the action tensor, and the way there and back.

The rest of the system knows a policy by its Protocol (`rlvla.policies.base`). This class saves a new one from writing
again what is the same in all of them.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from tensordict import TensorDict
from torch import Tensor, nn

from rlvla.config import Precision
from rlvla.policies.action_stats import ActionStats
from rlvla.policies.base import Context
from rlvla.policies.embodiments import Embodiment, choose, names
from rlvla.policies.exploration import GROUP, Explorer
from rlvla.policies.numerics import NETWORKS, in_own_precision
from rlvla.policies.origin import Origin
from rlvla_algos.distribution import NormalBernoulli
from rlvla_algos.flow import Velocity
from rlvla_envs.base import EnvSpec, Observation


class Policy(nn.Module):
    """A policy that can be trained, stored in a folder and read again: a `PolicyWithFlow` or a
    `PolicyWithDistribution`.

    Subclasses take ``(config, env_spec, stats, tokenizer)``, call `__init__` of this class first, and ``self.eval()``
    last: a policy is deterministic given its noise, so there is no dropout in SFT, rollouts or updates, and the ratio
    before the first step is 1. Gradients do not need training mode.
    """

    value_size: int
    origin: Origin | None = None
    """The checkpoint it was imported from; it stays with the policy through training."""
    context_groups: frozenset[str] = frozenset({"vlm"})
    frozen_groups: frozenset[str] = frozenset()
    precision: Precision = Precision.fp32
    """Of its networks (`rlvla.policies.numerics`)."""
    narrowed: frozenset[str] = frozenset()
    """Names of tensors that are kept in bfloat16 in memory alone."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in NETWORKS:
            if name in vars(cls):
                setattr(cls, name, in_own_precision(vars(cls)[name]))

    def __init__(
        self,
        config: Any,
        env_spec: EnvSpec,
        stats: ActionStats,
        tokenizer: Any,
        *,
        horizon: int,
        channels: int,
    ) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.horizon, self.channels = horizon, channels
        self.embodiments: tuple[Embodiment, ...] = (Embodiment(env_spec, stats),)
        self.embodiment = 0
        self.state_width = env_spec.state_size
        self._action_mask: Tensor
        self.register_buffer("_action_mask", self._mask_of(env_spec, stats), persistent=False)

    def _mask_of(self, env_spec: EnvSpec, stats: ActionStats) -> Bool[Tensor, "H K"]:
        mask = np.zeros((self.horizon, self.channels), dtype=np.bool_)
        mask[: env_spec.chunk_size, : env_spec.action_size] = stats.active
        return torch.from_numpy(mask)

    def camera_order(self) -> list[str]:
        """Of ``batch["images"]``: what ``config.cameras`` names, where an architecture has it, else the suite's own."""
        return list(getattr(self.config, "cameras", ())) or [camera.name for camera in self.env_spec.cameras]

    # --- embodiments

    @property
    def env_spec(self) -> EnvSpec:
        """Of the embodiment it is in."""
        return self.embodiments[self.embodiment].env_spec

    @property
    def stats(self) -> ActionStats:
        """Of the embodiment it is in."""
        return self.embodiments[self.embodiment].stats

    @stats.setter
    def stats(self, stats: ActionStats) -> None:
        held = list(self.embodiments)
        held[self.embodiment] = Embodiment(self.env_spec, stats)
        self.embodiments = tuple(held)

    def check_embodiment(self, env_spec: EnvSpec) -> None:
        """Raise ValueError where the policy's tensors have no room for another embodiment than its first."""
        raise ValueError(
            f"policy.name={self.config.name} has the sizes of one suite and cannot hold several embodiments. Choose an "
            "architecture that pads its actions, such as policy=qwen_vla_small."
        )

    def hold(self, embodiments: Sequence[Embodiment]) -> None:
        """Have these embodiments from now on, and be in the first.

        Raises:
            ValueError: one does not fit; the message says which and why.
        """
        for embodiment, name in zip(embodiments, names([e.env_spec for e in embodiments]), strict=True):
            try:
                self.check_embodiment(embodiment.env_spec)
            except ValueError as error:
                raise ValueError(f"embodiment {name}: {error}") from error
        self.embodiments = tuple(embodiments)
        self.embody(0)

    def embody(self, index: int) -> None:
        """Take on one of ``embodiments``: its conventions, its statistics, its mask and its prompts."""
        self.embodiment, chosen = index, self.embodiments[index]
        # Another tensor, not other values: a graph that has not run backwards yet may hold the old one.
        self._action_mask = self._mask_of(chosen.env_spec, chosen.stats).to(self._action_mask.device)

    def embody_in(self, world: EnvSpec, *, right: str = "suite") -> None:
        """Take on the embodiment that a world has.

        Args:
            right: what the world is called in messages.

        Raises:
            ValueError: as `rlvla.policies.embodiments.choose`.
        """
        index = choose([e.env_spec for e in self.embodiments], world, right=right)
        if index != self.embodiment:
            self.embody(index)

    def pad_state(self, state: Float[np.ndarray, "B P"]) -> Float[np.ndarray, "B W"]:
        """A normalised state as wide as the widest embodiment's, zeros behind."""
        return np.pad(state, ((0, 0), (0, self.state_width - state.shape[1])))

    def initialize(self) -> None:
        """What a model trained from scratch needs beyond its layers' own initialisation; nothing by default."""

    def context_noise(self) -> dict[str, tuple[int, ...]]:
        return {}

    @property
    def auxiliary_weights(self) -> Mapping[str, float]:
        """Weight of each of `auxiliary_losses` in `rlvla sft`; empty where there is none."""
        return {}

    def auxiliary_losses(self, context: Context, batch: TensorDict) -> dict[str, Float[Tensor, " B"]]:
        """What is trained beside the decoder, row by row and by name.

        Args:
            batch: what ``context`` was made from, and ``batch["next"]``: ``images`` [B, ...] of a chunk later and
                ``valid`` [B], False where the episode has ended before. A row without counts 0.
        """
        return {}

    @abstractmethod
    def collate(self, observation: Observation) -> TensorDict: ...

    @abstractmethod
    def context_length(self, instruction: str) -> int: ...

    def encoded_tokens(self, data: TensorDict) -> int:
        return int(data["context" if "context" in data else "batch", "mask"].shape[-1])

    @abstractmethod
    def encode(self, batch: TensorDict) -> Context: ...

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]: ...

    @abstractmethod
    def sharding_units(self) -> list[nn.Module]: ...

    def value_features(self, context: Context) -> Float[Tensor, "B V"]:
        parts = [context.pooled]
        if self.config.value_uses_state:
            parts.append(context.state)
        return torch.cat(parts, dim=-1).detach()

    def action_mask(self) -> Bool[Tensor, "H K"]:
        return self._action_mask

    def noise_mask(self) -> Bool[Tensor, "H K"]:
        return self.action_mask()

    def actions_to_env(self, sample: Float[Tensor, "B H K"]) -> Float[np.ndarray, "B H C"]:
        """Clipped to the quantiles' range first: outside it the data says nothing, and SFT never went there."""
        spec, bound = self.env_spec, self.stats.action_bound
        chunk = sample[:, : spec.chunk_size, : spec.action_size].float().clamp(-bound, bound)
        return self.stats.denormalize(chunk.cpu().numpy())

    def actions_from_env(self, action: Float[np.ndarray, "B H C"]) -> Float[Tensor, "B H K"]:
        batch, horizon, channels = action.shape
        padded = torch.zeros(batch, self.horizon, self.channels)
        padded[:, :horizon, :channels] = torch.from_numpy(self.stats.normalize(action))
        return padded * self._action_mask.cpu()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Moves and casts as every module does, but rotary frequencies stay in fp32: a position in the hundreds
        does not fit into the 8 bits of a bfloat16."""
        rotary: list[Any] = [m for m in self.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
        kept = [module.inv_freq.float() for module in rotary]
        nn.Module._apply(self, fn, recurse)
        for module, frequency in zip(rotary, kept, strict=True):
            if not module.inv_freq.is_meta:
                module.inv_freq = frequency.to(module.inv_freq.device)
        return self


class PolicyWithFlow(Policy):
    """A policy that decodes actions with a flow (`rlvla.policies.base.FlowPolicy`)."""

    def __init__(
        self,
        config: Any,
        env_spec: EnvSpec,
        stats: ActionStats,
        tokenizer: Any,
        *,
        horizon: int,
        channels: int,
    ) -> None:
        super().__init__(config, env_spec, stats, tokenizer, horizon=horizon, channels=channels)
        self.num_denoising_steps = int(config.num_denoising_steps)
        # Here and not in the class: an attribute of the class would hide the module.
        self.explorer: Explorer | None = None

    def exploration_group(self) -> dict[str, list[nn.Parameter]]:
        """The parameter group of what a run learned for exploring (`rlvla.policies.exploration`), where it did. A part
        of every flow policy's `parameter_groups`."""
        return {} if self.explorer is None else {GROUP: list(self.explorer.parameters())}

    @abstractmethod
    def velocity(
        self,
        context: Context,
        sample: Float[Tensor, "B H K"],
        tau: Float[Tensor, " B"],
        step: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B H K"]: ...

    def denoising(self, context: Context) -> Velocity:
        """`velocity` for one loop over the denoising steps, without gradients: an architecture can compute once here
        what the steps share."""
        return lambda sample, tau, step: self.velocity(context, sample, tau, step)


class PolicyWithDistribution(Policy):
    """A policy that gives a distribution over the chunk (`rlvla.policies.base.DistributionPolicy`)."""

    @abstractmethod
    def distribution(self, context: Context) -> NormalBernoulli: ...

    @abstractmethod
    def imitation_loss(
        self, context: Context, action: Float[Tensor, "B H K"], mask: Bool[Tensor, "B H K"]
    ) -> Float[Tensor, ""]: ...


def check_sizes(
    env_spec: EnvSpec,
    tokenizer: Any,
    *,
    horizon: int,
    channels: int,
    vocab_size: int,
    image_unit: int,
    part: str,
    image_sizes: Sequence[int] = (),
) -> None:
    """Everything that must fit, before a parameter is allocated.

    Args:
        image_unit: pixels that must divide every image's sides: a patch times what is merged.
        part: where a user sets H and K, such as "policy.expert".
        image_sizes: sides that images are resized to, one after the other; of these the last must fit.

    Raises:
        ValueError: the policy does not fit the suite; the message lists all reasons.
    """
    problems = []
    if env_spec.action_size > channels:
        problems.append(
            f"the suite has {env_spec.action_size} action channels, {part}.channels pads to {channels}; raise it"
        )
    if env_spec.chunk_size > horizon:
        problems.append(f"suite.chunk_size is {env_spec.chunk_size}, {part}.horizon pads to {horizon}; raise it")
    if len(tokenizer) > vocab_size:
        problems.append(f"the tokenizer has {len(tokenizer)} tokens, policy.vlm.vocab_size is {vocab_size}; raise it")
    if len({(c.height, c.width) for c in env_spec.cameras}) > 1:
        sizes = ", ".join(f"{c.name} {c.height} x {c.width}" for c in env_spec.cameras)
        problems.append(f"all cameras must have one size, and they are {sizes}; change suite.image_size")
    if image_sizes and (min(image_sizes) < 1 or image_sizes[-1] % image_unit):
        problems.append(
            f"policy.image_sizes is {list(image_sizes)}; the last must be a multiple of {image_unit}, merged patches"
        )
    problems += [
        f"camera {c.name} is {c.height} x {c.width}, which merged patches of {image_unit} pixels do not divide; "
        "change suite.image_size"
        for c in env_spec.cameras
        if not image_sizes and (c.height % image_unit or c.width % image_unit)
    ]
    if problems:
        raise ValueError("the policy does not fit the suite: " + "; ".join(problems) + ".")


def camera_views(observation: Observation, cameras: Sequence[str]) -> UInt8[Tensor, "B views h w 3"]:
    """`Observation.views` as a tensor."""
    return torch.from_numpy(observation.views(cameras))


def check_cameras(cameras: Sequence[str], env_spec: EnvSpec) -> None:
    """Refuse an order of cameras that does not name each of the suite's once; empty is the suite's own order."""
    names = sorted(camera.name for camera in env_spec.cameras)
    if cameras and sorted(cameras) != names:
        raise ValueError(
            f"policy.cameras is {', '.join(cameras)}; it must name each of the suite's once: {', '.join(names)}, "
            "or be empty."
        )
