"""How each kind of policy is sampled, scored and imitated: the one place that knows there are two kinds.

A policy with a flow draws one denoising step from a Gaussian, and that transition is what PPO scores. A policy with a
distribution draws the chunk itself. Whoever acts or learns holds a `Sampler` and asks no further.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Bool, Float
from tensordict import TensorDict
from torch import Tensor

from rlvla.config import AlgoConfig, ConfigError, Distance, FlowTime, SamplerConfig, SFTConfig
from rlvla.policies.base import ChunkPolicy, Context, DistributionPolicy, FlowPolicy, has_distribution
from rlvla.policies.exploration import has_latent
from rlvla.seeding import normal
from rlvla_algos.distill import Distance as DistanceKind
from rlvla_algos.distill import step_distance
from rlvla_algos.distribution import NormalBernoulli
from rlvla_algos.flow import (
    Schedule,
    check_flow_sde,
    denoise,
    gaussian_kl,
    ode_schedule,
    transition,
)
from rlvla_algos.flow_matching import flow_matching_loss, interpolate

Draws = tuple[Any, ...]
"""All that one row's decision takes from its generator. It takes as much whatever the temperature is."""


class Sampled(NamedTuple):
    """Chunks of a block of rows."""

    action: Float[Tensor, "B H K"]
    """Not clipped: clipping belongs to the simulator's copy."""
    stored: TensorDict
    """What `Sampler.score` scores again, ``log_prob`` [B H K] among it."""


class Likelihood(NamedTuple):
    """Stored decisions under the policy as it is now. Plain tensors, because hooks of DDP and FSDP2 look for them."""

    log_prob: Float[Tensor, "M H K"]
    parameters: dict[str, Tensor]
    """Of the distribution that the decision was drawn from, [M ...] each."""
    entropy: Float[Tensor, "M H K"] | None
    """In nats; None where it does not depend on the weights."""


class Sampler(ABC):
    """What a kind of policy does in rollouts, evaluations, updates and SFT. It holds no weights.

    The stored decisions that are called ``data`` here have what `sample` stored.
    """

    name: str
    """In evaluation files: measurements by different samplers are not compared."""
    imitation_metric: str
    """Name of `imitation_loss` in metrics.jsonl."""
    compared: str
    """What `gap` compares, for messages."""
    advice: str
    """What else can make it differ, for messages."""

    @abstractmethod
    def check(self, policy: ChunkPolicy) -> None:
        """Raise ValueError unless this sampler is right for a policy; a learner asks before it starts."""

    @abstractmethod
    def draw(self, policy: ChunkPolicy, rng: np.random.Generator) -> Draws: ...

    @abstractmethod
    def sample(self, policy: ChunkPolicy, context: Context, draws: Sequence[Draws], temperature: float) -> Sampled:
        """One chunk a row, from the row's own draws.

        Args:
            temperature: factor on all noise. Only what is drawn at 1 can be scored.
        """

    @abstractmethod
    def score(self, policy: ChunkPolicy, context: Context, data: TensorDict) -> Likelihood: ...

    @abstractmethod
    def kl(self, parameters: Mapping[str, Tensor], data: TensorDict) -> Float[Tensor, " M"]:
        """Exact KL from the stored distribution, in nats per chunk, over entries inside ``data["mask"]``."""

    @abstractmethod
    def gap(self, parameters: Mapping[str, Tensor], data: TensorDict) -> Float[Tensor, "M H K"]:
        """How far the stored distribution is from the one of now, in standard deviations: 0 before an update, or
        rollout and learner do not compute the same policy."""

    @abstractmethod
    def distance(
        self, parameters: Mapping[str, Tensor], data: TensorDict, kind: DistanceKind
    ) -> Float[Tensor, "M H K"]:
        """How far each entry is from what a teacher would have done, whose parameters are in ``data["teacher"]``.

        Args:
            kind: kl is KL(teacher || policy) in nats, exact.
        """

    @abstractmethod
    def recentre(self, data: TensorDict, parameters: Mapping[str, Tensor]) -> None:
        """Make the distribution of now the stored one, from which `kl` is measured."""

    @abstractmethod
    def exploration(self, algo: AlgoConfig) -> str:
        """What sets how much rollouts explore, for messages."""

    @property
    def terms(self) -> int:
        """How many independent log-probabilities are summed in each entry (`rlvla_algos.clip.clip_power`)."""
        return 1

    def parts(self, data: TensorDict) -> dict[str, Bool[Tensor, " M"]]:
        """Rows whose KL is also logged apart, by name of the metric; the same names for any data."""
        return {}

    @abstractmethod
    def imitation_loss(
        self,
        policy: ChunkPolicy,
        context: Context,
        action: Float[Tensor, "B L K"],
        mask: Bool[Tensor, "B L K"],
        rng: np.random.Generator,
        config: SFTConfig,
        velocity: Callable[[Context, Tensor, Tensor, Tensor], Tensor],
    ) -> Float[Tensor, ""]:
        """What SFT minimises, of demonstrated chunks where ``mask`` is True.

        Args:
            velocity: of (context, sample, tau, mask), for a flow that may learn more than chunks; else not called.
        """


