"""Samplers of a flow beside the default `rlvla.samplers.FlowSampler`: several steps, learned noise, the latent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from jaxtyping import Bool, Float
from tensordict import TensorDict
from torch import Tensor

from rlvla.config import AlgoConfig, ConfigError, NoiseSchedule, Process, SamplerKind
from rlvla.policies.base import ChunkPolicy, Context, FlowPolicy
from rlvla.policies.exploration import explorer_of, read_features
from rlvla.samplers import Draws, FlowSampler, Likelihood, Sampled, bind, bind_loop
from rlvla.seeding import normal
from rlvla_algos.chain import (
    Draw,
    Scored,
    chain_entropy,
    chain_kl,
    fixed,
    normal_kl,
    sample_chain,
    score_chain,
    with_noise,
)
from rlvla_algos.distill import Distance as DistanceKind
from rlvla_algos.distill import velocity_gain
from rlvla_algos.distribution import NormalBernoulli
from rlvla_algos.flow import denoise, ode_schedule
from rlvla_algos.schedules import check_cps, cps_schedule, sde_schedule


def flow_sampler(policy: FlowPolicy, algo: AlgoConfig) -> FlowSampler:
    """What rollouts and updates of a policy with a flow use.

    Raises:
        ConfigError: a window that does not fit the policy's denoising steps, or a flow too short for the noise.
    """
    config, num_steps = algo.sampler, policy.num_denoising_steps
    if config.kind is SamplerKind.latent:
        return LatentSampler(None)
    usable = num_steps - (config.process is Process.cps)
    window = {SamplerKind.one_step: 1, SamplerKind.window: config.window, SamplerKind.all_steps: usable}[config.kind]
    if config.process is Process.learned:
        sampler: FlowSampler = LearnedChainSampler(None, window, _starts(algo, window, usable))
    elif config.process is Process.cps:
        shape: Literal["constant", "cosine"] = "cosine" if config.schedule is NoiseSchedule.cosine else "constant"
        schedule = cps_schedule(num_steps, algo.noise_level, shape)
        sampler = ChainSampler(schedule, window, _starts(algo, window, usable), preserves_coefficients=True)
    else:
        schedule = sde_schedule(num_steps, algo.noise_level, (config.schedule or NoiseSchedule.flow_grpo).value)
        if config.kind is SamplerKind.one_step:
            return FlowSampler(schedule)
        sampler = ChainSampler(schedule, window, _starts(algo, window, usable))
    return sampler


def _starts(algo: AlgoConfig, window: int, usable: int) -> tuple[int, ...]:
    """Where a window may begin."""
    given = algo.sampler.window_start
    last = usable - window
    if last < 0 or (given is not None and given > last):
        key = "window" if given is None or last < 0 else "window_start"
        raise ConfigError(
            f"algo.sampler.{key} is {window if key == 'window' else given}; it must be at most "
            f"{usable if key == 'window' else last}: this policy has {usable} denoising steps that may have noise."
        )
    return tuple(range(last + 1)) if given is None else (given,)


@dataclass(frozen=True)
class ChainSampler(FlowSampler):
    """A flow with several stochastic steps in a row: stores ``states`` [W + 1, H, K], ``mean`` [W, H, K] and ``step``.

    Its log-probability is the sum over the steps.
    """

    window: int = 1
    """W."""
    starts: tuple[int, ...] = (0,)
    """First steps to draw from."""
    preserves_coefficients: bool = False

    @property
    def terms(self) -> int:
        return self.window

    def check(self, policy: ChunkPolicy) -> None:
        if self.preserves_coefficients:
            num_steps = cast(FlowPolicy, policy).num_denoising_steps
            check_cps(self._stochastic, num_steps)
            if max(self.starts) + self.window >= num_steps:
                raise ValueError("the last step of coefficient-preserving sampling has no noise; leave it out.")
        else:
            super().check(policy)

    def draw(self, policy: ChunkPolicy, rng: np.random.Generator) -> Draws:
        shape = (policy.horizon, policy.channels)
        start = self.starts[int(rng.integers(len(self.starts)))]
        return normal(rng, *shape), start, normal(rng, self.window, *shape)

    def sample(self, policy: ChunkPolicy, context: Context, draws: Sequence[Draws], temperature: float) -> Sampled:
        flow, device, mask = cast(FlowPolicy, policy), context.tokens.device, policy.noise_mask()
        start = torch.tensor([d[1] for d in draws], device=device)
        made = sample_chain(
            bind_loop(flow, context),
            torch.from_numpy(np.stack([d[0] for d in draws])).to(device) * temperature * mask,
            draw=self._draw(flow, context),
            num_steps=flow.num_denoising_steps,
            start=start,
            step_noise=torch.from_numpy(np.stack([d[2] for d in draws])).to(device) * temperature * mask,
        )
        stored = {"states": made.states, "log_prob": made.scored.log_prob, "step": start}
        return Sampled(made.action, TensorDict({**stored, **self._kept(made.scored)}, batch_size=[len(start)]))

    def score(self, policy: ChunkPolicy, context: Context, data: TensorDict) -> Likelihood:
        flow = cast(FlowPolicy, policy)
        scored = score_chain(
            bind(flow, context),
            data["states"],
            draw=self._draw(flow, context),
            num_steps=flow.num_denoising_steps,
            start=data["step"],
        )
        return Likelihood(scored.log_prob, {"mean": scored.mean, "std": scored.std}, self._entropy(scored))

    def kl(self, parameters: Mapping[str, Tensor], data: TensorDict) -> Float[Tensor, " M"]:
        old_std = self._old_std(parameters, data)
        return chain_kl(self._scored(parameters), data["mean"], old_std, data["mask"])

    def gap(self, parameters: Mapping[str, Tensor], data: TensorDict) -> Float[Tensor, "M H K"]:
        distance: Tensor = ((parameters["mean"] - data["mean"]) / parameters["std"]).abs()
        deviations = (parameters["std"].log() - self._old_std(parameters, data).log()).abs()
        return torch.maximum(distance, deviations).amax(dim=1)

    def distance(
        self, parameters: Mapping[str, Tensor], data: TensorDict, kind: DistanceKind
    ) -> Float[Tensor, "M H K"]:
        """Summed over the steps."""
        moved = (parameters["mean"] - data["teacher", "mean"]).square()
        if kind == "kl":
            nats: Tensor = moved / (2 * parameters["std"].square())
            return nats.sum(dim=1)
        schedule, steps = self._stochastic.to(data["step"].device), range(self.window)
        gain = torch.stack([velocity_gain(schedule, data["step"] + j) for j in steps], dim=1)
        squared: Tensor = moved / gain.square()
        return squared.sum(dim=1)

    def recentre(self, data: TensorDict, parameters: Mapping[str, Tensor]) -> None:
        for name, values in self._kept(self._scored(parameters)).items():
            data[name] = values

    def parts(self, data: TensorDict) -> dict[str, Bool[Tensor, " M"]]:
        """By the window's first step, where there are several."""
        return {f"ppo/kl_step_{k}": data["step"] == k for k in self.starts} if len(self.starts) > 1 else {}

    def _draw(self, policy: FlowPolicy, context: Context) -> Draw:
        return fixed(self._stochastic.to(context.tokens.device))

    def _kept(self, scored: Scored) -> dict[str, Tensor]:
        """What is stored of the Gaussians, for `kl` and `gap`."""
        return {"mean": scored.mean}

    def _old_std(self, parameters: Mapping[str, Tensor], data: TensorDict) -> Tensor:
        """A schedule's deviations never change."""
        return parameters["std"]

    def _entropy(self, scored: Scored) -> Tensor | None:
        return None

    def _scored(self, parameters: Mapping[str, Tensor]) -> Scored:
        return Scored(parameters["mean"], parameters["std"], parameters["mean"][:, 0])


