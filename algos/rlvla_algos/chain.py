"""Several stochastic denoising steps as one decision: a window of the chain, or all of it.

A decision draws the W consecutive steps k .. k + W - 1 from Gaussians and takes Euler's for the others. Given the
states Y_k .. Y_{k+W} the rest of the chain is a constant, and the density of the decision is the product of its
transitions':

    log p = sum_j log N(Y_{k+j+1}; mean_j, s_j^2),    KL(old || new) = sum_j KL_j    at the stored states.

The KL of a whole chain is the expectation of that sum over the old policy's states, which are the stored ones; so the
sum is its estimate without further sampling, exact for W = 1.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlvla_algos.flow import Chunk, GaussianStep, Schedule, Velocity, ode_schedule, time_grid, transition

Steps = Float[Tensor, "B W H K"]
Draw = Callable[[Tensor, Tensor, Tensor], GaussianStep]
"""(Y [B H K], velocity [B H K], step [B]) -> the Gaussian that the next state is drawn from."""


class Scored(NamedTuple):
    """Stored transitions under some weights."""

    mean: Steps
    std: Float[Tensor, "B W #H #K"]
    log_prob: Chunk
    """Of every entry of the chunk, summed over the steps."""


class Sampled(NamedTuple):
    """A sampled chunk, and the transitions that PPO will score again."""

    action: Chunk
    """Y_0, not clipped."""
    states: Float[Tensor, "B W_plus_1 H K"]
    """Y_k .. Y_{k+W}."""
    scored: Scored


def fixed(schedule: Schedule) -> Draw:
    """Gaussians of a schedule."""
    return lambda sample, velocity, step: transition(sample, velocity, step, schedule)


def with_noise(std: Callable[[Tensor], Tensor], num_steps: int) -> Draw:
    """Gaussians around Euler's step, whose deviation somebody else decides (Flow-Noise, ReinFlow).

    Without a correction of the drift the marginals change with the noise.

    Args:
        std: of (step [B]): [B H K], positive.
    """
    euler = ode_schedule(num_steps)

    def draw(sample: Tensor, velocity: Tensor, step: Tensor) -> GaussianStep:
        return GaussianStep(transition(sample, velocity, step, euler.to(sample.device)).mean, std(step))

    return draw


def sample_chain(
    velocity: Velocity,
    noise: Chunk,
    *,
    draw: Draw,
    num_steps: int,
    start: Int[Tensor, " B"],
    step_noise: Steps,
) -> Sampled:
    """Integrate from noise to an action chunk, W consecutive steps of each row being stochastic.

    Args:
        velocity: see `rlvla_algos.flow.Velocity`; evaluated N times.
        noise: Y_1, already multiplied by the temperature.
        start: first stochastic step of each row, in [0, N - W].
        step_noise: standard normal draws for those steps, already multiplied by the temperature.

    Raises:
        ValueError: a window that reaches beyond the chain.
    """
    window = step_noise.shape[1]
    if not bool(((start >= 0) & (start + window <= num_steps)).all()):
        raise ValueError(f"start must lie in [0, {num_steps - window}]: a window of {window} of {num_steps} steps.")
    grid = time_grid(num_steps).to(noise.device)
    euler = ode_schedule(num_steps).to(noise.device)
    sample = noise
    states = noise[:, None].repeat(1, window + 1, 1, 1)
    mean, log_prob = torch.zeros_like(step_noise), torch.zeros_like(noise)
    std = None
    for k in range(num_steps):
        step = torch.full((len(noise),), k, device=noise.device)
        v = velocity(sample, grid[k].expand(len(noise)), step)
        following = transition(sample, v, step, euler).mean
        place = k - start
        inside = (place >= 0) & (place < window)
        if bool(inside.any()):
            rows, at = inside.nonzero()[:, 0], place[inside]
            gaussian = draw(sample, v, step)
            std = gaussian.std.new_zeros(len(noise), window, *gaussian.std.shape[1:]) if std is None else std
            drawn = (
                gaussian.mean
                + gaussian.std * step_noise[torch.arange(len(noise), device=noise.device), place.clamp(0, window - 1)]
            )
            states[rows, at], states[rows, at + 1] = sample[rows], drawn[rows]
            mean[rows, at], std[rows, at] = gaussian.mean[rows], gaussian.std[rows]
            chosen = inside[:, None, None]
            # Summed in the order of the steps, as `score_chain` does.
            log_prob = torch.where(chosen, log_prob + gaussian.log_prob(drawn), log_prob)
            following = torch.where(chosen, drawn, following)
        sample = following
    assert std is not None
    return Sampled(sample, states, Scored(mean, std, log_prob))


def score_chain(
    velocity: Velocity,
    states: Float[Tensor, "B W_plus_1 H K"],
    *,
    draw: Draw,
    num_steps: int,
    start: Int[Tensor, " B"],
) -> Scored:
    """Score stored transitions again; W evaluations of the velocity, one after another, so that contexts are not
    copied W times."""
    grid = time_grid(num_steps).to(states.device)
    means, stds, log_prob = [], [], torch.zeros_like(states[:, 0])
    for j in range(states.shape[1] - 1):
        step = start + j
        gaussian = draw(states[:, j], velocity(states[:, j], grid[step], step), step)
        means.append(gaussian.mean)
        stds.append(gaussian.std)
        log_prob = log_prob + gaussian.log_prob(states[:, j + 1])
    return Scored(torch.stack(means, dim=1), torch.stack(stds, dim=1), log_prob)


def normal_kl(mean: Tensor, std: Tensor, old_mean: Tensor, old_std: Tensor) -> Tensor:
    """KL(old || new) of independent Gaussians, entry by entry, in nats.

    log(s / s_old) + (s_old^2 + (mu - mu_old)^2) / (2 s^2) - 1/2, in a form that is exactly 0 for equal deviations.
    """
    ratio = old_std / std
    return ((mean - old_mean) / std).square() / 2 + (ratio.square() - 1) / 2 - ratio.log()


def chain_kl(new: Scored, old_mean: Steps, old_std: Tensor, mask: Bool[Tensor, "B H K"]) -> Float[Tensor, " B"]:
    """Sum of the steps' KL(old || new) over valid entries, in nats per chunk."""
    return (normal_kl(new.mean, new.std, old_mean, old_std) * mask[:, None]).sum(dim=(1, 2, 3))


def chain_entropy(std: Float[Tensor, "B W #H #K"]) -> Float[Tensor, "B #H #K"]:
    """Of the noise of all W steps, in nats for each entry: sum_j log s_j + W/2 log(2 pi e)."""
    return (std.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(dim=1)