def training_sampler(policy: ChunkPolicy, algo: AlgoConfig) -> Sampler:
    """What rollouts and updates of a policy use.

    Raises:
        ConfigError: an entropy bonus for a policy whose entropy is a constant, a distance of velocities for one that
            has none, or an ``algo.sampler`` that does not fit.
    """
    if has_distribution(policy):
        if algo.sampler != SamplerConfig():
            raise ConfigError(
                "algo.sampler is not its default; it must be: this policy has a distribution, not a flow."
            )
        if algo.teacher.distance is Distance.velocity:
            raise ConfigError(
                "algo.teacher.distance is velocity; it must be kl: this policy has a distribution and no velocity."
            )
        return DistributionSampler()
    if algo.entropy_coef > 0 and not algo.sampler.learns:
        raise ConfigError(
            f"algo.entropy_coef is {algo.entropy_coef:g}; it must be 0: with a fixed noise schedule the entropy is a "
            "constant, so a bonus does nothing. Raise algo.noise_level to explore more."
        )
    # That module is made of this one's classes.
    from rlvla.chain_samplers import flow_sampler

    return flow_sampler(cast(FlowPolicy, policy), algo)


def evaluation_sampler(policy: ChunkPolicy) -> Sampler:
    """What evaluations use, and SFT: no noise but what the temperature scales."""
    if has_latent(policy):
        from rlvla.chain_samplers import LatentSampler

        return LatentSampler(None)
    return DistributionSampler() if has_distribution(policy) else FlowSampler(None)


def bind(policy: FlowPolicy, context: Context) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The velocity with its context bound, as `rlvla_algos.flow` wants it."""
    return lambda sample, tau, step: policy.velocity(context, sample, tau, step)


def bind_loop(policy: FlowPolicy, context: Context) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The same for all denoising steps of a chunk, which may share work."""
    prepare = getattr(policy, "denoising", None)
    return bind(policy, context) if prepare is None else cast(Callable[..., Tensor], prepare(context))