@dataclass(frozen=True)
class LearnedChainSampler(ChainSampler):
    """Stochastic steps around Euler's, with deviations from the policy's noise network, which are stored as ``std``.

    Evaluations integrate the ODE and never ask the network.
    """

    def check(self, policy: ChunkPolicy) -> None:
        explorer_of(policy, "steps")
        last = cast(FlowPolicy, policy).num_denoising_steps - self.window
        if max(self.starts) > last:
            raise ValueError(f"a window of {self.window} steps starts at {last} at the latest, not {max(self.starts)}.")

    def exploration(self, algo: AlgoConfig) -> str:
        low, high = algo.sampler.std_range
        return f"algo.sampler.min_std and max_std (now {low:g} and {high:g})"

    def _draw(self, policy: FlowPolicy, context: Context) -> Draw:
        explorer, features = explorer_of(policy, "steps"), read_features(policy, context)
        return with_noise(lambda step: explorer.step_std(features, step), policy.num_denoising_steps)

    def _kept(self, scored: Scored) -> dict[str, Tensor]:
        return {"mean": scored.mean, "std": scored.std}

    def _old_std(self, parameters: Mapping[str, Tensor], data: TensorDict) -> Tensor:
        stored: Tensor = data["std"]
        return stored

    def _entropy(self, scored: Scored) -> Tensor | None:
        return chain_entropy(scored.std)


