"""What objectives on the forward process of a flow score: noise added to the executed chunk, not a denoising step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float
from tensordict import TensorDict
from torch import Tensor

from rlvla.config import AlgoConfig, ConfigError, Objective, SFTConfig
from rlvla.policies.base import ChunkPolicy, Context, FlowPolicy, has_distribution
from rlvla.samplers import Draws, Likelihood, Sampled, Sampler, bind
from rlvla.seeding import normal
from rlvla_algos.distill import Distance as DistanceKind
from rlvla_algos.flow_matching import interpolate
from rlvla_algos.forward_process import surrogate_log_prob

VELOCITY = "forward_velocity"
"""Name of the velocities at the draws among a likelihood's parameters, [M n H K]."""


def objective_sampler(sampler: Sampler, policy: ChunkPolicy, algo: AlgoConfig) -> Sampler:
    """What rollouts and updates use, given what explores (`rlvla.samplers.training_sampler`).

    Raises:
        ConfigError: an objective on the forward process for a policy that has none.
    """
    if not algo.has_forward_draws:
        return sampler
    if not has_distribution(policy):
        return ForwardSampler(sampler, algo.forward.draws)
    if algo.objective is not Objective.clone:
        raise ConfigError(
            f"algo.objective is {algo.objective.value}; it must be ppo or clone: this policy has a distribution over "
            "the chunk and no flow."
        )
    return sampler


@dataclass(frozen=True)
class ForwardSampler(Sampler):
    """Explores as another sampler does, and scores a chunk by its flow-matching error.

    Beside what the other stores it keeps ``forward``: the executed ``action``, n draws of ``noise`` and ``tau``, and
    the ``velocity`` there. ``log_prob`` is minus the mean error over the draws. The trust region and its checks stay
    those of the transition that was drawn: its KL is exact, and there is none of an error.
    """

    inner: Sampler
    num_draws: int

    # Of evaluations and SFT, which use the plain sampler; for messages here.
    name = "forward"
    imitation_metric = "loss/flow"

    @property
    def compared(self) -> str:  # type: ignore[override]
        return self.inner.compared

    @property
    def advice(self) -> str:  # type: ignore[override]
        return self.inner.advice

    def check(self, policy: ChunkPolicy) -> None:
        self.inner.check(policy)

    def draw(self, policy: ChunkPolicy, rng: np.random.Generator) -> Draws:
        drawn = self.inner.draw(policy, rng)
        noise = normal(rng, self.num_draws, policy.horizon, policy.channels)
        # At 0 the velocity is undefined by the data, at 1 it is the data's mean.
        tau = np.clip(rng.random(self.num_draws), 1e-3, 1 - 1e-3).astype(np.float32)
        return (drawn, noise, tau)

    def sample(self, policy: ChunkPolicy, context: Context, draws: Sequence[Draws], temperature: float) -> Sampled:
        made = self.inner.sample(policy, context, [d[0] for d in draws], temperature)
        device = made.action.device
        forward = {
            "action": made.action,
            "noise": torch.from_numpy(np.stack([d[1] for d in draws])).to(device) * policy.noise_mask(),
            "tau": torch.from_numpy(np.stack([d[2] for d in draws])).to(device),
        }
        stored = made.stored.copy()
        stored["forward"] = TensorDict(forward, batch_size=[len(draws)])
        velocity = self._velocity(policy, context, stored["forward"])
        stored["forward", "velocity"] = velocity
        stored["log_prob"] = surrogate_log_prob(velocity, made.action, forward["noise"])
        return Sampled(made.action, stored)

    def score(self, policy: ChunkPolicy, context: Context, data: TensorDict) -> Likelihood:
        drawn = self.inner.score(policy, context, data)
        forward = data["forward"]
        velocity = self._velocity(policy, context, forward)
        log_prob = surrogate_log_prob(velocity, forward["action"], forward["noise"])
        return Likelihood(log_prob, {**drawn.parameters, VELOCITY: velocity}, drawn.entropy)

    def kl(self, parameters: Mapping[str, Tensor], data: TensorDict) -> Float[Tensor, " M"]:
        return self.inner.kl(_of_transition(parameters), data)

    def gap(self, parameters: Mapping[str, Tensor], data: TensorDict) -> Float[Tensor, "M H K"]:
        return self.inner.gap(_of_transition(parameters), data)

    def distance(
        self, parameters: Mapping[str, Tensor], data: TensorDict, kind: DistanceKind
    ) -> Float[Tensor, "M H K"]:
        return self.inner.distance(_of_transition(parameters), data, kind)

    def recentre(self, data: TensorDict, parameters: Mapping[str, Tensor]) -> None:
        self.inner.recentre(data, _of_transition(parameters))

    def exploration(self, algo: AlgoConfig) -> str:
        return self.inner.exploration(algo)

    def parts(self, data: TensorDict) -> dict[str, Bool[Tensor, " M"]]:
        return self.inner.parts(data)

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
        return self.inner.imitation_loss(policy, context, action, mask, rng, config, velocity)

    def _velocity(self, policy: ChunkPolicy, context: Context, forward: TensorDict) -> Float[Tensor, "M n H K"]:
        """At every draw, in one pass of the expert over n times the rows."""
        rows, times = forward["tau"].shape
        # `Context.repeat` gives the rows as blocks, so the draws go first.
        noise, tau = forward["noise"].transpose(0, 1).flatten(0, 1), forward["tau"].T.flatten()
        sample = interpolate(forward["action"].repeat(times, 1, 1), noise, tau)
        # The velocity knows times off the sampler's grid, as in SFT.
        found: Any = bind(cast(FlowPolicy, policy), context.repeat(times))(sample, tau, None)  # type: ignore[arg-type]
        return cast(Tensor, found.unflatten(0, (times, rows)).transpose(0, 1))


def _of_transition(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in parameters.items() if name != VELOCITY}