@dataclass(frozen=True)
class FlowSampler(Sampler):
    """A flow with one stochastic denoising step a decision: stores ``before``, ``after``, ``mean`` and ``step``."""

    schedule: Schedule | None
    """Of the stochastic step; None is the plain ODE, which can be sampled and imitated and not scored."""

    name = "ode"
    imitation_metric = "loss/flow"
    compared = "transition mean"
    advice = (
        "The two use different weights, time grids, noise schedules or numerics: check that both come from the same "
        "policy and the same algo.noise_level and policy.num_denoising_steps."
    )

    def check(self, policy: ChunkPolicy) -> None:
        check_flow_sde(self._stochastic, cast(FlowPolicy, policy).num_denoising_steps)

    def draw(self, policy: ChunkPolicy, rng: np.random.Generator) -> Draws:
        shape = (policy.horizon, policy.channels)
        steps = cast(FlowPolicy, policy).num_denoising_steps
        return normal(rng, *shape), int(rng.integers(steps)), normal(rng, *shape)

    def sample(self, policy: ChunkPolicy, context: Context, draws: Sequence[Draws], temperature: float) -> Sampled:
        flow, device, mask = cast(FlowPolicy, policy), context.tokens.device, policy.noise_mask()
        noise = torch.from_numpy(np.stack([d[0] for d in draws])).to(device) * temperature * mask
        step = torch.tensor([d[1] for d in draws], device=device)
        step_noise = torch.from_numpy(np.stack([d[2] for d in draws])).to(device) * temperature * mask
        velocity = bind_loop(flow, context)
        if self.schedule is None:
            made = denoise(velocity, noise, schedule=ode_schedule(flow.num_denoising_steps).to(device))
        else:
            made = denoise(
                velocity, noise, schedule=self.schedule.to(device), stochastic_step=step, step_noise=step_noise
            )
        stored = {name: getattr(made, name) for name in ("before", "after", "mean", "log_prob")}
        return Sampled(made.action, TensorDict({**stored, "step": step}, batch_size=[len(step)]))

    def score(self, policy: ChunkPolicy, context: Context, data: TensorDict) -> Likelihood:
        schedule = self._stochastic.to(data["before"].device)
        velocity = bind(cast(FlowPolicy, policy), context)(data["before"], schedule.at(data["step"]).tau, data["step"])
        gaussian = transition(data["before"], velocity, data["step"], schedule)
        return Likelihood(gaussian.log_prob(data["after"]), gaussian._asdict(), None)

    def kl(self, parameters: Mapping[str, Tensor], data: TensorDict) -> Float[Tensor, " M"]:
        return gaussian_kl(parameters["mean"], data["mean"], parameters["std"], data["mask"])

    def gap(self, parameters: Mapping[str, Tensor], data: TensorDict) -> Float[Tensor, "M H K"]:
        distance: Tensor = (parameters["mean"] - data["mean"]) / parameters["std"]
        return distance.abs()

    def distance(
        self, parameters: Mapping[str, Tensor], data: TensorDict, kind: DistanceKind
    ) -> Float[Tensor, "M H K"]:
        schedule, teacher_mean = self._stochastic.to(data["step"].device), data["teacher", "mean"]
        return step_distance(
            mean=parameters["mean"], teacher_mean=teacher_mean, step=data["step"], schedule=schedule, distance=kind
        )

    def recentre(self, data: TensorDict, parameters: Mapping[str, Tensor]) -> None:
        data["mean"] = parameters["mean"]

    def exploration(self, algo: AlgoConfig) -> str:
        return f"algo.noise_level (now {algo.noise_level:g})"

    def parts(self, data: TensorDict) -> dict[str, Bool[Tensor, " M"]]:
        return {f"ppo/kl_step_{k}": data["step"] == k for k in range(self._stochastic.num_steps)}

    def imitation_loss(
        self,
        policy: ChunkPolicy,
        context: Context,
        action: Float[Tensor, "B L K"],
        mask: Bool[Tensor, "B L K"],
        rng: np.random.Generator,
        config: SFTConfig,
        velocity: Callable[[Context, Tensor, Tensor, Tensor], Tensor],
    ) -> Float[Tensor, ""]:
        """Flow matching at several (noise, flow time) draws of each context."""
        draws, device = config.noise_draws * len(action), action.device
        noise = torch.from_numpy(normal(rng, draws, *action.shape[1:])).to(device)
        tau = torch.from_numpy(draw_flow_time(rng, draws, config)).to(device)
        action, mask = (x.repeat(config.noise_draws, 1, 1) for x in (action, mask))
        predicted = velocity(context.repeat(config.noise_draws), interpolate(action, noise, tau), tau, mask)
        return flow_matching_loss(predicted, action, noise, mask)

    @property
    def _stochastic(self) -> Schedule:
        if self.schedule is None:
            raise ValueError("the plain ODE has no log-probability; take training_sampler, which has a noise schedule.")
        return self.schedule