@dataclass(frozen=True)
class LatentSampler(FlowSampler):
    """A Gaussian over the initial noise, from a head; the flow has no other noise. Stores ``sample`` = Y_1, and the
    Gaussian's ``parameters``.

    It scores without a pass of the expert, and it is what evaluations use as well, since the head is what was learned.
    """

    name = "latent"
    compared = "initial noise"
    advice = "The two use different weights or numerics: check that both come from the same policy."

    def check(self, policy: ChunkPolicy) -> None:
        explorer_of(policy, "latent")

    def draw(self, policy: ChunkPolicy, rng: np.random.Generator) -> Draws:
        return (normal(rng, policy.horizon, policy.channels),)

    def sample(self, policy: ChunkPolicy, context: Context, draws: Sequence[Draws], temperature: float) -> Sampled:
        flow, device = cast(FlowPolicy, policy), context.tokens.device
        gaussian = self._gaussian(policy, context)
        noise = torch.from_numpy(np.stack([d[0] for d in draws])).to(device)
        latent = gaussian.sample(noise, temperature) * policy.noise_mask()
        made = denoise(bind_loop(flow, context), latent, schedule=ode_schedule(flow.num_denoising_steps).to(device))
        stored = {"sample": latent, "parameters": gaussian.parameters(), "log_prob": gaussian.log_prob(latent)}
        return Sampled(made.action, TensorDict(stored, batch_size=[len(latent)]))

    def score(self, policy: ChunkPolicy, context: Context, data: TensorDict) -> Likelihood:
        gaussian = self._gaussian(policy, context)
        return Likelihood(gaussian.log_prob(data["sample"]), gaussian.parameters(), gaussian.entropy())

    def kl(self, parameters: Mapping[str, Tensor], data: TensorDict) -> Float[Tensor, " M"]:
        old = data["parameters"]
        kl = normal_kl(parameters["location"], parameters["log_std"].exp(), old["location"], old["log_std"].exp())
        valid: Tensor = kl * data["mask"]
        return valid.sum(dim=(1, 2))

    def gap(self, parameters: Mapping[str, Tensor], data: TensorDict) -> Float[Tensor, "M H K"]:
        return NormalBernoulli(**parameters).gap(dict(data["parameters"].items()))

    def recentre(self, data: TensorDict, parameters: Mapping[str, Tensor]) -> None:
        data["parameters"] = TensorDict(dict(parameters), batch_size=data.batch_size)

    def exploration(self, algo: AlgoConfig) -> str:
        low, high = algo.sampler.std_range
        return f"algo.sampler.min_std and max_std (now {low:g} and {high:g})"

    def parts(self, data: TensorDict) -> dict[str, Bool[Tensor, " M"]]:
        return {}

    def _gaussian(self, policy: ChunkPolicy, context: Context) -> NormalBernoulli:
        """Standard normal where the noise is padding, which no action comes from."""
        mean, log_std = explorer_of(policy, "latent").latent(read_features(policy, context))
        mask = policy.action_mask()
        nothing = torch.zeros_like(mask)[None, :1].expand(len(mean), -1, -1)
        return NormalBernoulli(mean * mask, log_std * mask, nothing)