@dataclass(frozen=True)
class DistributionSampler(Sampler):
    """A distribution over the chunk: stores the ``sample`` and the ``parameters`` it was drawn with."""

    name = "distribution"
    imitation_metric = "loss/imitation"
    compared = "distribution"
    advice = "The two use different weights or numerics: check that both come from the same policy."

    def check(self, policy: ChunkPolicy) -> None:
        """Any will do."""

    def draw(self, policy: ChunkPolicy, rng: np.random.Generator) -> Draws:
        return (normal(rng, policy.horizon, policy.channels),)

    def sample(self, policy: ChunkPolicy, context: Context, draws: Sequence[Draws], temperature: float) -> Sampled:
        distribution = cast(DistributionPolicy, policy).distribution(context)
        noise = torch.from_numpy(np.stack([d[0] for d in draws])).to(context.tokens.device)
        sample = distribution.sample(noise, temperature) * policy.action_mask()
        stored = {
            "sample": sample,
            "parameters": distribution.parameters(),
            "log_prob": distribution.log_prob(sample),
        }
        return Sampled(sample, TensorDict(stored, batch_size=[len(sample)]))

    def score(self, policy: ChunkPolicy, context: Context, data: TensorDict) -> Likelihood:
        distribution = cast(DistributionPolicy, policy).distribution(context)
        return Likelihood(distribution.log_prob(data["sample"]), distribution.parameters(), distribution.entropy())

    def kl(self, parameters: Mapping[str, Tensor], data: TensorDict) -> Float[Tensor, " M"]:
        kl: Tensor = NormalBernoulli(**parameters).kl(dict(data["parameters"].items())) * data["mask"]
        return kl.sum(dim=(1, 2))

    def gap(self, parameters: Mapping[str, Tensor], data: TensorDict) -> Float[Tensor, "M H K"]:
        return NormalBernoulli(**parameters).gap(dict(data["parameters"].items()))

    def distance(
        self, parameters: Mapping[str, Tensor], data: TensorDict, kind: DistanceKind
    ) -> Float[Tensor, "M H K"]:
        if kind != "kl":
            raise ValueError(f"a policy with a distribution has no {kind}; its distance to a teacher is kl.")
        return NormalBernoulli(**parameters).kl(dict(data["teacher"].items()))

    def recentre(self, data: TensorDict, parameters: Mapping[str, Tensor]) -> None:
        data["parameters"] = TensorDict(dict(parameters), batch_size=data.batch_size)

    def exploration(self, algo: AlgoConfig) -> str:
        return "policy.log_std_init, before rlvla sft"

    def imitation_loss(
        self,
        policy: ChunkPolicy,
        context: Context,
        action: Float[Tensor, "B L K"],
        mask: Bool[Tensor, "B L K"],
        rng: np.random.Generator,
        config: SFTConfig,
        velocity: Callable[[Context, Tensor, Tensor, Tensor], Tensor],
    ) -> Float[Tensor, ""]:
        return cast(DistributionPolicy, policy).imitation_loss(context, action, mask)


def draw_flow_time(rng: np.random.Generator, size: int, config: SFTConfig) -> np.ndarray:
    """tau in [0.001, 0.999]: at 0 the velocity is undefined by the data, at 1 it is the data's mean."""
    if config.flow_time is FlowTime.beta:
        tau = rng.beta(config.beta_alpha, config.beta_beta, size)
    elif config.flow_time is FlowTime.sigmoid_normal:
        tau = 1 / (1 + np.exp(-rng.standard_normal(size)))
    else:
        tau = rng.random(size)
    return np.clip(tau, 1e-3, 1 - 1e-3).astype(np.float32)
